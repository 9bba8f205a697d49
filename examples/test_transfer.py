"""How a service like `transfer.py` tests itself: `pytest examples`, explained in docs/testing.md.

The databases of ACCOUNTS_URL and LEDGER_URL are used, which must be empty; without them two servers
are started, as by the example itself.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest
from transfer import Bank, create_tables, make_bank, tables

from coordinator import OutcomeUnknown, TransactionAborted
from coordinator.testing import (
    assert_atomic,
    crash_at,
    lose_answer,
    refuse,
    rolled_back,
    unreachable,
)
from participants.postgres.embedded import EmbeddedServer

BEFORE = [("alice", 100)], []
AFTER = [("alice", 70)], [("bob", 30)]


@pytest.fixture(scope="session")
def urls() -> Iterator[tuple[str, str]]:
    if "ACCOUNTS_URL" in os.environ:
        yield os.environ["ACCOUNTS_URL"], os.environ["LEDGER_URL"]
        return
    with EmbeddedServer() as first, EmbeddedServer() as second:
        yield first.url(), second.url()


@pytest.fixture
async def bank(urls: tuple[str, str]) -> AsyncIterator[Bank]:
    """The service with tables as new, on a log in memory; at the end nothing is left of either."""
    bank = make_bank(f"memory:{secrets.token_hex(8)}", *urls)
    async with bank.coordinator:
        await create_tables(bank)
    yield bank
    await assert_atomic(bank.coordinator)
    async with bank.coordinator, bank.coordinator.transaction():
        await (await bank.accounts.connection()).execute("DROP TABLE account")
        await (await bank.ledger.connection()).execute("DROP TABLE entry")


async def test_a_transfer_is_in_both_databases(bank: Bank) -> None:
    async with bank.coordinator:
        await bank.transfer("alice", "bob", 30)
        assert await tables(bank) == AFTER


async def test_what_the_statements_do_without_keeping_it(bank: Bank) -> None:
    async with bank.coordinator:
        async with rolled_back(bank.coordinator):
            await bank.transfer("alice", "bob", 30)
            assert await tables(bank) == AFTER
        assert await tables(bank) == BEFORE


async def test_a_ledger_that_refuses_leaves_the_account_as_it_was(bank: Bank) -> None:
    async with bank.coordinator:
        with refuse(bank.ledger, "the disk is full"), pytest.raises(TransactionAborted):
            await bank.transfer("alice", "bob", 30)
        assert await tables(bank) == BEFORE


async def test_a_lost_answer_does_not_move_money_twice(bank: Bank) -> None:
    async with bank.coordinator:
        with lose_answer(bank.ledger, "commit", times=2):
            await bank.transfer("alice", "bob", 30)
        assert await tables(bank) == AFTER


@pytest.mark.parametrize(
    ("point", "end"),
    [("prepare:after", BEFORE), ("decide:before", BEFORE), ("decide:after", AFTER)],
)
async def test_after_a_crash_the_transfer_has_happened_or_not(
    bank: Bank, point: str, end: object
) -> None:
    async with bank.coordinator, crash_at(bank.coordinator, point):
        await bank.transfer("alice", "bob", 30)
    await assert_atomic(bank.coordinator)  # opens it again, as a restart would
    async with bank.coordinator:
        assert await tables(bank) == end


async def test_an_unknown_outcome_can_be_asked_for_later(bank: Bank) -> None:
    async with bank.coordinator:
        with unreachable(bank.coordinator), pytest.raises(OutcomeUnknown) as raised:
            async with bank.coordinator.transaction(timeout=0.5):
                await bank.transfer("alice", "bob", 30)
        await assert_atomic(bank.coordinator)
        status = await bank.coordinator.status(raised.value.transaction_id)
        assert await tables(bank) == (AFTER if status == "committed" else BEFORE)
