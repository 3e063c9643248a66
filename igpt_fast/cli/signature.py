"""What a command takes, read off its signature and docstring: for help, for what is misspelt, for tab completion."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from igpt_fast.cli.checks import UsageError
from igpt_fast.files import shown

_VALUES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a command, or, without ``names``, what stands without one.

    Args:
        name: Of the parameter.
        names: As they are written, short ones first.
        values: What is written behind it; empty of a switch.
        choices: All values that it takes, where these are few.
        default: Its value if it is not given; ``inspect.Parameter.empty`` where it must be.
        text: What it does.
        group: What it is about, together with those beside it; empty of the command's own.
    """

    name: str
    names: tuple[str, ...]
    values: str
    choices: tuple[str, ...]
    default: Any
    text: str
    group: str

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def switch(self) -> tuple[str, ...]:
        """Of one without a value: what turns it on, or off where it is on; else nothing."""
        off = "no-" if self.default is True else ""
        return () if self.values else tuple(f"--{off}{name[2:]}" if off else name for name in self.names)


def options_of(command: Callable[..., Any], group: str = "") -> Iterator[Option]:
    """All that a command takes, or the class of an object whose fields are options, in the order of the signature."""
    hints, texts = get_type_hints(command, include_extras=True), explained(command.__doc__ or "")
    for name, parameter in inspect.signature(command).parameters.items():
        kind, marks = hints[name], ()
        while get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            marks += tuple(more)
        text = texts.get(name, "")
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from options_of(kind, text.rstrip("."))
        else:
            yield _option(name, kind, marks, parameter.default, text, group)


def _option(name: str, kind: Any, marks: tuple[Any, ...], default: Any, text: str, group: str) -> Option:
    union = get_origin(kind) in (Union, types.UnionType)
    kinds = [part for part in (get_args(kind) if union else [kind]) if part is not type(None)]
    choices = tuple(str(value) for part in kinds if get_origin(part) is Literal for value in get_args(part))
    if choices and bool in kinds:
        choices = ("True", "False", *choices)
    values = "" if kinds == [bool] else f"{{{','.join(choices)}}}" if choices else _VALUES.get(kinds[0], "TEXT")
    named = [mark for mark in marks if hasattr(mark, "metavar")]  # of tyro.conf.arg
    values = next((mark.metavar for mark in named if mark.metavar), values)
    aliases = [alias for mark in named for alias in mark.aliases or ()]
    names = sorted((f"--{name.replace('_', '-')}", *aliases), key=lambda word: word.startswith("--"))
    if Positional in marks:
        names, several = [], get_origin(kind) is tuple
        values = f"{name.upper()}{' ...' if several else ''}"
    return Option(name, tuple(names), values, choices, default, text, group)


def explained(text: str) -> dict[str, str]:
    """What the section Args of a docstring says of each name."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(text).partition("\nArgs:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if match := re.match(r" {4}(\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return {key: value.replace("``", "") for key, value in found.items()}


def checked_words(command: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """The words of a command line, with True behind each option that may stand alone, as ``--compile`` may.

    Raises:
        UsageError: A word is an option that there is not, or a value that an option does not take.
    """
    options = {name: option for option in options_of(command) for name in option.switch or option.names}
    alone = [name for name, option in options.items() if "True" in option.choices]
    found: list[str] = []
    for i, word in enumerate(words):
        name, given, value = word.partition("=")
        name = f"--{name[2:].replace('_', '-')}"
        if word == "--":
            return [*found, *words[i:]]
        if (named := f"--{name.removeprefix('--no-')}") != name and named in alone:
            found += [named, "False"]
            continue
        found.append(word)
        if not word.startswith("--"):
            continue
        if name not in options:
            on = f"--no-{name[2:]}" in options  # such as --flip, which is on unless --no-flip is given
            ask = f"; it is on, and --no-{name[2:]} turns it off" if on else nearest(name, options)
            raise UsageError(f"there is no option {shown(name)[1:-1]}{ask}")
        choices, following = options[name].choices, value if given else " ".join(words[i + 1 : i + 2])
        if name in alone and following not in choices and not given:
            found.append("True")
        elif choices and following not in choices:
            wanted = f"{name} is {shown(following)}; want one of {', '.join(choices)}"
            raise UsageError(wanted + nearest(following, choices))
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """A question after the known word that is most like another; empty where none is."""
    bare = {name.lstrip("-"): name for name in known}  # two dashes would make all options alike
    found = difflib.get_close_matches(word.lstrip("-"), bare, 1)
    return f"; did you mean {bare[found[0]]}?" if found else ""
