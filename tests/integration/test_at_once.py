"""The vote in one exchange: which branches are asked so, and that they answer as ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, Connection
from sqlalchemy import text

from coordinator.errors import TransactionAborted
from coordinator.model import FINISHED, Branch, VoteKind
from participants.conformance import binding
from participants.postgres import PostgreSQL
from participants.postgres.leased import Leased
from participants.postgres.slots import Slots
from tests.integration.test_check_pooler import pooled
from tests.support.bank import BALANCES, GIVE, TAKE, Bank, blocking_bank, wait_until
from tests.support.branches import UPDATE, end_the_wait, missing_standby, until, work, working
from tests.support.postgres import gids, query
from tests.support.prompt import (
    IN_TIME,
    answer_to,
    assert_at_rest,
    other_role,
    vote_at_once,
    watched,
)

NOTHING = "UPDATE account SET balance = 1 WHERE id = 'nobody'"
EXTRA = f"""
{IN_TIME} DROP SCHEMA IF EXISTS extra CASCADE;
CREATE SCHEMA extra;
CREATE FUNCTION extra.write() RETURNS void LANGUAGE sql AS
    $$ UPDATE account SET balance = 1 WHERE id = 'bob' $$;
CREATE VIEW extra.shelf AS SELECT 1 AS n;
CREATE FUNCTION extra.ignore() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
CREATE TRIGGER ignore INSTEAD OF INSERT ON extra.shelf
    FOR EACH ROW EXECUTE FUNCTION extra.ignore();
