"""What the project promises of its speed, and whether this run has met it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from coordinator.commands.bench import growth
from coordinator.commands.bench.cases import LOG, SYNCPOINT
from coordinator.commands.bench.results import Result


class Bar(msgspec.Struct, frozen=True):
    """One promise; `wanted` is for people."""

    name: str
    wanted: str
    measured: float
    met: bool


def bars(results: Sequence[Result]) -> list[Bar]:
    """Those of which this run has measured something."""
    return [*_transfers(results), *_log(results), *_growth(results)]


def _transfers(results: Sequence[Result]) -> Iterator[Bar]:
    many, one = _find(results, SYNCPOINT, 32), _find(results, SYNCPOINT, 1)
    if many is not None:
        yield from _bar(
            "rate to the best bounded loop, 32 clients", many.ratio_to_baseline, at_least=0.9
        )
        yield from _bar(
            "rate to the unbounded loop, 32 clients", many.ratio_to_unbounded, at_least=1.1
        )
    if one is not None:
        yield from _bar("median time to the loop's, 1 client", one.p50_to_baseline, at_most=1.25)
        yield from _bar("log writes a transaction waits for, 1 client", one.log_writes, exactly=1.0)


def _log(results: Sequence[Result]) -> Iterator[Bar]:
    crowded = _find(results, LOG, 64)
    if crowded is not None:
        yield from _bar("fsyncs a decision, 64 proposers", crowded.fsyncs, at_most=0.05)


def _growth(results: Sequence[Result]) -> Iterator[Bar]:
    old = [each for each in results if each.case in (growth.KEPT, growth.FORGETTING)]
    rates = [each.ratio_to_baseline for each in old if each.ratio_to_baseline is not None]
    memory = [each.memory_more_mb for each in old if each.memory_more_mb is not None]
    if rates:
        yield from _bar("rate with an old log to that with a new one", min(rates), at_least=0.95)
    if memory:
        yield from _bar("MB of memory more with an old log", max(memory), at_most=20)


def _find(results: Sequence[Result], case: str, clients: int) -> Result | None:
    return next((each for each in results if (each.case, each.clients) == (case, clients)), None)


def _bar(
    name: str,
    measured: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    exactly: float | None = None,
) -> Iterator[Bar]:
    if measured is None:
        return
    if at_least is not None:
        yield Bar(name, f"≥ {at_least:g}", measured, measured >= at_least)
    if at_most is not None:
        yield Bar(name, f"≤ {at_most:g}", measured, measured <= at_most)
    if exactly is not None:
        yield Bar(name, f"= {exactly:g}", measured, measured == exactly)
