"""How the gate follows the time of statements: its patience and its limit, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.gate import PATIENCE_LEAST, PATIENCE_MOST, WINDOW_STATEMENTS, Gate
from tests.support.virtual import virtual
from tests.unit.test_gate import FOR_EVER, taken, work

MS = 0.001


@virtual
async def test_patience_follows_the_time_of_statements() -> None:
    gate = Gate(1, most=1)
    assert gate.patience == PATIENCE_LEAST
    token = taken(gate, "a")
    await work(token, 500, 20 * MS)
    assert gate.patience == pytest.approx(80 * MS, rel=0.01)
    await work(token, 100, 60.0)
    assert gate.patience == PATIENCE_MOST


class Work:
    """The processor's time, as the test says."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("latency", "most", "limit"),
    [(0.2 * MS, 1000, 8), (20 * MS, 1000, 400), (20 * MS, 30, 30), (20 * MS, 4, 4)],
)
@virtual
async def test_more_are_let_in_where_the_database_is_far(
    latency: float, most: int, limit: int
) -> None:
    clock = Work()
    gate = Gate(8, most=most, work_clock=clock)
    token = taken(gate, "a")
    await work(token, WINDOW_STATEMENTS - 1, latency)
    assert gate.limit == min(8, most)
    clock.seconds += 0.1 * MS * WINDOW_STATEMENTS
    await work(token, 1, latency * 50)
    assert gate.limit == pytest.approx(limit, abs=1)


@virtual
async def test_each_window_counts_by_itself() -> None:
    clock = Work()
    gate = Gate(8, most=1000, work_clock=clock)
    token = taken(gate, "a")
    for latency, work_seconds, limit in (
        (20 * MS, 0.1 * MS, 400),
        (20 * MS, 0.5 * MS, 80),
        (50 * MS, 0.5 * MS, 200),
    ):
        clock.seconds += work_seconds * WINDOW_STATEMENTS
        await work(token, WINDOW_STATEMENTS, latency)
        assert gate.limit == pytest.approx(limit, abs=1)


@virtual
async def test_the_time_of_statements_side_by_side_is_that_of_all() -> None:
    clock = Work()
    gate = Gate(8, most=1000, work_clock=clock)
    token = taken(gate, "a")
    clock.seconds += 0.1 * MS * WINDOW_STATEMENTS
    for _ in range(WINDOW_STATEMENTS):
        token.busy()
        token.busy()
        await asyncio.sleep(20 * MS)
        token.idle()
        await asyncio.sleep(0.1 * MS)
        token.idle()
    assert gate.limit == pytest.approx(402, abs=1)


@virtual
async def test_one_quick_statement_is_enough_to_lower_the_limit_again() -> None:
    clock = Work()
    gate = Gate(8, most=1000, work_clock=clock)
    token = taken(gate, "a")
    clock.seconds += 0.1 * MS * WINDOW_STATEMENTS
    await work(token, WINDOW_STATEMENTS, 20 * MS)
    assert gate.limit > 100
    await work(token, 1, 0.3 * MS)
    assert gate.limit == 8


@virtual
async def test_a_queue_for_the_processor_does_not_ask_for_more_of_itself() -> None:
    """Everybody takes turns, so that every statement takes as long as there are others."""
    clock = Work()
    gate = Gate(8, most=1000, work_clock=clock)
    processor = asyncio.Lock()

    async def body(name: str) -> None:
        token = await gate.enter(name, FOR_EVER)
        for _ in range(1000):
            token.busy()
            async with processor:
                await asyncio.sleep(0.7 * MS)
                clock.seconds += 0.7 * MS
            token.idle()
        token.leave()

    async with asyncio.TaskGroup() as group:
        for number in range(24):
            group.create_task(body(str(number)))
    assert gate.limit == 8
