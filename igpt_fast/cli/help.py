"""What ``igpt --help`` and ``igpt COMMAND --help`` print, by hand: quick, in groups, an example first."""

from __future__ import annotations

import inspect
import itertools
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from igpt_fast.cli.commands import GROUPS, load
from igpt_fast.cli.signature import Option, options_of

_LEFT = 26  # columns of the options' names


def overview() -> str:
    """Of all commands."""
    from igpt_fast import __version__

    lines = ["Example: igpt sample -n 16 --out samples.png", "", f"ImageGPT made fast. igpt_fast {__version__}"]
    lines += ["", "usage: igpt COMMAND [options]"]
    for group, modules in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<11}{_about(load(name))[0]}" for name in modules]
    more = "igpt help COMMAND explains the options of a command; igpt completion bash completes them at Tab."
    return "\n".join([*lines, "", more])


def of_command(name: str) -> str:
    """An example, what it does, and its options in groups."""
    command = load(name)
    example, *about = sorted(_about(command), key=lambda part: not part.startswith("Example: "))
    options = list(options_of(command))
    positional = [option for option in options if not option.names]
    words = [option.values if option.required else f"[{option.values}]" for option in positional]
    width = max(60, min(120, shutil.get_terminal_size().columns))
    lines = [example, "", *itertools.chain.from_iterable((*textwrap.wrap(part, width), "") for part in about)]
    lines += [f"usage: igpt {' '.join([name, *words, '[options]'])}", *_rows("", positional, width)]
    for group in dict.fromkeys(option.group for option in options if option.names):
        lines += _rows(group or "options", [one for one in options if one.names and one.group == group], width)
    every = "Of every command: -q, --quiet says nothing but warnings, errors and what --json asks for; -h, --help."
    return "\n".join([*lines, "", *textwrap.wrap(every, width)])


def _about(command: Callable[..., Any]) -> list[str]:
    """The paragraphs of its docstring before the arguments, each in one line; the first says what it does."""
    text = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:\n")[0]
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _rows(title: str, options: list[Option], width: int) -> list[str]:
    lines = textwrap.wrap(f"{title}:", width) if title else []
    for option in options:
        left = f"  {', '.join(option.names)} {option.values}".rstrip() if option.names else f"  {option.values}"
        if option.switch:
            left = f"  {', '.join(option.switch)}"
        text = textwrap.wrap(f"{option.text}{_default(option)}", width - _LEFT)
        if len(left) > _LEFT - 2:
            lines.append(left)
            left = ""
        lines += [f"{left:<{_LEFT}}{text[0]}", *(" " * _LEFT + line for line in text[1:])]
    return ["", *lines] if lines else []


def _default(option: Option) -> str:
    if option.required:
        return "" if option.values.endswith("...") else " (required)"
    if option.default is None or option.default == () or (option.default is False and option.switch):
        return ""
    return " (on; this turns it off)" if option.default is True else f" (default: {option.default})"
