"""Votes and commits that went at once, and whose answers are late, lost, or never come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace
from psycopg import AsyncConnection

from coordinator.errors import TransactionAborted
from coordinator.model import FINISHED, Branch, VoteKind, Xid
from participants.conformance import binding
from participants.postgres import DatabaseUnavailable, PostgreSQL
from participants.postgres.embedded import EmbeddedServer
from participants.postgres.statements import Greeting
from tests.support.bank import GIVE, TAKE, Bank, running
from tests.support.branches import BALANCE, UPDATE, until, until_ended, work
from tests.support.holding import Holding
from tests.support.postgres import gids, query
from tests.support.prompt import answer_to, assert_at_rest, other_role, vote_at_once
from tests.support.proxy import Fault, Proxy

PREPARE = b"PREPARE TRANSACTION"
# A lock that the transaction asks for when it is prepared, as its deferred trigger does.
SLOW_PREPARE = """
CREATE OR REPLACE FUNCTION wait_at_prepare() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock_shared(5); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER wait_at_prepare AFTER UPDATE ON account
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_at_prepare();
"""
# It ends with the SQLSTATE of a shutdown, on a session that lives on.
FAILING = """
CREATE OR REPLACE FUNCTION pretend() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'planted' USING ERRCODE = '57P01'; END $$;
CREATE CONSTRAINT TRIGGER pretend AFTER UPDATE ON account
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pretend();
"""
TWICE = "INSERT INTO entry (note) VALUES ('x'), ('x')"


@pytest.fixture
async def proxy(postgres_server: EmbeddedServer) -> AsyncIterator[Holding]:
    async with Holding(postgres_server.port) as proxy:
        yield proxy
        proxy.deliver.set()


@pytest.fixture
async def faults(postgres_server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Proxy(postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
async def participant(proxy: Holding, database: str) -> AsyncIterator[PostgreSQL]:
    """It reaches `database` through the proxy that holds requests back."""
    participant = PostgreSQL("accounts", proxy.url(database), pool_size=3)
    await participant.open(binding())
    yield participant
    await participant.close()


@pytest.fixture
async def faulty(faults: Proxy, database: str) -> AsyncIterator[PostgreSQL]:
    participant = PostgreSQL("accounts", faults.url(database), pool_size=3)
    await participant.open(binding())
    yield participant
    await participant.close()


@pytest.fixture
def locked(database: str) -> Callable[[], psycopg.Connection[object]]:
    """Makes every PREPARE of the database wait until the returned connection is closed."""
    query(database, SLOW_PREPARE)

    def lock() -> psycopg.Connection[object]:
        connection: psycopg.Connection[object] = psycopg.connect(database, autocommit=True)
        connection.execute("SELECT pg_advisory_lock(5)")
        return connection

    return lock


def processes(url: str) -> set[object]:
    """The sessions of participants in the database."""
    rows = query(
        url,
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'syncpoint' "
        "AND datname = current_database()",
    )
    return {row[0] for row in rows}


async def until_at_rest(bank: Bank) -> None:
    await until(lambda: not bank.coordinator.engine().drivers)
    assert_at_rest(bank.accounts)
    assert_at_rest(bank.ledger)
    assert bank.nothing_is_prepared()


# The vote.


async def test_a_late_prepare_never_outlives_its_rollback(
    participant: PostgreSQL, proxy: Holding, database: str
) -> None:
    """It is on its way when the rollback is done: the session that it goes to has to be gone."""
    branch = await work(participant, UPDATE)
    innocent = await work(participant, GIVE)
    opened = participant._open
    assert opened is not None
    doomed = opened.by_branch[branch.id]._session
    assert doomed is not None
    proxy.hold(PREPARE)
    voting = asyncio.create_task(vote_at_once(participant, branch))
    await asyncio.wait_for(proxy.held.wait(), 10)
    with pytest.raises(DatabaseUnavailable, match="not prepared yet"):
        await participant.rollback(branch)
    assert isinstance(opened.in_doubt[branch.id], Greeting)
    with pytest.raises(DatabaseUnavailable, match="lost while it prepared"):
        await voting  # whoever waits hears that there will be no answer
    assert await until_ended(lambda: participant.rollback(branch)) == FINISHED
    proxy.deliver.set()
    await asyncio.wait_for(proxy.delivered.wait(), 10)
    assert doomed.greeting.process_id not in processes(database)
    assert gids(database) == [] and query(database, BALANCE) == [(100,)]
    vote = await vote_at_once(participant, innocent)
    assert vote is not None and vote.kind is VoteKind.PREPARED, "its session was terminated too"
    assert await participant.rollback(Branch(innocent.xid, "accounts", vote.token)) == FINISHED
    assert_at_rest(participant)


async def test_a_session_that_may_not_be_looked_at_is_not_taken_for_gone(
    proxy: Holding, database: str
) -> None:
    """The role that sessions take on is not allowed to see when those of their login began."""

    async def configure(connection: AsyncConnection[Any]) -> None:
        await connection.execute("SET ROLE tenant")

    with other_role(database) as url:
        participant = PostgreSQL("accounts", proxy.url(url), pool_size=2, configure=configure)
        await participant.open(binding())
        try:
            branch = await work(participant, UPDATE)
            proxy.hold(PREPARE)
            voting = asyncio.create_task(vote_at_once(participant, branch))
            await asyncio.wait_for(proxy.held.wait(), 10)
            for _ in range(3):
                with pytest.raises(DatabaseUnavailable, match="not prepared yet"):
                    await participant.rollback(branch)
            with pytest.raises(DatabaseUnavailable):
                await voting
            proxy.deliver.set()  # late, and nobody could stop it
            await until(lambda: gids(database) == [str(branch.xid)])
            query(database, f"ROLLBACK PREPARED '{branch.xid}'")  # these sessions may not
            assert await until_ended(lambda: participant.rollback(branch)) == FINISHED
            assert_at_rest(participant)
        finally:
            await participant.close()


async def test_a_session_in_doubt_serves_nobody_else(accounts: PostgreSQL, database: str) -> None:
    """The server says that it ends the session, and does not: the rollback will."""
    query(database, FAILING)
    assert accounts._open is not None
    (before,) = accounts._open.pool._idle
    branch = await work(accounts, UPDATE)
    with pytest.raises(DatabaseUnavailable, match="lost while it prepared"):
        await vote_at_once(accounts, branch)
    assert before not in accounts._open.pool._idle and not before.is_connected
    assert await until_ended(lambda: accounts.rollback(branch)) == FINISHED
    assert before.greeting.process_id not in processes(database)
    assert_at_rest(accounts)


async def test_a_lost_answer_ends_no_other_session(
    faulty: PostgreSQL, faults: Proxy, database: str
) -> None:
    first, second = await work(faulty, UPDATE), await work(faulty, GIVE)
    assert faulty._open is not None
    other = faulty._open.by_branch[second.id]._session
    assert other is not None
    faults.on(PREPARE, Fault.LOSE_ANSWER)
    with pytest.raises(DatabaseUnavailable, match="lost while it prepared"):
        await vote_at_once(faulty, first)
    assert faults.fired and gids(database) == [str(first.xid)]
    assert await until_ended(lambda: faulty.rollback(first)) == FINISHED
    assert gids(database) == [] and query(database, BALANCE) == [(100,)]
    assert other.greeting.process_id in processes(database)
    assert await faulty.rollback(second) == FINISHED
    assert_at_rest(faulty)


async def test_a_session_whose_number_another_has_got_is_gone(accounts: PostgreSQL) -> None:
    """Process numbers come again: who began at another time is somebody else."""
    opened = accounts._open
    assert opened is not None
    (session,) = opened.pool._idle
    greeting = session.greeting
    assert greeting.process_began_us > 1_500_000_000_000_000
    branch = Branch(await _a_xid(accounts), "accounts")
    earlier = replace(greeting, process_began_us=greeting.process_began_us - 1)
    opened.in_doubt[branch.id] = earlier
    assert await accounts.rollback(branch) == FINISHED
    assert (await session.ask(b"SELECT 1")).succeeded


async def _a_xid(accounts: PostgreSQL) -> Xid:
    branch = await work(accounts, "SELECT 1")
    await accounts.rollback(branch)
    return branch.xid


async def test_a_rollback_while_the_prepare_runs(
    database: str, second_database: str, locked: Callable[[], psycopg.Connection[object]]
) -> None:
    """The caller hears of the other branch's no at once, and nothing is left of the driver."""
    bank = Bank((database, second_database))
    lock = locked()
    async with bank.coordinator:
        began = time.monotonic()
        with pytest.raises(TransactionAborted, match="duplicate key"):
            async with bank.coordinator.transaction(timeout=20):
                await (await bank.accounts.connection()).execute(TAKE)
                await (await bank.ledger.connection()).execute(TWICE)
        assert time.monotonic() - began < 10
        await until_at_rest(bank)
        assert not running(database, "PREPARE")
        lock.close()
        assert bank.balances() == (100, 100)
        began = time.monotonic()
    assert time.monotonic() - began < bank.coordinator.settings.drain_timeout / 2