"""


@pytest.fixture
def extra(database: str) -> Iterator[str]:
    """The database, with a function that writes and a view that swallows writes."""
    query(database, EXTRA)
    yield database
    query(database, f"{IN_TIME} DROP SCHEMA extra CASCADE")


@pytest.fixture
def bank(database: str, second_database: str) -> Bank:
    return Bank((database, second_database))


def _pid(participant: PostgreSQL) -> list[int]:
    assert participant._open is not None
    return [each.pgconn.backend_pid for each in participant._open.pool._idle]


# Which branches.


@pytest.mark.parametrize(
    ("statements", "goes", "kind"),
    [
        ([UPDATE], True, VoteKind.PREPARED),
        (["DELETE FROM account WHERE id = 'bob'", "SELECT 1"], True, VoteKind.PREPARED),
        (["INSERT INTO entry DEFAULT VALUES", NOTHING], True, VoteKind.PREPARED),
        (["SAVEPOINT a", UPDATE, "ROLLBACK TO SAVEPOINT a"], True, VoteKind.PREPARED),
        (["INSERT INTO extra.shelf VALUES (2)"], True, VoteKind.PREPARED),
        ([NOTHING], False, VoteKind.READ_ONLY),
        (["SELECT * FROM account FOR SHARE"], False, VoteKind.PREPARED),
        (["SELECT extra.write()"], False, VoteKind.PREPARED),
        (["CREATE TABLE extra.fresh (n int)"], False, VoteKind.PREPARED),
    ],
)
async def test_a_branch_that_has_changed_rows(
    accounts: PostgreSQL, extra: str, statements: list[str], goes: bool, kind: VoteKind
) -> None:
    branch = await work(accounts, *statements)
    vote = await vote_at_once(accounts, branch)
    assert (vote is not None) == goes
    vote = vote or await accounts.prepare(branch.xid)
    assert vote.kind is kind, vote
    assert gids(extra) == ([str(branch.xid)] if kind is VoteKind.PREPARED else [])
    branch = Branch(branch.xid, "accounts", vote.token)
    send = accounts.commit_at_once(branch)
    assert (send is not None) == (kind is VoteKind.PREPARED)
    assert (await accounts.commit(branch) if send is None else await answer_to(send)) == FINISHED
    assert gids(extra) == []
    assert_at_rest(accounts)


async def _copy(connection: AsyncConnection[Any]) -> None:
    async with connection.cursor().copy("COPY entry (note) FROM STDIN") as copy:
        await copy.write("a\nb\n")


async def _pipeline(connection: AsyncConnection[Any]) -> None:
    async with connection.pipeline():
        await connection.execute(UPDATE.encode())
        await connection.execute("SELECT 1")
    await connection.execute(UPDATE.encode())


async def _on_the_server(connection: AsyncConnection[Any]) -> None:
    async with connection.cursor("named") as cursor:
        await cursor.execute("SELECT * FROM account")
        await cursor.fetchall()


async def _many(connection: AsyncConnection[Any]) -> None:
    await connection.cursor().executemany("UPDATE account SET balance = %s", [(1,), (2,)])


WRITES: dict[str, tuple[bool, Callable[[AsyncConnection[Any]], Awaitable[None]]]] = {
    "copy": (False, _copy),
    "pipeline": (True, _pipeline),
    "cursor on the server": (False, _on_the_server),
    "executemany": (True, _many),
}


@pytest.mark.parametrize("how", WRITES)
async def test_every_way_to_write(bank: Bank, how: str) -> None:
    goes, write = WRITES[how]
    async with bank.coordinator:
        with watched(bank.accounts) as went:
            async with bank.coordinator.transaction():
                connection = await bank.accounts.connection()
                await write(connection)
                assert isinstance(connection, Leased) and connection.has_written == goes
                await (await bank.ledger.connection()).execute(GIVE)
    assert went == [goes] and bank.nothing_is_prepared()


def _copy_blocking(connection: Connection[Any]) -> None:
    with connection.cursor().copy("COPY entry (note) FROM STDIN") as copy:
        copy.write("a\nb\n")


def _pipeline_blocking(connection: Connection[Any]) -> None:
    with connection.pipeline():
        connection.execute(UPDATE.encode())
        connection.execute("SELECT 1")
    connection.execute(UPDATE.encode())


def _on_the_server_blocking(connection: Connection[Any]) -> None:
    with connection.cursor("named") as cursor:
        cursor.execute("SELECT * FROM account").fetchall()


def _many_blocking(connection: Connection[Any]) -> None:
    connection.cursor().executemany("UPDATE account SET balance = %s", [(1,), (2,)])


def test_every_way_to_write_in_a_thread(database: str, second_database: str) -> None:
    ways = (
        (False, _copy_blocking),
        (True, _pipeline_blocking),
        (False, _on_the_server_blocking),
        (True, _many_blocking),
    )
    with blocking_bank((database, second_database)) as bank:
        for goes, write in ways:
            with watched(bank.accounts) as went, bank.coordinator.blocking.transaction():
                connection = bank.accounts.blocking.connection()
                write(connection)
                assert isinstance(connection, Leased) and connection.has_written == goes, write
                bank.ledger.blocking.connection().execute(GIVE)
            assert went == [goes], write
        with watched(bank.accounts) as went, bank.coordinator.blocking.transaction():
            bank.accounts.blocking.session().execute(text(TAKE))
            bank.ledger.blocking.connection().execute(GIVE)
        assert went == [True]
        wait_until(bank.nothing_is_prepared)


async def test_a_session_of_sqlalchemy(bank: Bank) -> None:
    async with bank.coordinator:
        with watched(bank.accounts) as went:
            async with bank.coordinator.transaction():
                await (await bank.accounts.session()).execute(text(TAKE))
                await (await bank.ledger.session()).execute(text(GIVE))
        assert went == [True] and bank.balances() == (99, 101)


async def test_a_reader_beside_a_writer(bank: Bank) -> None:
    """The reader is asked as ever, and its session ends with the decision."""
    async with bank.coordinator:
        with watched(bank.accounts) as writer, watched(bank.ledger) as reader:
            async with bank.coordinator.transaction():
                await (await bank.accounts.connection()).execute(TAKE)
                await (await bank.ledger.connection()).execute(BALANCES)
        assert (writer, reader) == ([True], [False])
        assert bank.balances() == (99, 100) and bank.nothing_is_prepared()
        assert_at_rest(bank.ledger)


async def test_without_a_free_slot_it_waits_for_one(accounts: PostgreSQL, database: str) -> None:
    assert accounts._open is not None
    accounts._open.slots = Slots(2)  # one is the reserve, one is ours
    first, second = await work(accounts, UPDATE), await work(accounts, "DELETE FROM entry", GIVE)
    vote = await vote_at_once(accounts, first)
    assert vote is not None and vote.kind is VoteKind.PREPARED
    assert await vote_at_once(accounts, second) is None
    waiting = asyncio.create_task(accounts.prepare(second.xid))
    await accounts.rollback(Branch(first.xid, "accounts", vote.token))
    assert (await waiting).kind is VoteKind.PREPARED
    assert gids(database) == [str(second.xid)]
    await accounts.rollback(second)
    assert_at_rest(accounts)


async def is_asked_first_at(url: str) -> None:
    """What is prepared there is examined first, and never goes at once."""
    participant = PostgreSQL("accounts", url, pool_size=1)
    await participant.open(binding())
    try:
        branch = await work(participant, UPDATE)
        assert await vote_at_once(participant, branch) is None
        assert (await participant.prepare(branch.xid)).kind is VoteKind.PREPARED
        assert await participant.rollback(branch) == FINISHED
    finally:
        await participant.close()


async def test_behind_a_pooler_never(database: str) -> None:
    """Its sessions are not ours to end: the process that we know serves others by then."""
    async with pooled(database, "session") as url:
        await is_asked_first_at(url)
    assert gids(database) == []


async def test_where_no_role_may_see_when_a_session_began_never(database: str) -> None:
    """Nobody could tell then whether the session that was to prepare has gone."""
    with other_role(database) as url:
        query(database, "ALTER ROLE app SET role = 'tenant'")
        await is_asked_first_at(url)


async def test_a_commit_goes_to_no_other_cluster(
    accounts: PostgreSQL, second_database: str
) -> None:
    branch = await work(accounts, UPDATE)
    vote = await vote_at_once(accounts, branch)
    assert accounts._open is not None and vote is not None
    elsewhere = PostgreSQL("accounts", second_database)
    await elsewhere.open(accounts._open.binding)
    try:
        assert elsewhere.commit_at_once(Branch(branch.xid, "accounts", vote.token)) is None
    finally:
        await elsewhere.close()
    assert await accounts.rollback(Branch(branch.xid, "accounts", vote.token)) == FINISHED


# What they answer.


@pytest.mark.parametrize("statement", ["COMMIT; BEGIN", "COMMIT AND CHAIN", "ROLLBACK AND CHAIN"])
async def test_a_raw_end_is_seen_when_the_branch_is_prepared(
    accounts: PostgreSQL, database: str, statement: str
) -> None:
    branch = await work(accounts, UPDATE, statement, UPDATE)
    vote = await vote_at_once(accounts, branch)
    assert vote is not None and vote.kind is VoteKind.ABORTED and "sent as text" in vote.reason
    assert await accounts.rollback(branch) == FINISHED
    assert gids(database) == []
    before = 100 if statement.startswith("ROLLBACK") else 99
    assert query(database, BALANCES)[0] == (before,)
    assert_at_rest(accounts)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("INSERT INTO entry (note) VALUES ('same'), ('same')", "duplicate key"),
        ("SELECT pg_notify('news', 'x')", "NOTIFY"),
        ("CREATE TEMPORARY TABLE scratch (n int)", "temporary"),
    ],
)
async def test_a_no_has_its_reason_and_costs_no_connection(
    accounts: PostgreSQL, database: str, statement: str, reason: str
) -> None:
    before = _pid(accounts)
    branch = await work(accounts, UPDATE, statement)
    vote = await vote_at_once(accounts, branch)
    assert vote is not None and vote.kind is VoteKind.ABORTED and reason in vote.reason, vote
    assert gids(database) == [] and _pid(accounts) == before
    assert await accounts.rollback(branch) == FINISHED
    assert_at_rest(accounts)
    branch = await work(accounts, UPDATE)
    assert await vote_at_once(accounts, branch)
    assert await accounts.rollback(branch) == FINISHED


async def test_a_swallowed_error_is_told_by_the_waiting_way(accounts: PostgreSQL) -> None:
    branch = await _with_error(accounts)
    assert await vote_at_once(accounts, branch) is None
    vote = await accounts.prepare(branch.xid)
    assert vote.kind is VoteKind.ABORTED and "division by zero" in vote.reason


async def _with_error(accounts: PostgreSQL) -> Branch:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await work(accounts, UPDATE, "SELECT 1 / 0")
    assert accounts._open is not None
    (running,) = accounts._open.by_branch.values()
    return Branch(running.xid, "accounts")


async def test_a_branch_that_was_condemned_is_told_by_the_waiting_way(
    accounts: PostgreSQL, database: str
) -> None:
    """The server would prepare it."""
    async with working(accounts) as (transaction, connection):
        await connection.execute(UPDATE.encode())
        assert isinstance(connection, Leased)
        connection.condemn("half of it was forgotten")
    assert await vote_at_once(accounts, transaction.branch) is None
    vote = await accounts.prepare(transaction.branch.xid)
    assert vote.kind is VoteKind.ABORTED and vote.reason == "half of it was forgotten"
    assert gids(database) == []


@pytest.mark.parametrize("how", ["SET", "SET LOCAL"])
async def test_it_is_prepared_on_the_standby_whatever_the_user_has_set(
    accounts: PostgreSQL, database: str, how: str
) -> None:
    branch = await work(accounts, f"{how} synchronous_commit = local", UPDATE)
    async with missing_standby(database):
        voting = asyncio.create_task(vote_at_once(accounts, branch))
        await end_the_wait(database)
        vote = await voting
        assert vote is not None and vote.kind is VoteKind.ABORTED and "standby" in vote.reason
        assert gids(database) == [str(branch.xid)]  # here, and nowhere else
        assert accounts._open is not None
        assert isinstance(accounts._open.in_doubt[branch.id], int)  # its session serves others
    assert await accounts.rollback(branch) == FINISHED
    assert gids(database) == []
    assert_at_rest(accounts)


async def test_a_no_from_one_aborts_what_the_other_has_prepared(bank: Bank) -> None:
    async with bank.coordinator:
        for _ in range(3):
            with pytest.raises(TransactionAborted, match="duplicate key"):
                async with bank.coordinator.transaction():
                    await (await bank.accounts.connection()).execute(TAKE)
                    ledger = await bank.ledger.connection()
                    await ledger.execute("INSERT INTO entry (note) VALUES ('x'), ('x')")
        assert bank.nothing_is_prepared() and bank.balances() == (100, 100)
        await until(lambda: not bank.coordinator.engine().drivers)
        for participant in (bank.accounts, bank.ledger):
            assert_at_rest(participant)
