"""`crash_at` stops a coordinator dead at a named point, and what is left is recovered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from coordinator import ConfigurationError, Coordinator, Settings
from coordinator.testing import (
    POINTS,
    QUICK,
    Crashed,
    Memory,
    assert_atomic,
    assert_atomic_blocking,
    crash_at,
)
from tests.unit.shop import Shop

BEFORE_DECISION = ["prepare:before", "prepare:after", "decide:before"]
AFTER_DECISION = ["decide:after", "commit:before", "commit:after", "forget:before", "forget:after"]


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    yield shop
    shop.coordinator.blocking.close()


@pytest.mark.parametrize("point", BEFORE_DECISION + AFTER_DECISION)
async def test_what_a_crash_leaves_is_ended_in_one_way(shop: Shop, point: str) -> None:
    async with shop.coordinator:
        async with crash_at(shop.coordinator, point) as crash:
            await shop.sell()
        assert crash.happened
        assert shop.coordinator.loop is None
    await assert_atomic(shop.coordinator)
    assert shop.sold is (point in AFTER_DECISION)
    async with shop.coordinator:
        await shop.sell()
    assert shop.sold


async def test_the_second_time_that_a_point_is_reached(shop: Shop) -> None:
    async with shop.coordinator:
        async with crash_at(shop.coordinator, "commit:before", occurrence=2):
            await shop.sell()
        assert len(shop.stock.store.prepared) + len(shop.ledger.store.prepared) == 1
    await assert_atomic(shop.coordinator)
    assert shop.sold


async def test_a_running_sweep_of_another_process_finishes_what_a_crash_left(shop: Shop) -> None:
    stock, ledger = Memory("stock", shop.stock.store), Memory("ledger", shop.ledger.store)
    other = Coordinator(
        shop.coordinator.log_url, cluster="testing", participants=[stock, ledger], settings=QUICK
    )
    async with other, shop.coordinator:
        async with crash_at(shop.coordinator, "decide:after"):
            await shop.sell()
        assert not ledger.committed
        await assert_atomic(other)
    assert shop.sold


async def test_points_of_another_coordinator_do_not_count(shop: Shop) -> None:
    other = Shop()
    async with other.coordinator, shop.coordinator:
        async with crash_at(shop.coordinator, "commit:before"):
            await other.sell()
            await shop.sell()
        assert other.sold
        assert shop.coordinator.loop is None


async def test_everybody_else_stops_too() -> None:
    """One works and one waits at the gate: neither commits, neither waits for its deadline."""
    shop = Shop(settings=Settings(timeout=60))
    stock, coordinator = shop.stock, shop.coordinator
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def works() -> None:
        async with coordinator.transaction():
            await stock.put("works", 1)
            inside.set()
            await go_on.wait()

    async def waits() -> None:
        async with coordinator.transaction():
            await stock.put("waits", 1)

    async def crashes() -> None:
        async with coordinator.transaction():
            await stock.put("crashes", 1)
            await inside.wait()
            while not coordinator.engine().gate._line:
                await asyncio.sleep(0)

    async with coordinator:
        coordinator.engine().gate.most = 2
        async with crash_at(coordinator, "one-phase:before") as crash:
            tasks = [asyncio.create_task(body()) for body in (works, crashes, waits)]
            while not crash.happened:
                await asyncio.sleep(0)
            go_on.set()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [Crashed, Crashed, Crashed]
    assert stock.committed == {}
    await assert_atomic(coordinator)


async def test_after_the_crash_nothing_can_begin_in_the_block(shop: Shop) -> None:
    async with crash_at(shop.coordinator, "prepare:before"), shop.coordinator:
        with pytest.raises(Crashed):
            await shop.sell()
        await shop.sell()
    await assert_atomic(shop.coordinator)
    assert not shop.sold


def test_a_crash_of_the_synchronous_face(shop: Shop) -> None:
    with crash_at(shop.coordinator, "commit:before") as crash:
        shop.sell_blocking()
    assert crash.happened
    assert_atomic_blocking(shop.coordinator)
    assert shop.sold
    with shop.coordinator.blocking:
        shop.sell_blocking()


async def test_a_crash_while_a_thread_uses_the_loop_of_an_application(shop: Shop) -> None:
    def crash() -> None:
        with crash_at(shop.coordinator, "decide:after"):
            shop.sell_blocking()

    async with shop.coordinator:
        await asyncio.to_thread(crash)
        assert shop.coordinator.loop is None
    await assert_atomic(shop.coordinator)
    assert shop.sold


async def test_a_point_that_is_not_reached_fails_the_test(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.testing.crash.PATIENCE_SECONDS", 0.05)
    async with shop.coordinator:
        with pytest.raises(AssertionError, match=r"3x in the block; .*commit:before 2x"):
            async with crash_at(shop.coordinator, "commit:before", occurrence=3):
                await shop.sell()
        with pytest.raises(LookupError):
            async with crash_at(shop.coordinator, "commit:before"):
                raise LookupError("the test's own reason")
        await shop.sell()
    assert shop.sold


async def test_a_point_that_is_none_is_refused_at_once(shop: Shop) -> None:
    with pytest.raises(ConfigurationError, match="decide:before"):
        crash_at(shop.coordinator, "decided")
    with pytest.raises(ConfigurationError, match="async with"):
        crash_at(shop.coordinator, "decide:before").__enter__()
    assert len(POINTS) == len(set(POINTS)) >= 18