async def test_an_answer_that_comes_while_the_rollback_waits_for_it(
    database: str, second_database: str, locked: Callable[[], psycopg.Connection[object]]
) -> None:
    """The branch is prepared after all, and rolled back."""
    bank = Bank((database, second_database))
    lock = locked()
    async with bank.coordinator:
        releasing = asyncio.create_task(_close_when_running(database, lock))
        with pytest.raises(TransactionAborted, match="duplicate key"):
            async with bank.coordinator.transaction(timeout=20):
                await (await bank.accounts.connection()).execute(TAKE)
                await (await bank.ledger.connection()).execute(TWICE)
        await releasing
        await until_at_rest(bank)
        assert bank.balances() == (100, 100)


async def _close_when_running(url: str, lock: psycopg.Connection[object]) -> None:
    await until(lambda: running(url, "PREPARE"))
    lock.close()


async def test_the_deadline_passes_while_the_prepare_is_in_a_black_hole(
    database: str, second_database: str, faults: Proxy
) -> None:
    bank = Bank((database, second_database), (faults.url(database), second_database))
    async with bank.coordinator:
        faults.on(PREPARE, Fault.BLACK_HOLE)
        began = time.monotonic()
        with pytest.raises(TransactionAborted, match="deadline of 1 s") as aborted:
            async with bank.coordinator.transaction(timeout=1):
                await (await bank.accounts.connection()).execute(TAKE)
                await (await bank.ledger.connection()).execute(GIVE)
        assert 0.9 < time.monotonic() - began < 6 and aborted.value.retryable
        async with asyncio.timeout(8):  # the answer itself is waited for longer
            await until_at_rest(bank)
        assert bank.balances() == (100, 100)


