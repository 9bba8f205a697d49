"""Lost answers, black holes and killed servers: what is in doubt is told from what is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psycopg
import pytest

from coordinator.errors import ConfigurationError, TransactionAborted, TransactionError
from coordinator.model import FINISHED, Branch, Ending, Verdict, Vote, VoteKind
from participants.conformance import TrialTransaction, binding, trial
from participants.postgres import DatabaseUnavailable, PostgreSQL
from participants.postgres.embedded import EmbeddedServer
from tests.support.postgres import gids, query
from tests.support.proxy import Fault, Proxy

UPDATE = "UPDATE account SET balance = balance - 1 WHERE id = 'alice'"
BALANCE = "SELECT balance FROM account WHERE id = 'alice'"


@pytest.fixture
async def proxy(postgres_server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Proxy(postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
async def proxied(proxy: Proxy, database: str) -> AsyncIterator[PostgreSQL]:
    """A participant that reaches `database` through the proxy."""
    participant = PostgreSQL("accounts", proxy.url(database), pool_size=3)
    await participant.open(binding())
    yield participant
    await participant.close()


async def work(participant: PostgreSQL, seconds: float = 30.0) -> TrialTransaction:
    """A transaction that wrote something and awaits its end."""
    assert participant._open is not None
    async with trial(participant._open.binding, seconds) as transaction:
        await (await participant.connection()).execute(UPDATE.encode())
    return transaction


async def until_ended(end: Callable[[], Awaitable[Ending]]) -> Ending:
    """Repeat as the engine does."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await end()
            except DatabaseUnavailable:
                await asyncio.sleep(0.02)


def with_token(transaction: TrialTransaction, vote: Vote) -> Branch:
    return Branch(transaction.branch.xid, "accounts", vote.token)


async def test_lost_before_the_vote_is_a_definite_no(
    proxied: PostgreSQL, proxy: Proxy, database: str
) -> None:
    transaction = await work(proxied)
    proxy.cut()
    vote = await proxied.prepare(transaction.branch.xid)
    assert vote.kind is VoteKind.ABORTED and vote.retryable
    assert await until_ended(lambda: proxied.rollback(transaction.branch)) == FINISHED
    assert gids(database) == [] and query(database, BALANCE) == [(100,)]


async def test_answer_to_prepare_lost_is_in_doubt_and_rolled_back(
    proxied: PostgreSQL, proxy: Proxy, database: str
) -> None:
    transaction = await work(proxied)
    proxy.on(b"PREPARE TRANSACTION", Fault.LOSE_ANSWER)
    with pytest.raises(DatabaseUnavailable, match="lost while it prepared"):
        await proxied.prepare(transaction.branch.xid)
    assert proxy.fired == [Fault.LOSE_ANSWER]
    assert gids(database) == [str(transaction.branch.xid)]
    assert await until_ended(lambda: proxied.rollback(transaction.branch)) == FINISHED
    assert gids(database) == [] and query(database, BALANCE) == [(100,)]


async def test_prepare_lost_on_the_way_is_not_finished_while_its_session_lives(
    proxied: PostgreSQL, proxy: Proxy, database: str
) -> None:
    """The session stays, its PREPARE may yet arrive: rolling back must not say finished."""
    transaction = await work(proxied)
    proxy.on(b"PREPARE TRANSACTION", Fault.BLACK_HOLE)
    task = asyncio.create_task(proxied.prepare(transaction.branch.xid))
    await until_fired(proxy)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The proxy holds the server's end open: for the server nothing has happened.
    with pytest.raises(DatabaseUnavailable, match="not prepared yet"):
        await proxied.rollback(transaction.branch)
    assert await until_ended(lambda: proxied.rollback(transaction.branch)) == FINISHED
    assert gids(database) == []
    rows = query(
        database,
        "SELECT 1 FROM pg_stat_activity WHERE backend_xid IS NOT NULL "
        "AND datname = current_database()",
    )
    assert rows == []


async def until_fired(proxy: Proxy) -> None:
    async with asyncio.timeout(10):
        while not proxy.fired:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_ANSWER])
async def test_commit_prepared_lost_is_repeated(
    proxied: PostgreSQL, proxy: Proxy, database: str, fault: Fault
) -> None:
    transaction = await work(proxied)
    branch = with_token(transaction, await proxied.prepare(transaction.branch.xid))
    proxy.on(b"COMMIT PREPARED", fault)
    with pytest.raises(DatabaseUnavailable):
        await proxied.commit(branch)
    assert proxy.fired == [fault]
    assert gids(database) == ([] if fault is Fault.LOSE_ANSWER else [str(branch.xid)])
    assert await until_ended(lambda: proxied.commit(branch)) == FINISHED
    assert gids(database) == [] and query(database, BALANCE) == [(99,)]


