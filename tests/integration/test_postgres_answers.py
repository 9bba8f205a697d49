"""What a branch is asked before its vote, and what its name and token say.

The reply table itself is in `test_reply_table.py`.
"""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from coordinator.errors import ConfigurationError
from coordinator.model import FINISHED, Branch, Verdict, VoteKind
from coordinator.participant import Binding
from participants.conformance import binding
from participants.postgres import PostgreSQL
from participants.postgres.embedded import EmbeddedServer
from participants.postgres.replies import (
    is_replication_warning,
    is_retryable,
)
from participants.postgres.statements import Token
from tests.support.branches import BALANCE, UPDATE, vote_after, working
from tests.support.postgres import gids, new_database, query

PREPARED = VoteKind.PREPARED
ABORTED = VoteKind.ABORTED


def test_which_errors_are_worth_another_run() -> None:
    assert all(map(is_retryable, ("40001", "40P01", "53200", "55P03", "08006", "57P01")))
    assert not any(map(is_retryable, ("23505", "42P01", "0A000", "25P02", "")))


def test_a_users_own_warning_is_no_replication_warning() -> None:
    assert is_replication_warning("01000", "SyncRepWaitForLSN")
    assert not is_replication_warning("01000", "exec_stmt_raise")
    assert not is_replication_warning("25001", "SyncRepWaitForLSN")


async def test_the_token_names_the_transaction_the_cluster_and_its_timeline(
    accounts: PostgreSQL, database: str
) -> None:
    branch, vote = await vote_after(accounts, UPDATE)
    ((xid, system),) = query(
        database,
        "SELECT transaction::text::int, system_identifier FROM pg_prepared_xacts, "
        f"pg_control_system() WHERE gid = '{branch.xid}'",
    )
    assert Token.decode(vote.token) == Token(int(str(xid)), int(str(system)), 1)
    assert len(vote.token) <= 20
    await accounts.rollback(branch)


async def test_swallowed_error_votes_no_and_says_which(accounts: PostgreSQL, database: str) -> None:
    async with working(accounts) as (transaction, connection):
        await connection.execute(UPDATE.encode())
        with pytest.raises(psycopg.errors.CheckViolation):
            await connection.execute("UPDATE account SET balance = -1")
    vote = await accounts.prepare(transaction.branch.xid)
    assert vote.kind is ABORTED and not vote.retryable
    assert "swallowed" in vote.reason and "account_balance_check" in vote.reason
    assert gids(database) == [] and query(database, BALANCE) == [(100,)]


async def test_error_in_a_savepoint_is_forgiven(accounts: PostgreSQL, database: str) -> None:
    async with working(accounts) as (transaction, connection):
        await connection.execute(UPDATE.encode())
        with pytest.raises(psycopg.errors.CheckViolation):
            async with connection.transaction():
                await connection.execute("UPDATE account SET balance = -1")
    vote = await accounts.prepare(transaction.branch.xid)
    assert vote.kind is PREPARED
    await accounts.commit(Branch(transaction.branch.xid, "accounts", vote.token))
    assert query(database, BALANCE) == [(99,)]


@pytest.mark.parametrize(
    "raw", ["COMMIT", "ROLLBACK", "COMMIT; BEGIN", "COMMIT AND CHAIN", "ROLLBACK; BEGIN"]
)
async def test_raw_commit_votes_no(accounts: PostgreSQL, database: str, raw: str) -> None:
    _, vote = await vote_after(
        accounts, UPDATE, raw, "UPDATE account SET balance = balance - 5 WHERE id = 'bob'"
    )
    assert vote.kind is ABORTED and "sent as text" in vote.reason
    assert gids(database) == []


async def test_raw_commit_votes_no_in_one_phase_too(accounts: PostgreSQL, database: str) -> None:
    async with working(accounts) as (transaction, connection):
        await connection.execute("COMMIT")
        await connection.execute("BEGIN")
        await connection.execute(UPDATE.encode())
    verdict, reason, _ = await accounts.commit_one_phase(transaction.branch)
    assert verdict is Verdict.ABORT and "sent as text" in reason
    assert query(database, BALANCE) == [(100,)]


