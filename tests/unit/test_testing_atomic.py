"""`assert_atomic` finds what participants with planted bugs leave behind, and names it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from coordinator import (
    ConfigurationError,
    Coordinator,
    HeuristicOutcome,
    TransactionAborted,
    TransactionError,
)
from coordinator.model import FINISHED, Branch, Ending, Vote, Xid
from coordinator.testing import QUICK, Memory, assert_atomic, refuse, unreachable
from tests.unit.shop import Shop


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    yield shop
    shop.coordinator.blocking.close()


class CommitsByItself(Memory):
    """A planted bug: when asked to roll back it has committed already, as a person might have."""

    async def rollback(self, branch: Branch) -> Ending:
        if branch.id in self.store.prepared:
            await super().commit(branch)
        return await super().rollback(branch)


class LosesCommits(Memory):
    """A planted bug: it acknowledges a commit and drops it."""

    async def commit(self, branch: Branch) -> Ending:
        if self.store.prepared.pop(branch.id, None) is not None:
            return FINISHED
        return await super().commit(branch)


class ForgetsPrepared(Memory):
    """A planted bug: a prepared branch does not survive."""

    async def prepare(self, xid: Xid) -> Vote:
        vote = await super().prepare(xid)
        self.store.prepared.pop(xid.branch, None)
        return vote


class NeverEnds(Memory):
    """A planted bug: it says that a branch is rolled back, and leaves it prepared."""

    async def rollback(self, branch: Branch) -> Ending:
        return FINISHED


async def check_finds(broken: Memory, message: str, *, refused: bool = False) -> None:
    shop = Shop(broken)
    async with shop.coordinator as coordinator:
        with suppress(TransactionAborted, HeuristicOutcome), ExitStack() as switches:
            if refused:
                switches.enter_context(refuse(shop.stock))
            await shop.sell()
        with pytest.raises(AssertionError) as raised:
            await assert_atomic(coordinator, within=0.2)
    assert message in str(raised.value)


async def test_planted_commits_by_itself() -> None:
    await check_finds(CommitsByItself("ledger"), "of ledger: heuristic commit", refused=True)


async def test_planted_loses_commits() -> None:
    await check_finds(LosesCommits("ledger"), "is committed, but ledger: heuristic rollback")


async def test_planted_forgets_prepared() -> None:
    await check_finds(ForgetsPrepared("ledger"), "of ledger: heuristic rollback")


async def test_planted_never_ends() -> None:
    await check_finds(NeverEnds("ledger"), "is in doubt; prepared in: ledger", refused=True)


async def test_a_transaction_that_still_runs_is_named(shop: Shop) -> None:
    go_on = asyncio.Event()

    async def sell_slowly() -> None:
        async with shop.coordinator.transaction():
            await shop.stock.put("sold", 1)
            await go_on.wait()

    async with shop.coordinator as coordinator, asyncio.TaskGroup() as tasks:
        tasks.create_task(sell_slowly())
        while not coordinator.engine().drivers:
            await asyncio.sleep(0)
        with pytest.raises(AssertionError, match="still runs"):
            await assert_atomic(coordinator, within=0.05)
        go_on.set()


async def test_an_unreachable_participant_is_named(shop: Shop) -> None:
    async with shop.coordinator as coordinator:
        for target, message in (
            (shop.ledger, "ledger cannot be"),
            (coordinator, "does not answer"),
        ):
            with unreachable(target), pytest.raises(AssertionError, match=message):
                await assert_atomic(coordinator, within=0.05)


async def test_a_participant_that_is_not_here_cannot_be_vouched_for(shop: Shop) -> None:
    async with shop.coordinator:
        await shop.sell()
    half = Coordinator(
        shop.coordinator.log_url, cluster="testing", participants=[shop.stock], settings=QUICK
    )
    with pytest.raises(AssertionError, match="ledger: there is no such participant"):
        await assert_atomic(half)


async def test_it_is_not_for_the_inside_of_a_transaction_nor_for_a_forgotten_log() -> None:
    shop = Shop()
    async with shop.coordinator as coordinator, coordinator.transaction():
        with pytest.raises(TransactionError, match="inside a transaction"):
            await assert_atomic(coordinator)
    with pytest.raises(ConfigurationError, match="memory:NAME"):
        await assert_atomic(Coordinator("memory:", cluster="shop"))
