"""Makes a failing world small: fewer transactions, fewer kinds of faults, a shorter history.

What is left must break the same invariant. Taking something away shifts the events that follow, so
each smaller world is tried with a few stirrings of them (`salt`).
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.simulation.crossed import PAIRS
from tests.simulation.faults import Options
from tests.simulation.runner import violation_of
from tests.simulation.world import Parts, World

SALTS = 6
RUNS_MOST = 1_500


def shrink(options: Options, name: str, parts: Parts) -> Options:
    """The smallest world found that breaks the invariant `name`; at worst the one given."""
    budget = [RUNS_MOST]
    best = _with(options, only=tuple(range(options.transactions + 2 * PAIRS)))
    if not _fails(best, name, parts, budget):
        return options
    smaller: Options | None = best
    while smaller is not None and budget[0] > 0:
        best = smaller
        smaller = next((each for each in _smaller(best) if _fails(each, name, parts, budget)), None)
    return best


def _smaller(options: Options) -> Iterator[Options]:
    """Smaller worlds, the boldest first, each with several salts."""
    for candidate in _steps(options):
        for salt in range(SALTS):
            yield _with(candidate, salt=salt)


def _steps(options: Options) -> Iterator[Options]:
    kept = options.only or ()
    size = len(kept) // 2
    while size >= 1:
        for start in range(0, len(kept), size):
            yield _with(options, only=kept[:start] + kept[start + size :])
        size //= 2
    for kind in options.rates:
        yield _with(options, dropped=(*options.dropped, kind))
    if options.safety > 0.5:
        yield _with(options, safety=round(options.safety * 0.6, 2))


def _fails(options: Options, name: str, parts: Parts, budget: list[int]) -> bool:
    if budget[0] <= 0:
        return False
    budget[0] -= 1
    violation = violation_of(World(options, parts))
    return violation is not None and violation.name == name


def _with(
    options: Options,
    *,
    dropped: tuple[str, ...] | None = None,
    only: tuple[int, ...] | None = None,
    safety: float | None = None,
    salt: int | None = None,
) -> Options:
    return Options(
        options.seed,
        transactions=options.transactions,
        dropped=options.dropped if dropped is None else dropped,
        only=options.only if only is None else only,
        safety=options.safety if safety is None else safety,
        salt=options.salt if salt is None else salt,
    )
