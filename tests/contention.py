"""What the policy of giving way (csrc/cpu/giving_way.cpp) has to do where others want the processors at times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Busy = Callable[[int], bool]  # of a millisecond


def changes(policy: Any, busy: Busy, threads: int = 2, region: int = 1, until: int = 5000) -> list[tuple[int, int]]:
    """The milliseconds at which regions of ``region`` have their threads halved more or less often, and how often.

    A look finds the processors wanted where they were so for more than a quarter of the time since the look before.
    """
    found: list[tuple[int, int]] = []
    looked = halvings = 0
    for ms in range(region, until, region):
        time = 1_000_000 * ms
        if policy.halvings:
            policy.begin(time)
        if policy.halvings != halvings:
            halvings = policy.halvings
            found.append((ms, halvings))
        if threads >> halvings > 1 and time >= policy.next:
            policy.look(time, 4 * sum(map(busy, range(looked, ms))) > ms - looked)
            looked = ms
        if policy.halvings != halvings:
            halvings = policy.halvings
            found.append((ms, halvings))
    return found


def windows(signs: str) -> Busy:
    """Busy where a window of 20 ms has a "#"; the signs are repeated."""
    return lambda ms: signs[ms // 20 % len(signs)] == "#"


FIRST, SECOND = [(60, 1), (260, 0)], [(280, 1), (680, 0)]
# Name -> when others want the processors; threads; milliseconds of a region; the changes that follow.
CASES: dict[str, tuple[Busy, int, int, list[tuple[int, int]]]] = {
    "nobody": (lambda ms: False, 2, 1, []),
    "one window": (lambda ms: 100 <= ms < 120, 2, 1, []),
    "two windows": (lambda ms: 100 <= ms < 140, 2, 1, []),
    "every other window": (windows("#."), 2, 1, []),
    "two of three windows": (windows("##."), 2, 1, []),
    "ten milliseconds now and then": (lambda ms: ms % 100 < 10, 2, 1, []),
    "a fifth of the time": (lambda ms: ms % 5 == 0, 2, 1, []),
    "all the time": (
        lambda ms: True, 2, 1,
        [*FIRST, *SECOND, (700, 1), (1500, 0), (1520, 1), (3120, 0), (3140, 1), (4740, 0), (4760, 1)],
    ),
    "half of the time": (lambda ms: ms % 2 == 0 and ms < 270, 2, 1, FIRST),
    "a little while": (lambda ms: ms < 100, 2, 1, FIRST),
    "a while": (lambda ms: ms < 400, 2, 1, [*FIRST, *SECOND]),
    "twice": (lambda ms: ms < 400 or 2000 <= ms < 2100, 2, 1, [*FIRST, *SECOND, (2060, 1), (2260, 0)]),
    "eight threads": (
        lambda ms: ms < 450, 8, 1, [(60, 1), (120, 2), (180, 3), (380, 0), (400, 3), (800, 0)],
    ),
    "eight threads, four are enough": (lambda ms: ms < 70, 8, 1, [(60, 1), (260, 0)]),
    "long regions": (lambda ms: ms < 500, 2, 100, [(300, 1), (1300, 0)]),
    "longer regions": (lambda ms: True, 2, 500, [(1500, 1), (2500, 0), (3000, 1)]),
}  # fmt: skip
