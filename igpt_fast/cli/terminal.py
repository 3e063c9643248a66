"""What the commands say: a line each, whose text may come from files that nobody trusts."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_hushed = False
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


def note(text: object) -> None:
    """A line on stderr that is not wanted where little is to be said."""
    if not _hushed:
        say(text)


@contextlib.contextmanager
def hushed(wanted: bool) -> Iterator[None]:
    """For the length of a block, ``--quiet``: warnings, errors and what ``--json`` asks for alone are said."""
    global _hushed
    before, _hushed = _hushed, wanted
    try:
        yield
    finally:
        _hushed = before


def bar(what: str, total: float | None, unit: str, wanted: bool = True, **more: Any) -> tqdm:
    """A progress bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    shown = None if wanted and not _hushed else True  # None: on a terminal
    return tqdm(
        desc=what, total=total, unit=f" {unit}", file=sys.stderr, disable=shown, leave=False, dynamic_ncols=True, **more
    )


def lines(rows: Sequence[str]) -> None:
    """Prints a table on stdout, spaces kept; of a name in it, its writer takes the ``plain`` form."""
    if _hushed:
        return
    encoding = sys.stdout.encoding or "utf-8"
    for row in rows:
        print(row.encode(encoding, "backslashreplace").decode(encoding))


def report(json: bool, values: dict[str, Any], text: str) -> None:
    """The result on stdout: one JSON object, in ASCII, or a line."""
    if json:
        print(json_module.dumps(values))
    elif not _hushed:
        say(text, sys.stdout)


def reason(error: BaseException) -> str:
    """What an error says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)


def nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
