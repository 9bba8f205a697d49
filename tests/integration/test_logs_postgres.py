"""The story of transactions on real PostgreSQL servers, told from log records alone.

Nothing that a statement, its result or its error holds is ever among them, at any level.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from coordinator import TransactionAborted
from coordinator.model import BranchId, LogId, MemberId, TransactionId, VoteKind, Xid
from coordinator.testing import assert_atomic, crash_at
from coordinator.testing import coordinator as make_coordinator
from participants.postgres import PostgreSQL, votes
from participants.postgres.embedded import EmbeddedServer
from participants.postgres.replies import Reply
from tests.support.postgres import gids, query
from tests.support.proxy import Fault, Proxy
from tests.support.told import Records, recording

CANARY = "canary-4711"
TAKE = "UPDATE account SET balance = balance - 1 WHERE id = 'alice'"
NOTE = "INSERT INTO entry (note) VALUES (%s)"


def password(url: str) -> str:
    found = urlsplit(url).password
    assert found, "these servers are to ask for a password"
    return found


class Bank:
    def __init__(self, database: str, second: str) -> None:
        self.accounts = PostgreSQL("accounts", database, pool_size=3)
        self.ledger = PostgreSQL("ledger", second, pool_size=3)
        self.coordinator = make_coordinator(self.accounts, self.ledger)
        self.id = ""

    async def transfer(self, *notes: str, timeout: float = 20) -> None:
        async with self.coordinator.transaction(timeout=timeout) as transaction:
            self.id = transaction.id
            await (await self.accounts.connection()).execute(TAKE.encode())
            connection = await self.ledger.connection()
            for note in notes:
                await connection.execute(NOTE, (note,))


@pytest.fixture
def records(database: str, second_database: str) -> Iterator[Records]:
    with recording() as records:
        yield records
    for secret in (CANARY, password(database), password(second_database)):
        assert secret not in records.texts()


@pytest.fixture
async def bank(database: str, second_database: str, records: Records) -> AsyncIterator[Bank]:
    bank = Bank(database, second_database)
    yield bank
    await bank.coordinator.close()


async def test_a_commit_and_an_abort_by_a_deferred_constraint(
    bank: Bank, second_database: str, records: Records
) -> None:
    async with bank.coordinator:
        await bank.transfer(CANARY)
        told = records.told(bank.id)
        assert told.took_part == {"accounts", "ledger"}
        assert told.votes == {"accounts": "prepared", "ledger": "prepared"}
        assert (told.decided, told.heard) == ([("commit", True)], ("committed", None))
        assert told.ended == {"accounts": "finished", "ledger": "finished"}

        with pytest.raises(TransactionAborted, match=CANARY):
            await bank.transfer(CANARY)
    assert query(second_database, "SELECT count(*) FROM entry") == [(1,)]
    told = records.told(bank.id)
    assert told.votes["ledger"] == "aborted" and told.heard == ("aborted", "TransactionAborted")
    assert (told.decided, told.outcome) == ([], "aborted")
    refused = records.one("refused", bank.id)
    assert (refused.participant, refused.reason) == ("ledger", "SQLSTATE 23505")


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("SELECT %s::int", "InvalidTextRepresentation (SQLSTATE 22P02)"),
        (f"DO $$BEGIN RAISE EXCEPTION '{CANARY}'; END$$", "RaiseException (SQLSTATE P0001)"),
    ],
)
@pytest.mark.parametrize("swallowed", [True, False])
async def test_a_statement_that_fails(
    statement: Any, kind: str, swallowed: bool, bank: Bank, records: Records
) -> None:
    parameters = (CANARY,) if "%s" in statement else None
    async with bank.coordinator:
        with pytest.raises((TransactionAborted, psycopg.Error), match=CANARY):
            async with bank.coordinator.transaction(timeout=20):
                connection = await bank.ledger.connection()
                try:
                    await connection.execute(statement, parameters)
                except psycopg.Error:
                    if not swallowed:
                        raise
    (name,) = records.transactions()
    assert records.one("statement-failed", name).error == kind
    error = "TransactionAborted" if swallowed else kind
    assert records.told(name).heard == ("aborted", error)
    if swallowed:
        assert records.one("refused", name).reason.startswith("a statement failed")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"COMMIT", votes.RAW_COMMIT),
        (b"COMMIT; BEGIN; INSERT INTO entry (note) VALUES ('more')", votes.RAW_COMMIT),
        (b"SELECT 1 / 0", votes.FAILED),
    ],
)
async def test_a_branch_that_cannot_prepare(
    text: bytes, reason: str, bank: Bank, records: Records
) -> None:
    async with bank.coordinator:
        with pytest.raises(TransactionAborted):
            async with bank.coordinator.transaction(timeout=20) as transaction:
                bank.id = transaction.id
                await (await bank.accounts.connection()).execute(TAKE.encode())
                with suppress(psycopg.Error):
                    await (await bank.ledger.connection()).execute(text)
    refused = records.one("refused", bank.id)
    assert (refused.participant, refused.reason) == ("ledger", reason)
    assert records.told(bank.id).votes["ledger"] == "aborted"


async def test_a_database_that_cannot_be_reached(
    bank: Bank, postgres_servers: tuple[EmbeddedServer, EmbeddedServer], records: Records
) -> None:
    async with Proxy(postgres_servers[1].port) as proxy:
        url = proxy.url(postgres_servers[1].url("trial"))
        bank.ledger = PostgreSQL("ledger", url, pool_size=1)
        bank.coordinator = make_coordinator(bank.accounts, bank.ledger)
        await bank.coordinator.open(sweep=False)
    with pytest.raises(TransactionAborted, match="cannot be reached"):
        await bank.transfer("x")
    assert records.told(bank.id).heard == ("aborted", "TransactionAborted")
    unreachable = records.one("unreachable", bank.id)
    assert unreachable.participant == "ledger" and f"127.0.0.1:{proxy.port}" in unreachable.reason


async def test_lost_answers_of_prepare_and_commit(
    bank: Bank, postgres_servers: tuple[EmbeddedServer, EmbeddedServer], records: Records
) -> None:
    direct = postgres_servers[1].url("trial")
    async with Proxy(postgres_servers[1].port) as proxy:
        bank.ledger = PostgreSQL("ledger", proxy.url(direct), pool_size=3)
        bank.coordinator = make_coordinator(bank.accounts, bank.ledger)
        async with bank.coordinator:
            proxy.on(b"COMMIT PREPARED", Fault.LOSE_ANSWER)
            await bank.transfer(CANARY)
            committed = records.told(bank.id)
            assert committed.decided == [("commit", True)]
            assert committed.ended == {"accounts": "finished", "ledger": "finished"}

            proxy.on(b"PREPARE TRANSACTION", Fault.LOSE_ANSWER)
            with pytest.raises(TransactionAborted):
                await bank.transfer("another")
            await assert_atomic(bank.coordinator)
            silent = records.one("no-answer", bank.id)
            assert (silent.participant, silent.error) == ("ledger", "DatabaseUnavailable")
            aborted = records.told(bank.id)
            assert aborted.votes == {"accounts": "prepared", "ledger": "aborted"}
            assert aborted.ended == {"accounts": "finished", "ledger": "finished"}
    assert query(direct, "SELECT note FROM entry") == [(CANARY,)]


async def test_a_commit_in_one_phase_whose_answer_was_lost(
    bank: Bank, postgres_servers: tuple[EmbeddedServer, EmbeddedServer], records: Records
) -> None:
    async with Proxy(postgres_servers[0].port) as proxy:
        accounts = PostgreSQL("accounts", proxy.url(postgres_servers[0].url("trial")), pool_size=1)
        bank.coordinator = make_coordinator(accounts)
        await bank.coordinator.open(sweep=False)
        proxy.on(b"COMMIT", Fault.LOSE_ANSWER)

        async def take() -> None:
            async with bank.coordinator.transaction(timeout=20):
                await (await accounts.connection()).execute(TAKE.encode())
                proxy._server_port = 1  # nobody is there for who comes next

        taking = asyncio.create_task(take())
        while "retry" not in {vars(each)["what"] for each in records.all}:
            await asyncio.sleep(0.005)
        proxy._server_port = postgres_servers[0].port
        await taking
        await bank.coordinator.close()
    (name,) = records.transactions()
    first = next(each for each in records.of(name) if each.what == "retry")
    assert (first.participant, first.attempt, first.levelname) == ("accounts", 1, "WARNING")
    assert records.one("answered", name).verdict == "commit"
    assert records.told(name).heard == ("committed", None)


async def test_a_recovery_and_a_heuristic_outcome(
    bank: Bank, second_database: str, records: Records
) -> None:
    await bank.coordinator.open(sweep=False)
    async with crash_at(bank.coordinator, "commit:before"):
        await bank.transfer(CANARY)
    (gid,) = gids(second_database)
    query(second_database, f"ROLLBACK PREPARED '{gid}'")
    records.all.clear()
    await bank.coordinator.open(sweep=False)
    await bank.coordinator.recover()
    told = records.told(bank.id)
    assert records.one("seen", bank.id).participants == ["accounts"]
    assert told.decided == [("commit", False)]
    assert told.ended == {"accounts": "finished", "ledger": "heuristic rollback"}
    heuristic = records.one("heuristic", bank.id)
    assert heuristic.levelname == "ERROR" and "pg_xact_status" in heuristic.evidence
    assert records.one("recovered", bank.id).outcome == "committed"


async def test_a_deadline_that_cuts_the_connection_of_a_thread(
    bank: Bank, records: Records
) -> None:
    def sleep() -> None:
        with bank.coordinator.blocking.transaction(timeout=0.3):
            bank.accounts.blocking.connection().execute(b"SELECT pg_sleep(30)")

    async with bank.coordinator:
        with pytest.raises(TransactionAborted, match="deadline"):
            await asyncio.to_thread(sleep)
    (name,) = records.transactions()
    lost = records.one("connection-lost", name)
    assert lost.participant == "accounts" and lost.branch == records.one("enlisted").branch
    assert "a statement was still running" in lost.reason
    outcome, error = records.told(name).heard or ("", None)
    assert outcome == "aborted" and str(error).startswith("TransactionAborted")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("PREPARE TRANSACTION", replication_unconfirmed=True), "no synchronous standby"),
        (Reply("ROLLBACK"), "had rolled the transaction back already"),
        (Reply(sqlstate="23505", message=CANARY), "SQLSTATE 23505"),
    ],
)
def test_why_a_branch_cannot_commit(reply: Reply, reason: str) -> None:
    transaction = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")
    xid = Xid(LogId("c" * 16), MemberId("d" * 16), transaction, BranchId("a" * 16))
    with recording() as records:
        assert votes.no("accounts", xid, reply).kind is VoteKind.ABORTED
    assert reason in records.one("refused", transaction).reason
    assert CANARY not in records.texts()
