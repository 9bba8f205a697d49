"""The reply table, row by row, produced by a live server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from coordinator.errors import ConfigurationError
from coordinator.model import FINISHED, Branch, EndingKind, Verdict, Vote, VoteKind
from coordinator.participant import Binding
from participants.conformance import TrialTransaction, binding, trial
from participants.postgres import DatabaseUnavailable, PostgreSQL
from participants.postgres.embedded import EmbeddedServer
from participants.postgres.replies import (
    Meaning,
    Reply,
    is_replication_warning,
    is_retryable,
    read_commit,
    read_finish,
    read_prepare,
)
from participants.postgres.statements import Token
from tests.support.postgres import gids, new_database, query

PREPARED = VoteKind.PREPARED
ABORTED = VoteKind.ABORTED


@asynccontextmanager
async def working(
    participant: PostgreSQL,
) -> AsyncIterator[tuple[TrialTransaction, psycopg.AsyncConnection[Any]]]:
    """A transaction whose connection the block works on."""
    opened = participant._open
    assert opened is not None
    async with trial(opened.binding) as transaction:
        yield transaction, await participant.connection()


async def vote_after(participant: PostgreSQL, *statements: str) -> tuple[Branch, Vote]:
    """Run statements in a transaction and ask for the vote."""
    async with working(participant) as (transaction, connection):
        for statement in statements:
            await connection.execute(statement.encode())
    vote = await participant.prepare(transaction.branch.xid)
    return Branch(transaction.branch.xid, participant.name, vote.token), vote


UPDATE = "UPDATE account SET balance = balance - 1 WHERE id = 'alice'"
BALANCE = "SELECT balance FROM account WHERE id = 'alice'"


@pytest.mark.parametrize(
    ("reply", "meaning"),
    [
        (Reply(tag="PREPARE TRANSACTION"), Meaning.DONE),
        (Reply(tag="PREPARE TRANSACTION", replication_unconfirmed=True), Meaning.NO),
        (Reply(tag="ROLLBACK"), Meaning.NO),
        (Reply(tag="COMMIT"), Meaning.BUG),
        (Reply(sqlstate="42710"), Meaning.BUG),
        (Reply(sqlstate="40001"), Meaning.NO),
        (Reply(sqlstate="53200"), Meaning.NO),
        (Reply(sqlstate="53200", connected=False), Meaning.IN_DOUBT),
        (Reply(sqlstate="57P01"), Meaning.IN_DOUBT),
        (Reply(tag="PREPARE TRANSACTION", connected=False), Meaning.IN_DOUBT),
        (Reply(connected=False), Meaning.IN_DOUBT),
    ],
)
def test_answers_to_prepare(reply: Reply, meaning: Meaning) -> None:
    assert read_prepare(reply) is meaning


@pytest.mark.parametrize(
    ("reply", "meaning"),
    [
        (Reply(tag="COMMIT PREPARED"), Meaning.DONE),
        (Reply(tag="COMMIT PREPARED", replication_unconfirmed=True), Meaning.DONE),
        (Reply(tag="ROLLBACK"), Meaning.BUG),
        (Reply(sqlstate="42704"), Meaning.GONE),
        (Reply(sqlstate="42704", connected=False), Meaning.SOON),
        (Reply(sqlstate="55000"), Meaning.SOON),
        (Reply(sqlstate="57P03"), Meaning.SOON),
        (Reply(sqlstate="58030"), Meaning.SOON),
        (Reply(sqlstate="42501"), Meaning.SLOWLY),
        (Reply(sqlstate="0A000"), Meaning.SLOWLY),
        (Reply(sqlstate="28P01"), Meaning.SLOWLY),
        (Reply(connected=False), Meaning.SOON),
    ],
)
def test_answers_to_finish(reply: Reply, meaning: Meaning) -> None:
    assert read_finish(reply, "COMMIT PREPARED") is meaning


def test_answers_to_commit() -> None:
    assert read_commit(Reply(tag="COMMIT")) is Meaning.DONE
    assert read_commit(Reply(tag="ROLLBACK")) is Meaning.NO
    assert read_commit(Reply(sqlstate="40001")) is Meaning.NO
    assert read_commit(Reply(sqlstate="57P01")) is Meaning.IN_DOUBT
    assert read_commit(Reply(tag="COMMIT", connected=False)) is Meaning.IN_DOUBT


def test_which_errors_are_worth_another_run() -> None:
    assert all(map(is_retryable, ("40001", "40P01", "53200", "55P03", "08006", "57P01")))
    assert not any(map(is_retryable, ("23505", "42P01", "0A000", "25P02", "")))


def test_a_users_own_warning_is_no_replication_warning() -> None:
    assert is_replication_warning("01000", "SyncRepWaitForLSN")
    assert not is_replication_warning("01000", "exec_stmt_raise")
    assert not is_replication_warning("25001", "SyncRepWaitForLSN")


async def test_prepare_and_commit(accounts: PostgreSQL, database: str) -> None:
    branch, vote = await vote_after(accounts, UPDATE)
    assert vote.kind is PREPARED
    assert gids(database) == [str(branch.xid)]
    assert await accounts.commit(branch) == FINISHED
    assert gids(database) == [] and query(database, BALANCE) == [(99,)]


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


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("INSERT INTO entry (note) VALUES ('x'), ('x')", "23505"),
        ("CREATE TEMPORARY TABLE t (n int)", "0A000"),
        ("INSERT INTO entry DEFAULT VALUES; LISTEN news", "0A000"),
        ("INSERT INTO entry DEFAULT VALUES; NOTIFY news", "0A000"),
        (
            "INSERT INTO entry DEFAULT VALUES; DECLARE c CURSOR WITH HOLD FOR SELECT 1",
            "0A000",
        ),
    ],
)
async def test_what_cannot_be_prepared_votes_no_with_the_reason(
    accounts: PostgreSQL, database: str, statement: str, part: str
) -> None:
    branch, vote = await vote_after(accounts, statement)
    assert vote.kind is ABORTED and part in vote.reason and not vote.retryable
    assert gids(database) == []
    assert await accounts.rollback(branch) == FINISHED
    _, again = await vote_after(accounts, UPDATE)  # the session is clean for the next one
    assert again.kind is PREPARED


async def test_serialization_failure_is_retryable(accounts: PostgreSQL, database: str) -> None:
    opened = accounts._open
    assert opened is not None
    serializable = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"
    async with trial(opened.binding) as first:
        one = await accounts.connection()
        await one.execute(serializable.encode())
        await one.execute("SELECT sum(balance) FROM account")
    async with trial(opened.binding) as second:
        other = await accounts.connection()
        await other.execute(serializable.encode())
        await other.execute("SELECT sum(balance) FROM account")
        await other.execute("UPDATE account SET balance = 1 WHERE id = 'bob'")
    await one.execute("UPDATE account SET balance = 1 WHERE id = 'alice'")
    votes = [await accounts.prepare(each.branch.xid) for each in (first, second)]
    no = [vote for vote in votes if vote.kind is ABORTED]
    assert len(no) == 1 and no[0].retryable and "40001" in no[0].reason
    for each in (first, second):
        await accounts.rollback(each.branch)


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


async def test_undefined_object_at_commit_is_looked_up(accounts: PostgreSQL, database: str) -> None:
    branch, _ = await vote_after(accounts, UPDATE)
    query(database, f"COMMIT PREPARED '{branch.xid}'")
    assert await accounts.commit(branch) == FINISHED
    branch, _ = await vote_after(accounts, UPDATE)
    query(database, f"ROLLBACK PREPARED '{branch.xid}'")
    ending = await accounts.commit(branch)
    assert ending.kind is EndingKind.HEURISTIC_ROLLBACK and "aborted" in ending.evidence


async def test_undefined_object_at_rollback_is_looked_up(
    accounts: PostgreSQL, database: str
) -> None:
    branch, _ = await vote_after(accounts, UPDATE)
    query(database, f"COMMIT PREPARED '{branch.xid}'")
    ending = await accounts.rollback(branch)
    assert ending.kind is EndingKind.HEURISTIC_COMMIT and "committed" in ending.evidence


async def test_a_branch_without_a_token_or_with_a_forgotten_number_is_a_hazard(
    accounts: PostgreSQL,
) -> None:
    branch, vote = await vote_after(accounts, UPDATE)
    token = Token.decode(vote.token)
    assert token is not None
    assert await accounts.commit(branch) == FINISHED
    unknown = Token(token.xid8 + 1_000_000, token.system_identifier, token.timeline)
    promoted = Token(token.xid8, token.system_identifier, token.timeline + 1)
    for bad in (b"", unknown.encode(), promoted.encode()):
        ending = await accounts.commit(Branch(branch.xid, "accounts", bad))
        assert ending.kind is EndingKind.HEURISTIC_HAZARD and ending.evidence


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


async def test_another_database_of_the_cluster_is_refused(
    accounts: PostgreSQL, postgres_server: EmbeddedServer
) -> None:
    branch, _ = await vote_after(accounts, UPDATE)
    elsewhere = PostgreSQL("accounts", new_database(postgres_server))
    await elsewhere.open(binding())
    try:
        with pytest.raises(ConfigurationError, match="0A000"):
            await elsewhere.commit(branch)
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


async def test_slots_exhausted_votes_no_and_may_be_retried() -> None:
    with EmbeddedServer(max_prepared_transactions=1) as server:
        participant = PostgreSQL("accounts", new_database(server))
        await participant.open(binding())
        try:
            holder, vote = await vote_after(participant, UPDATE)
            assert vote.kind is PREPARED
            _, vote = await vote_after(participant, "INSERT INTO entry DEFAULT VALUES")
            assert vote.kind is ABORTED and vote.retryable and "53200" in vote.reason
            assert await participant.commit(holder) == FINISHED
            branch, vote = await vote_after(participant, "INSERT INTO entry DEFAULT VALUES")
            assert vote.kind is PREPARED
            assert await participant.rollback(branch) == FINISHED
        finally:
            await participant.close()


async def test_the_wait_for_a_standby_given_up_is_a_no(postgres_server: EmbeddedServer) -> None:
    """With a synchronous standby that does not exist, cancelling the wait yields the warning."""
    url = new_database(postgres_server)
    participant = PostgreSQL("accounts", url)
    await participant.open(binding())
    query(url, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    query(url, "SELECT pg_reload_conf()")
    try:
        async with working(participant) as (transaction, connection):
            await connection.execute("SET LOCAL synchronous_commit = off")
            await connection.execute(UPDATE.encode())
        task = asyncio.create_task(participant.prepare(transaction.branch.xid))
        await cancel_the_wait(url)
        vote = await task
        assert vote.kind is ABORTED and vote.retryable and "standby" in vote.reason
        assert gids(url) == [str(transaction.branch.xid)]  # it stands here, and nowhere else
        ending = asyncio.create_task(participant.rollback(transaction.branch))
        await cancel_the_wait(url)
        assert await ending == FINISHED
    finally:
        query(url, "ALTER SYSTEM RESET synchronous_standby_names")
        query(url, "SELECT pg_reload_conf()")
        await participant.close()
    assert gids(url) == []


async def cancel_the_wait(url: str) -> None:
    """Cancel whoever waits for synchronous replication in the database, once somebody does."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as session:
        async with asyncio.timeout(10):
            while True:
                cursor = await session.execute(
                    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
                    "WHERE wait_event = 'SyncRep' AND datname = current_database()"
                )
                if await cursor.fetchall():
                    return


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


async def test_busy_branch_is_retried(accounts: PostgreSQL, database: str) -> None:
    """While another session finishes it, and waits there for a standby, the answer is 55000."""
    branch, _ = await vote_after(accounts, UPDATE)
    query(database, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    query(database, "SELECT pg_reload_conf()")
    try:
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as session:
            finish = f"COMMIT PREPARED '{branch.xid}'".encode()
            other = asyncio.create_task(session.execute(finish))
            await until_waiting(database)
            with pytest.raises(DatabaseUnavailable, match="55000"):
                await accounts.commit(branch)
            await cancel_the_wait(database)
            await other
    finally:
        query(database, "ALTER SYSTEM RESET synchronous_standby_names")
        query(database, "SELECT pg_reload_conf()")
    assert await accounts.commit(branch) == FINISHED


async def until_waiting(url: str) -> None:
    async with asyncio.timeout(10):
        while not query(
            url,
            "SELECT 1 FROM pg_stat_activity "
            "WHERE wait_event = 'SyncRep' AND datname = current_database()",
        ):
            await asyncio.sleep(0.01)