@pytest.mark.parametrize(
    ("fault", "verdict", "balance"),
    [
        (Fault.LOSE_REQUEST, Verdict.ABORT, 100),
        (Fault.LOSE_ANSWER, Verdict.COMMIT, 99),
    ],
)
async def test_one_phase_commit_lost_is_resolved(
    proxied: PostgreSQL, proxy: Proxy, database: str, fault: Fault, verdict: Verdict, balance: int
) -> None:
    transaction = await work(proxied)
    proxy.on(b"COMMIT", fault)
    async with asyncio.timeout(20):
        answer = await proxied.commit_one_phase(transaction.branch)
    assert proxy.fired == [fault]
    assert answer[0] is verdict and query(database, BALANCE) == [(balance,)]
    assert answer[2] is (verdict is Verdict.ABORT)  # running it again may help


async def test_one_phase_commit_that_never_arrived_is_not_waited_for_for_ever(
    proxied: PostgreSQL, proxy: Proxy, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's session idles in its transaction: it has to be told to end."""
    monkeypatch.setattr("participants.postgres.work.ANSWER_SECONDS_MAX", 0.1)
    transaction = await work(proxied, seconds=0.3)
    proxy.on(b"COMMIT", Fault.BLACK_HOLE)
    async with asyncio.timeout(10):
        verdict, reason, retryable = await proxied.commit_one_phase(transaction.branch)
    assert verdict is Verdict.ABORT and retryable and "rolled back" in reason
    assert query(database, BALANCE) == [(100,)]


async def test_one_phase_commit_waits_for_a_killed_server(
    proxied: PostgreSQL, proxy: Proxy, database: str, postgres_server: EmbeddedServer
) -> None:
    transaction = await work(proxied)
    proxy.on(b"COMMIT", Fault.LOSE_ANSWER)
    answer = asyncio.create_task(proxied.commit_one_phase(transaction.branch))
    await until_fired(proxy)
    await asyncio.to_thread(postgres_server.kill)
    assert not answer.done() or answer.result()[0] is Verdict.COMMIT
    await asyncio.to_thread(postgres_server.start)
    async with asyncio.timeout(20):
        verdict, _, _ = await answer
    assert query(database, BALANCE) == [(99 if verdict is Verdict.COMMIT else 100,)]


async def test_a_killed_server_keeps_the_promise(
    accounts: PostgreSQL, database: str, postgres_server: EmbeddedServer
) -> None:
    transaction = await work(accounts)
    branch = with_token(transaction, await accounts.prepare(transaction.branch.xid))
    await asyncio.to_thread(postgres_server.kill)
    with pytest.raises(DatabaseUnavailable):
        await accounts.commit(branch)
    with pytest.raises(DatabaseUnavailable):
        await accounts.recover()
    assert accounts._open is not None
    async with trial(accounts._open.binding):
        with pytest.raises(TransactionAborted, match="cannot be reached") as caught:
            await accounts.connection()
    assert caught.value.retryable
    await asyncio.to_thread(postgres_server.start)
    assert [found.xid for found in await accounts.recover()] == [branch.xid]
    assert await until_ended(lambda: accounts.commit(branch)) == FINISHED
    assert query(database, BALANCE) == [(99,)]


async def test_one_dead_connection_betrays_all_that_are_as_old(
    accounts: PostgreSQL, database: str, postgres_server: EmbeddedServer
) -> None:
    """After a restart one attempt fails, not one for each pooled connection."""
    transaction = await work(accounts)
    branch = with_token(transaction, await accounts.prepare(transaction.branch.xid))
    assert accounts._open is not None
    readers = []
    for _ in range(3):
        async with trial(accounts._open.binding) as reader:
            await (await accounts.connection()).execute("SELECT 1")
        readers.append(reader)
    for reader in readers:
        await accounts.rollback(reader.branch)
    await asyncio.to_thread(postgres_server.kill)
    await asyncio.to_thread(postgres_server.start)
    with pytest.raises(DatabaseUnavailable):
        await accounts.commit(branch)
    assert await accounts.commit(branch) == FINISHED
    assert query(database, BALANCE) == [(99,)]


async def test_dead_pooled_connections_are_replaced_at_begin(
    accounts: PostgreSQL, postgres_server: EmbeddedServer
) -> None:
    held = [await work(accounts, 30.0)]
    for transaction in held:
        await accounts.rollback(transaction.branch)
    await asyncio.to_thread(postgres_server.stop, "immediate")
    await asyncio.to_thread(postgres_server.start)
    transaction = await work(accounts)
    assert (await accounts.prepare(transaction.branch.xid)).kind is VoteKind.PREPARED
    assert await accounts.rollback(transaction.branch) == FINISHED


async def test_a_shutdown_during_the_work_is_a_definite_no(
    accounts: PostgreSQL, database: str
) -> None:
    transaction = await work(accounts)
    query(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'syncpoint' AND datname = current_database()",
    )
    vote = await accounts.prepare(transaction.branch.xid)
    assert vote.kind is VoteKind.ABORTED and vote.retryable
    assert await until_ended(lambda: accounts.rollback(transaction.branch)) == FINISHED


async def test_cancellation_at_the_deadline_does_not_wait_for_a_black_hole(
    proxied: PostgreSQL, proxy: Proxy
) -> None:
    assert proxied._open is not None
    async with trial(proxied._open.binding, seconds=0.3) as transaction:
        connection = await proxied.connection()
        proxy.black_hole()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout_at(transaction.deadline), connection.transaction():
                await connection.execute(UPDATE.encode())
        with pytest.raises(TransactionError):
            await connection.execute("SELECT 1")
    vote = await proxied.prepare(transaction.branch.xid)
    assert vote.kind is VoteKind.ABORTED
    assert time.monotonic() - began < 1.5
    proxy.heal()


async def test_the_users_exception_survives_a_savepoint_on_a_dead_connection(
    proxied: PostgreSQL, proxy: Proxy
) -> None:
    assert proxied._open is not None
    async with trial(proxied._open.binding, seconds=0.2) as transaction:
        connection = await proxied.connection()
        began = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():
                proxy.black_hole()
                await asyncio.sleep(transaction.deadline - asyncio.get_running_loop().time() + 0.01)
                raise ZeroDivisionError
        assert time.monotonic() - began < 1.5
    await proxied.prepare(transaction.branch.xid)
    proxy.heal()


async def test_rolling_back_an_idle_session_in_a_black_hole_gives_up_quickly(
    proxied: PostgreSQL, proxy: Proxy, database: str
) -> None:
    transaction = await work(proxied)
    proxy.black_hole()
    began = time.monotonic()
    assert await proxied.rollback(transaction.branch) == FINISHED
    assert time.monotonic() - began < 3
    proxy.heal()
    transaction = await work(proxied)
    assert (await proxied.prepare(transaction.branch.xid)).kind is VoteKind.PREPARED
    assert await until_ended(lambda: proxied.rollback(transaction.branch)) == FINISHED


async def test_the_server_itself_drops_a_session_that_vanished(
    database: str, postgres_server: EmbeddedServer
) -> None:
    """BEGIN carries a limit for idling, so that locks do not outlive a caller for ever."""
    participant = PostgreSQL("accounts", database)
    await participant.open(binding())
    try:
        assert participant._open is not None
        async with trial(participant._open.binding, seconds=5) as transaction:
            cursor = await (await participant.connection()).execute(
                "SHOW idle_in_transaction_session_timeout"
            )
            row: Any = await cursor.fetchone()
            assert row[0].endswith("ms") and 60_000 < int(row[0][:-2]) <= 65_000
        await participant.rollback(transaction.branch)
    finally:
        await participant.close()


async def test_a_url_that_leads_to_another_cluster_later_is_noticed(
    database: str, second_database: str, postgres_servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    first, second = postgres_servers
    async with Proxy(first.port) as proxy:
        participant = PostgreSQL("accounts", proxy.url(database))
        await participant.open(binding())
        try:
            transaction = await work(participant)
            branch = with_token(transaction, await participant.prepare(transaction.branch.xid))
            # The first server's clients are sent to the second, which lets them in as well.
            with psycopg.connect(second.url(), autocommit=True) as connection:
                connection.execute(f"ALTER ROLE postgres PASSWORD '{first.password}'".encode())
            proxy._server_port = second.port
            proxy.cut()
            with pytest.raises(ConfigurationError, match="another PostgreSQL cluster"):
                async with asyncio.timeout(10):
                    await until_ended(lambda: participant.commit(branch))
        finally:
            with psycopg.connect(
                second.url().replace(second.password, first.password), autocommit=True
            ) as connection:
                connection.execute(f"ALTER ROLE postgres PASSWORD '{second.password}'".encode())
            proxy._server_port = first.port
            proxy.cut()
            await until_ended(lambda: participant.commit(branch))
            await participant.close()
