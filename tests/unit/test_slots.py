"""The slots for prepared branches: the share, order, deadlines, cancellation."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.model import BranchId
from participants.postgres.slots import Slots

FOR_EVER = 1e12
A, B, C, D = (BranchId(letter * 16) for letter in "abcd")


def names(slots: Slots) -> list[BranchId]:
    return [branch for branch, _ in slots.holders()]


def queued(slots: Slots, branch: BranchId) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(slots.take(branch, FOR_EVER))


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("slots", "sharers", "share"),
    [(64, 1, 58), (64, 4, 14), (10, 1, 9), (2, 1, 1), (1, 1, 1), (10, 100, 1), (10, 0, 9)],
)
def test_the_share_leaves_a_reserve_and_is_at_least_one(
    slots: int, sharers: int, share: int
) -> None:
    assert Slots(slots, lambda: sharers).share == share


async def test_who_finds_a_slot_is_not_suspended() -> None:
    slots = Slots(3)
    with pytest.raises(StopIteration):
        slots.take(A, FOR_EVER).send(None)
    assert slots.try_take(B) and not slots.try_take(C)
    assert names(slots) == [A, B]


async def test_a_branch_that_asks_again_has_one_slot() -> None:
    slots = Slots(2)
    assert slots.try_take(A) and slots.try_take(A)
    await slots.take(A, FOR_EVER)
    slots.give(A)
    assert names(slots) == []


async def test_a_slot_goes_to_the_first_who_waits() -> None:
    slots = Slots(2)
    await slots.take(A, FOR_EVER)
    waiting = [queued(slots, branch) for branch in (B, C)]
    await settle()
    slots.give(A)
    assert not slots.try_take(D)
    await settle()
    assert [task.done() for task in waiting] == [True, False]
    slots.give(A)
    await settle()
    assert names(slots) == [B] and not waiting[1].done()
    slots.give(B)
    await waiting[1]


async def test_a_wait_ends_at_its_deadline_and_names_setting_share_and_holders() -> None:
    slots = Slots(8, lambda: 4)
    await slots.take(A, FOR_EVER)
    with pytest.raises(
        TimeoutError,
        match=rf"max_prepared_transactions = 8 the share of this process is 1, held by {A} for .* "
        "s. Raise max_prepared_transactions",
    ):
        await slots.take(B, asyncio.get_running_loop().time())
    slots.give(A)
    assert names(slots) == []


@pytest.mark.parametrize("served_first", [False, True])
async def test_a_cancelled_wait_loses_no_slot(served_first: bool) -> None:
    slots = Slots(2)
    await slots.take(A, FOR_EVER)
    gone, next_one = queued(slots, B), queued(slots, C)
    await settle()
    if served_first:
        slots.give(A)
        assert names(slots) == [B]
    gone.cancel()
    slots.give(A)
    await next_one
    assert gone.cancelled() and names(slots) == [C]


async def test_a_share_that_grew_serves_who_waits_before_who_comes() -> None:
    members = 4
    slots = Slots(8, lambda: members)
    await slots.take(A, FOR_EVER)
    waiting = queued(slots, B)
    await settle()
    members = 2  # a share of three
    assert slots.try_take(C)
    await waiting
    assert names(slots) == [A, B, C] and not slots.try_take(D)


async def test_a_share_that_shrank_is_respected_as_slots_come_back() -> None:
    members = 1
    slots = Slots(4, lambda: members)
    for branch in (A, B, C):
        assert slots.try_take(branch)
    members = 2  # a share of one
    for branch in (A, B):
        slots.give(branch)
        assert not slots.try_take(D)
    slots.give(C)
    assert slots.try_take(D)