async def test_the_time_for_an_answer_is_up_before_the_deadline(
    faulty: PostgreSQL, faults: Proxy, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("participants.postgres.work.ANSWER_SECONDS_MAX", 0.2)
    branch = await work(faulty, UPDATE)
    assert faulty._open is not None
    terms = faulty._open.by_branch[branch.id]._terms
    object.__setattr__(terms, "deadline", asyncio.get_running_loop().time() - 1)
    faults.on(PREPARE, Fault.BLACK_HOLE)
    with pytest.raises(DatabaseUnavailable, match=r"no answer within 0\.2 s"):
        await vote_at_once(faulty, branch)
    assert await until_ended(lambda: faulty.rollback(branch)) == FINISHED
    assert gids(database) == []
    assert_at_rest(faulty)


async def test_a_cancelled_caller_leaves_nothing_behind(
    database: str, second_database: str, locked: Callable[[], psycopg.Connection[object]]
) -> None:
    bank = Bank((database, second_database))
    lock = locked()
    async with bank.coordinator:

        async def transfer() -> None:
            async with bank.coordinator.transaction(timeout=20):
                await (await bank.accounts.connection()).execute(TAKE)
                await (await bank.ledger.connection()).execute(GIVE)

        caller = asyncio.create_task(transfer())
        await until(lambda: running(database, "PREPARE"))
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await until_at_rest(bank)
        lock.close()
    assert bank.balances() == (100, 100)


# The commit.


async def test_the_server_is_killed_between_the_vote_and_the_commit(
    accounts: PostgreSQL, database: str, postgres_server: EmbeddedServer
) -> None:
    branch = await work(accounts, UPDATE)
    vote = await vote_at_once(accounts, branch)
    assert vote is not None
    await asyncio.to_thread(postgres_server.kill)
    branch = Branch(branch.xid, "accounts", vote.token)
    send = accounts.commit_at_once(branch)
    assert send is not None and await answer_to(send) is None
    await asyncio.to_thread(postgres_server.start)
    assert await until_ended(lambda: accounts.commit(branch)) == FINISHED
    assert gids(database) == [] and query(database, BALANCE) == [(99,)]
    assert_at_rest(accounts)


async def test_a_commit_in_a_black_hole_is_told_at_the_deadline(
    database: str, second_database: str, faults: Proxy
) -> None:
    """It is decided, so the caller hears that it is committed."""
    bank = Bank((database, second_database), (faults.url(database), second_database))
    async with bank.coordinator:
        faults.on(b"COMMIT PREPARED", Fault.BLACK_HOLE)
        began = time.monotonic()
        async with bank.coordinator.transaction(timeout=2):
            await (await bank.accounts.connection()).execute(TAKE)
            await (await bank.ledger.connection()).execute(GIVE)
        assert faults.fired and 1.9 < time.monotonic() - began < 6
        faults.heal()
        await until_at_rest(bank)
    assert bank.balances() == (99, 101)


async def test_closing_ends_a_commit_that_is_out(
    faulty: PostgreSQL, faults: Proxy, database: str
) -> None:
    branch = await work(faulty, UPDATE)
    vote = await vote_at_once(faulty, branch)
    opened = faulty._open
    assert vote is not None and opened is not None
    faults.on(b"COMMIT PREPARED", Fault.BLACK_HOLE)
    branch = Branch(branch.xid, "accounts", vote.token)
    send = faulty.commit_at_once(branch)
    assert send is not None
    ending = asyncio.create_task(answer_to(send))
    await until(lambda: faults.fired)
    (out,) = opened.finisher._sent_to
    await faulty.close()
    assert out.pgconn.status == psycopg.pq.ConnStatus.BAD
    async with asyncio.timeout(5):
        assert await ending is None  # it is to be looked into, later
    assert gids(database) == [str(branch.xid)]
    await faulty.open(opened.binding)
    assert await until_ended(lambda: faulty.commit(branch)) == FINISHED


async def test_a_lost_commit_is_repeated_by_itself(
    database: str, second_database: str, faults: Proxy
) -> None:
    bank = Bank((database, second_database), (faults.url(database), second_database))
    async with bank.coordinator:
        for fault in (Fault.LOSE_ANSWER, Fault.LOSE_REQUEST):
            faults.on(b"COMMIT PREPARED", fault)
            async with bank.coordinator.transaction(timeout=20):
                await (await bank.accounts.connection()).execute(TAKE)
                await (await bank.ledger.connection()).execute(GIVE)
            await until_at_rest(bank)
        assert faults.fired == [Fault.LOSE_ANSWER, Fault.LOSE_REQUEST]
    assert bank.balances() == (98, 102)
