"""What the commands say: a line each, whose text may come from files that nobody trusts."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from typing import Any, TextIO

_MOST = 1500  # characters of a line: a path or two, and what is said of them


def plain(text: object) -> str:
    """A text as one line that a terminal shows as it is: without control characters, escape sequences and changes of
    direction, which are written as Python writes them, and with its middle left out where it is long.
    """
    words = str(text)
    if len(words) > 4 * _MOST:  # so that what follows is quick
        words = f"{words[: 2 * _MOST]} {words[-2 * _MOST :]}"
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(words.split()))
    return line if len(line) <= _MOST else f"{line[: _MOST - 400]} [...] {line[-390:]}"


def say(text: object, stream: TextIO | None = None) -> None:
    """Prints a line: to stderr, unless told where."""
    stream = sys.stderr if stream is None else stream
    encoding = stream.encoding or "utf-8"
    print(plain(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def lines(rows: Sequence[str]) -> None:
    """Prints a table on stdout, spaces kept; of a name in it, its writer takes the ``plain`` form."""
    encoding = sys.stdout.encoding or "utf-8"
    for row in rows:
        print(row.encode(encoding, "backslashreplace").decode(encoding))


def report(json: bool, values: dict[str, Any], text: str) -> None:
    """The result on stdout: one JSON object, in ASCII, or a line."""
    if json:
        print(json_module.dumps(values))
    else:
        say(text, sys.stdout)


def reason(error: BaseException) -> str:
    """What an error says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
