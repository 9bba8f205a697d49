"""Runs worlds: one by one without a trace, and the failing one again with it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from coordinator.errors import ProtocolError
from tests.simulation.checkers import Violation
from tests.simulation.faults import Options
from tests.simulation.world import REAL, Parts, World

_COLLECT_EVERY = 40


class Failure(NamedTuple):
    """A world in which an invariant broke."""

    options: Options
    violation: Violation
    trace: list[str]


class Summary:
    """What many worlds came to."""

    def __init__(self) -> None:
        self.seeds = 0
        self.seconds = 0.0
        self.events = 0
        self.counts: dict[str, int] = {}
        self.outcomes: dict[str, int] = {}
        self.failures: list[tuple[int, str, str]] = []

    def add(self, other: Summary) -> None:
        self.seeds += other.seeds
        self.events += other.events
        self.failures += other.failures
        for mine, theirs in ((self.counts, other.counts), (self.outcomes, other.outcomes)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count

    def share(self, outcome: str) -> float:
        """The part of all told outcomes that were this one."""
        return self.outcomes.get(outcome, 0) / max(sum(self.outcomes.values()), 1)


def violation_of(world: World) -> Violation | None:
    """Run a world to its end and return what broke, if anything did."""
    try:
        world.run()
    except Violation as violation:
        return violation
    except ProtocolError as error:
        return Violation("table", str(error))
    return None


def run_seeds(
    seeds: Iterable[int],
    parts: Parts = REAL,
    *,
    stop_at_failure: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Summary:
    """Run many seeds without traces."""
    summary = Summary()
    began = time.perf_counter()
    collected = gc.isenabled()
    gc.disable()  # worlds are full of cycles: collecting between them is cheaper than within
    gc.freeze()
    try:
        for seed in seeds:
            world = World(Options(seed), parts)
            violation = violation_of(world)
            _add_world(summary, world)
            if violation is not None:
                summary.failures.append((seed, violation.name, violation.detail))
                if stop_at_failure:
                    break
            if summary.seeds % _COLLECT_EVERY == 0:
                del world
                gc.collect()
                if progress is not None:
                    progress(summary.seeds)
    finally:
        gc.unfreeze()
        if collected:
            gc.enable()
    summary.seconds = time.perf_counter() - began
    return summary


def _add_world(summary: Summary, world: World) -> None:
    summary.seeds += 1
    summary.events += world.sequence
    for name, count in world.counts.items():
        summary.counts[name] = summary.counts.get(name, 0) + count
    for name, count in world.outcomes.items():
        summary.outcomes[name] = summary.outcomes.get(name, 0) + count


def replay(options: Options, parts: Parts = REAL) -> Failure | None:
    """Run one world with its trace; None if nothing breaks."""
    trace: list[str] = []
    violation = violation_of(World(options, parts, trace))
    return None if violation is None else Failure(options, violation, trace)
