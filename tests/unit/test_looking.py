"""What `syncpoint list` gathers where a participant was opened and then does not answer."""

from __future__ import annotations

from coordinator import testing
from coordinator.commands.list_transactions import look
from coordinator.testing import Memory


async def test_a_participant_that_cannot_list_its_branches_is_named() -> None:
    stock, bins = Memory("stock"), Memory("bins")
    async with testing.coordinator(stock, bins) as coordinator:
        assert (await look(coordinator)).unreachable == {}
        with testing.unreachable(stock):
            assert list((await look(coordinator)).unreachable) == ["stock"]