async def test_a_serializable_reader_is_prepared_since_its_reads_can_fail(
    accounts: PostgreSQL, database: str
) -> None:
    branch, vote = await vote_after(
        accounts, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE READ ONLY", "SELECT * FROM account"
    )
    assert vote.kind is PREPARED and gids(database) == [str(branch.xid)]
    assert await accounts.commit(branch) == FINISHED
    assert gids(database) == []


async def test_read_only_keeps_its_notification_until_the_decision(
    accounts: PostgreSQL, database: str
) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as listener:
        await listener.execute("LISTEN news")
        rolled_back, vote = await vote_after(accounts, "SELECT pg_notify('news', 'never')")
        assert vote.kind is VoteKind.READ_ONLY
        await accounts.rollback(rolled_back)
        branch, vote = await vote_after(accounts, "SELECT pg_notify('news', 'now')")
        assert vote.kind is VoteKind.READ_ONLY
        await listener.execute("SELECT 1")
        assert [each async for each in listener.notifies(timeout=0)] == []
        assert await accounts.commit(branch) == FINISHED
        heard = [each.payload async for each in listener.notifies(timeout=5, stop_after=1)]
        assert heard == ["now"]


async def test_another_cluster_is_refused(accounts: PostgreSQL, second_database: str) -> None:
    branch, _ = await vote_after(accounts, UPDATE)
    opened = accounts._open
    assert opened is not None
    elsewhere = PostgreSQL("accounts", second_database)
    await elsewhere.open(opened.binding)
    try:
        for end in (elsewhere.commit, elsewhere.rollback):
            with pytest.raises(ConfigurationError, match="another PostgreSQL cluster"):
                await end(branch)
    finally:
        await elsewhere.close()
    assert await accounts.commit(branch) == FINISHED


async def test_six_sessions_finish_one_branch_and_one_succeeds(
    accounts: PostgreSQL, database: str
) -> None:
    branch, _ = await vote_after(accounts, UPDATE)

    async def attempt() -> str:
        session = await psycopg.AsyncConnection.connect(database, autocommit=True)
        async with session:
            barrier.release()
            await go.wait()
            try:
                await session.execute(f"COMMIT PREPARED '{branch.xid}'".encode())
            except psycopg.Error as error:
                return str(error.sqlstate)
            return "done"

    go, barrier = asyncio.Event(), asyncio.Semaphore(0)
    tasks = [asyncio.create_task(attempt()) for _ in range(6)]
    for _ in tasks:
        await barrier.acquire()
    go.set()
    answers = await asyncio.gather(*tasks)
    assert answers.count("done") == 1
    assert set(answers) <= {"done", "42704", "55000"}
    assert await accounts.commit(branch) == FINISHED
    assert query(database, BALANCE) == [(99,)]


async def test_recover_lists_only_the_branches_of_our_log_and_database(
    accounts: PostgreSQL, database: str
) -> None:
    branch, _ = await vote_after(accounts, UPDATE)
    query(database, "BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION 'somebody else'")
    other = PostgreSQL("accounts", database)
    await other.open(Binding(branch.xid.log, branch.xid.member, "same log"))
    try:
        assert list(await other.recover()) == [Branch(branch.xid, "accounts")]
    finally:
        await other.close()
    query(database, "ROLLBACK PREPARED 'somebody else'")
    assert await accounts.rollback(branch) == FINISHED
    assert list(await accounts.recover()) == []


async def test_synchronous_commit_is_on_whatever_the_role_says(
    postgres_server: EmbeddedServer,
) -> None:
    database = new_database(postgres_server)
    name = database.rpartition("/")[2]
    query(database, f"ALTER ROLE postgres IN DATABASE {name} SET synchronous_commit = off")
    participant = PostgreSQL("other", database)
    await participant.open(binding())
    try:
        async with working(participant) as (transaction, connection):
            cursor = await connection.execute("SHOW synchronous_commit")
            assert await cursor.fetchone() == ("on",)
        await participant.rollback(transaction.branch)
    finally:
        await participant.close()
