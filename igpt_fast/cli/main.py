"""The ``igpt`` command line: parsing, errors as one line, exit codes. The commands stand in ``commands/``.

Exit codes: 0 done, 1 failure, 2 usage, 3 the requested backend or device is not available, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from igpt_fast import processes
from igpt_fast.cli import help as help_module
from igpt_fast.cli import terminal
from igpt_fast.cli.checks import DeviceUnavailableError, UsageError, of_options
from igpt_fast.cli.commands import COMMANDS, load
from igpt_fast.cli.signature import checked_words, nearest, options_of
from igpt_fast.cli.terminal import plain, reason, say

QUIET = ("-q", "--quiet")  # of every command
# What is wanted -> what Python says where it is not given.
_NUMBERS = {
    "a whole number": r"invalid literal for int\(\) with base 10: ",
    "a whole number of 4,300 digits at most": r"Exceeds the limit \(4300 digits\).*?(?=$)",
    "a number": r"could not convert string to float: ",
}
# What a user or a machine may cause; anything else is a mistake of ours.
FAILURES = (DeviceUnavailableError, OSError, ValueError, FloatingPointError, ImportError, RuntimeError, MemoryError)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    from igpt_fast import __version__

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["help"]:
        args = [*(word for word in args[1:] if word != "help"), "--help"]
    if args[:1] in ([word] for word in QUIET) and len(args) > 1:
        args = [*args[1:], args[0]] if args[1] in COMMANDS else args[1:]
    name = args[0] if args and args[0] in COMMANDS else ""
    try:
        if args in (["-V"], ["--version"]):
            print(f"igpt_fast {__version__}")
        elif args in (["-h"], ["--help"]):
            print(help_module.overview())
        elif not name:
            raise UsageError(_unknown(args))
        elif {"-h", "--help"} & set(args[1:]):
            print(help_module.of_command(name))
        else:
            words = [word for word in args[1:] if word not in QUIET]
            command = _parsed(name, words)
            with terminal.hushed(len(words) < len(args) - 1), warnings.catch_warnings():
                warnings.showwarning = _show_warning
                command()
        sys.stdout.flush()
    except UsageError as error:
        return _fail(name, error, 2)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    except BrokenPipeError:
        _let_go_of_stdout()
        return 1
    except FAILURES as error:
        _let_go_of_stdout()
        unavailable = isinstance(error, DeviceUnavailableError) or type(error).__name__ == "BackendUnavailableError"
        return _fail(name, error, 3 if unavailable else 1)
    except Exception as error:  # a mistake of ours
        if sys.flags.dev_mode:
            raise
        return _fail(name, f"internal error: {type(error).__name__}: {error} (python -X dev shows where)", 1)
    return 0


def _let_go_of_stdout() -> None:
    """Where it does not take what it was given, so that closing it does not fail again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unknown(args: Sequence[str]) -> str:
    """What is said where no command is named."""
    if not args:
        return f"give a command: {', '.join(COMMANDS)} (see igpt --help)"
    word = plain(args[0])
    return f"there is no command {word}{nearest(word, [*COMMANDS, 'help'])} (see igpt --help)"


def _parsed(name: str, words: Sequence[str]) -> Callable[[], None]:
    """The call that a command line asks for.

    Raises:
        UsageError: It asks for nothing that there is.
    """
    function = load(name)
    with _parsing(name):
        words = checked_words(function, words)
        config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
        return tyro.cli(_deferred(function), prog=f"igpt {name}", args=words, config=config)


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """A warning in one line, without the place in the sources; of several processes, the first one's."""
    if not processes.rank():
        say(f"igpt: {message}")


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function of the same signature that parses now and runs later, so that only parsing is quiet."""

    @functools.wraps(function)
    def parse(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return lambda: function(*args, **kwargs)

    return parse


@contextlib.contextmanager
def _parsing(name: str) -> Iterator[None]:
    """tyro's framed message (in ASCII the frame is of dashes) as one line, of options and not of the objects that hold
    them; its exits for help pass.
    """
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        text = " ".join(re.sub(r"[\u2500-\u257f]|-{9,}", " ", framed.getvalue().partition("\n")[2]).split())
        text = re.split(r" ?(?:Argument helptext|Perhaps you meant|For full helptext)", text)[0]
        text = of_options(re.sub(r"^Error parsing [^-\s]\S*: ", "", text))
        if text.startswith("Missing from"):
            needed = [option.values for option in options_of(load(name)) if option.required]
            text = f"give {' and '.join(needed)}"
        for kind, python in _NUMBERS.items():
            text = re.sub(rf"^Error parsing ([^/\s]+)\S*: .*?{python}(.*)$", rf"\1 is \2; want {kind}", text)
        raise UsageError(f"{text or 'wrong arguments'} (see igpt {name} --help)") from None


def _fail(name: str, error: object, code: int) -> int:
    """Says the reason in one line; of several processes with the same wrong command line, the first does."""
    number = 0
    with contextlib.suppress(ValueError):  # what they say may be the error itself
        number = processes.rank()
    if number and code == 2:
        return code
    text = reason(error) if isinstance(error, BaseException) else error
    where = f" rank {number}:" if number else ""
    say(f"igpt {name}".strip() + f":{where} {text}")
    return code
