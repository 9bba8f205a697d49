"""Which cases there are, which of them run with how many clients, and which one is the baseline.

A bound that bounds nothing is left out: with so few clients it is the loop without a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from coordinator.commands.bench.handwritten import BestEffort, OneDatabase, TwoPhase
from coordinator.commands.bench.syncpoint import Syncpoint
from coordinator.commands.bench.workload import Case
from coordinator.errors import ConfigurationError

BOUNDS = (8, 16, 32)
PLAIN_AT_ONCE = 8
"""For the two cases that prepare nothing; as many as Syncpoint lets in by itself."""

UNBOUNDED = "by-hand-unbounded"
SYNCPOINT = "syncpoint-sqlite"

CASES: dict[str, Callable[[], Case]] = {
    UNBOUNDED: lambda: TwoPhase(None),
    "by-hand-8": lambda: TwoPhase(8),
    "by-hand-16": lambda: TwoPhase(16),
    "by-hand-32": lambda: TwoPhase(32),
    SYNCPOINT: lambda: Syncpoint(),
    "syncpoint-sqlite-8": lambda: Syncpoint(8),
    "syncpoint-sqlite-16": lambda: Syncpoint(16),
    "syncpoint-sqlite-32": lambda: Syncpoint(32),
    "best-effort": lambda: BestEffort(PLAIN_AT_ONCE),
    "one-database": lambda: OneDatabase(PLAIN_AT_ONCE),
}

TRANSFERS, LOG, GROWTH = PARTS = ("transfers", "log", "growth")

_BOUND = {f"{kind}-{bound}": bound for kind in ("by-hand", SYNCPOINT) for bound in BOUNDS}

CLIENTS_MAX = 256


def parse_clients(text: str) -> list[int]:
    """The numbers in `1,8,32`, without repeats; `ConfigurationError` for anything else."""
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise ConfigurationError(f"--clients {text}: write numbers, such as 1,8,32") from error
    if not all(1 <= number <= CLIENTS_MAX for number in numbers):
        raise ConfigurationError(f"--clients {text}: each is 1 to {CLIENTS_MAX}")
    return numbers


def parse_only(text: str | None) -> list[str]:
    """The names of cases and parts in `by-hand-8,log`, all parts for None; or raises
    `ConfigurationError`."""
    if text is None:
        return list(PARTS)
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in CASES and name not in PARTS:
            raise ConfigurationError(
                f"--only {text}: there is no case {name!r}; the parts are {', '.join(PARTS)}, and "
                f"the cases of transfers {', '.join(CASES)}"
            )
    return names


def cases_for(clients: int, only: Collection[str]) -> list[str]:
    """The cases to run with so many clients, in the order of `CASES`.

    Whoever asks only for a loop whose bound bounds nothing gets the one without a bound instead.
    """
    named = set(CASES) if TRANSFERS in only else set(only)
    bounding = {name for name in named & CASES.keys() if _BOUND.get(name, 0) < clients}
    if any(name.startswith("by-hand") for name in named - bounding):
        bounding.add(UNBOUNDED)
    return [name for name in CASES if name in bounding]


def baselines(clients: int) -> Sequence[str]:
    """The loops by hand of which the best is the baseline: those with a bound, where it bounds."""
    bounded = [f"by-hand-{bound}" for bound in BOUNDS if bound < clients]
    return bounded if len(bounded) == len(BOUNDS) else [*bounded, UNBOUNDED]
