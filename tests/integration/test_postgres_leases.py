"""Leases: what user code may do with a connection, and that a dead one never reaches another."""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from coordinator.errors import ConfigurationError, TransactionAborted, TransactionError
from coordinator.model import FINISHED, Branch, Verdict, VoteKind
from coordinator.participant import Binding
from participants.conformance import binding, trial
from participants.postgres import PostgreSQL, psycopg_private
from participants.postgres.blocking_lease import BlockingLease
from participants.postgres.lease import Lease
from participants.postgres.leased import INSTEAD, Leased
from participants.postgres.slots import Slots
from participants.postgres.statements import Begin
from tests.support.postgres import gids, query, sessions

SLOW = "SELECT pg_sleep(60)"
BALANCES = "SELECT id, balance FROM account ORDER BY id"


def bound(participant: PostgreSQL) -> Binding:
    assert participant._open is not None
    return participant._open.binding


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Poll a condition on the server's side, which no event announces."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def running(url: str, part: str) -> bool:
    """Whether a session of the database is executing a statement that contains `part`."""
    return bool(
        query(
            url,
            "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() "
            f"AND datname = current_database() AND query LIKE '%{part}%'",
        )
    )


def test_the_private_names_of_psycopg_are_there() -> None:
    connection = AsyncConnection.__new__(AsyncConnection)
    base = psycopg._connection_base.BaseConnection
    base.__init__(connection, _NoConnection())  # type: ignore[arg-type]
    assert issubclass(psycopg_private.WaitTimeout, Exception)
    for name in ("_prepared", "_adapters", "_pipeline", "_autocommit"):
        assert hasattr(connection, name), name
    assert callable(connection._prepared.clear)
    assert connection._pipeline is None and connection._adapters is None
    assert psycopg_private.begin_statement(connection) == "BEGIN"
    connection._pool = None  # what tells psycopg not to warn that it was never closed


class _NoConnection:
    notice_handler = notify_handler = None
    status = 1


async def test_it_is_a_psycopg_connection_and_one_for_the_transaction(
    accounts: PostgreSQL, database: str
) -> None:
    async with trial(bound(accounts)) as transaction:
        connection = await accounts.connection()
        assert isinstance(connection, psycopg.AsyncConnection)
        async with accounts.connection() as same:
            assert same is connection
            await same.execute("UPDATE account SET balance = 1 WHERE id = 'bob'")
        async with connection:
            pass
        cursor = await connection.execute(BALANCES.encode())
        assert await cursor.fetchall() == [("alice", 100), ("bob", 1)]
        assert len(transaction.branches) == 1
    await accounts.rollback(transaction.branch)
    assert query(database, BALANCES) == [("alice", 100), ("bob", 100)]


async def test_concurrent_first_calls_get_one_branch_and_one_begin(accounts: PostgreSQL) -> None:
    async with trial(bound(accounts)) as transaction:
        leases = await asyncio.gather(*(accounts.connection() for _ in range(8)))
        assert len({id(lease) for lease in leases}) == 1 and len(transaction.branches) == 1
        # Statements of concurrent tasks take turns.
        cursors = await asyncio.gather(
            *(lease.execute("SELECT %s::int", (n,)) for n, lease in enumerate(leases))
        )
        assert [await cursor.fetchone() for cursor in cursors] == [(n,) for n in range(8)]
    await accounts.rollback(transaction.branch)


async def test_a_first_call_that_is_cancelled_leaves_the_next_to_open_it(
    accounts: PostgreSQL,
) -> None:
    async with trial(bound(accounts)) as transaction:
        first = asyncio.create_task(_lease(accounts))
        second = asyncio.create_task(_lease(accounts))
        await asyncio.sleep(0)
        first.cancel()
        connection = await second
        await connection.execute("SELECT 1")
        assert len(transaction.branches) == 1
    for branch in transaction.branches:
        await accounts.rollback(branch)


async def _lease(participant: PostgreSQL) -> AsyncConnection[Any]:
    return await participant.connection()


async def test_a_connection_that_opens_while_the_transaction_ends_is_refused(
    accounts: PostgreSQL,
) -> None:
    """A stray task's BEGIN is on its way when the vote is asked for."""
    participant = accounts
    async with trial(bound(participant)) as transaction:
        stray = asyncio.create_task(_lease(participant))
        async with asyncio.timeout(10):
            while not transaction.branches:
                await asyncio.sleep(0)
    vote = await participant.prepare(transaction.branch.xid)
    leased: object = (await asyncio.gather(stray, return_exceptions=True))[0]
    if isinstance(leased, AsyncConnection):  # BEGIN was faster
        assert vote.kind is VoteKind.READ_ONLY
        with pytest.raises(TransactionError):
            await leased.execute("SELECT 1")
    else:
        assert vote.kind is VoteKind.ABORTED and isinstance(leased, TransactionError)
    await participant.rollback(transaction.branch)
    assert participant._open is not None
    assert participant._open.by_branch == {} and participant._open._entries == {}
    assert participant._open.pool._slots == participant._open.pool.size


async def test_an_ended_branch_cannot_be_begun_again(accounts: PostgreSQL) -> None:
    """A second task that was waiting to open the connection comes too late."""
    async with trial(bound(accounts)) as transaction:
        await accounts.connection()
    opened = accounts._open
    assert opened is not None
    work = opened.by_branch[transaction.branch.id]
    await accounts.rollback(transaction.branch)
    session = await opened.pool.acquire(transaction.deadline)
    with pytest.raises(TransactionError, match="is over"):
        await work.begin(session, Begin())
    assert opened.pool._slots == opened.pool.size


async def test_a_descriptor_stays_open_until_its_waiter_has_let_go(
    accounts: PostgreSQL, database: str
) -> None:
    """Closed under a waiter, its number could be given to another socket of the event loop."""
    async with trial(bound(accounts)) as transaction:
        connection = await accounts.connection()
        stray = asyncio.create_task(connection.execute(SLOW.encode()))
        await until(lambda: running(database, "pg_sleep"))
    assert accounts._open is not None
    accounts._open.by_branch[transaction.branch.id].lose("the test says so")
    assert _state(connection) is psycopg.pq.ConnStatus.OK
    with pytest.raises(TransactionError, match="the test says so"):
        await stray
    assert _state(connection) is psycopg.pq.ConnStatus.BAD
    await accounts.rollback(transaction.branch)


def _state(connection: AsyncConnection[Any]) -> psycopg.pq.ConnStatus:
    return psycopg.pq.ConnStatus(connection.pgconn.status)


async def test_verbs_raise_and_say_what_to_do(accounts: PostgreSQL) -> None:
    async with trial(bound(accounts)) as transaction:
        connection = await accounts.connection()
        for verb, part in [
            (connection.commit, "returning from the transactional function"),
            (connection.rollback, "raise an exception"),
            (connection.close, "given back"),
            (lambda: connection.set_autocommit(True), "connection of your own"),
            (lambda: connection.tpc_begin("x"), "two-phase commit"),
            (connection.tpc_prepare, "two-phase commit"),
            (connection.tpc_commit, "two-phase commit"),
            (connection.tpc_rollback, "two-phase commit"),
        ]:
            with pytest.raises(TransactionError, match=part):
                await verb()
        await connection.execute("SELECT 1")
    await accounts.rollback(transaction.branch)


async def test_outside_a_transaction_or_a_coordinator(database: str, accounts: PostgreSQL) -> None:
    with pytest.raises(TransactionError, match=r"@coordinator\.transactional"):
        await accounts.connection()
    closed = PostgreSQL("closed", database)
    async with trial(binding()):
        with pytest.raises(ConfigurationError, match="is not open"):
            await closed.connection()
        with pytest.raises(ConfigurationError, match="another coordinator"):
            await accounts.connection()


async def test_a_dead_lease_and_its_cursors_are_refused(accounts: PostgreSQL) -> None:
    async with trial(bound(accounts)) as transaction:
        connection = await accounts.connection()
        cursor = connection.cursor()
        await cursor.execute(BALANCES.encode())
        named = connection.cursor("named")
        await named.execute(BALANCES.encode())
    await accounts.rollback(transaction.branch)
    assert connection.closed
    named._closed = True  # psycopg would warn that it was not closed in time

    async def copy() -> None:
        async with cursor.copy("COPY account FROM STDIN"):
            pass

    async def pipeline() -> None:
        async with connection.pipeline():
            await connection.execute("SELECT 1")

    async def savepoint() -> None:
        async with connection.transaction():
            pass

    for use in (
        lambda: connection.execute("SELECT 1"),
        lambda: cursor.execute("SELECT 1"),
        lambda: cursor.executemany("SELECT %s", [(1,)]),
        copy,
        pipeline,
        savepoint,
        lambda: connection.cancel_safe(),
        lambda: connection.set_read_only(True),
    ):
        with pytest.raises(TransactionError, match="cannot be used any more"):
            await use()
    with pytest.raises(TransactionError, match="cannot be used any more"):
        connection.cancel()


async def test_a_dead_lease_cannot_touch_the_next_borrower(
    database: str,
) -> None:
    participant = PostgreSQL("accounts", database, pool_size=1)
    await participant.open(binding())
    try:
        async with trial(bound(participant)) as first:
            old = await participant.connection()
            await old.execute("SELECT 1")
        await participant.rollback(first.branch)
        async with trial(bound(participant)) as second:
            new = await participant.connection()
            assert new.info.backend_pid == old.pgconn.backend_pid  # the same session, in truth
            with pytest.raises(TransactionError):
                await old.execute("UPDATE account SET balance = 0")
            await new.execute("UPDATE account SET balance = 7 WHERE id = 'bob'")
        verdict, _, _ = await participant.commit_one_phase(second.branch)
        assert verdict is Verdict.COMMIT
    finally:
        await participant.close()
    assert query(database, BALANCES) == [("alice", 100), ("bob", 7)]


async def test_a_running_statement_votes_no_and_never_pollutes(database: str) -> None:
    """`gather(bad(), slow(connection))`: bad raises, slow writes on."""
    participant = PostgreSQL("accounts", database, pool_size=1)
    await participant.open(binding())
    try:
        async with trial(bound(participant)) as transaction:
            connection = await participant.connection()
            stray = asyncio.create_task(connection.execute(SLOW.encode()))
            waiting = asyncio.create_task(
                connection.execute("UPDATE account SET balance = 0 WHERE id = 'alice'")
            )
            await until(lambda: running(database, "pg_sleep"))
        async with asyncio.timeout(5):
            vote = await participant.prepare(transaction.branch.xid)
        assert vote.kind is VoteKind.ABORTED and "still running" in vote.reason
        for error in await asyncio.gather(stray, waiting, return_exceptions=True):
            assert isinstance(error, TransactionError), error
        async with trial(bound(participant)) as following:
            other = await participant.connection()
            assert other.info.backend_pid != 0
            await other.execute("UPDATE account SET balance = 5 WHERE id = 'bob'")
        vote = await participant.prepare(following.branch.xid)
        branch = Branch(following.branch.xid, "accounts", vote.token)
        assert await participant.commit(branch) == FINISHED
        await until(lambda: not running(database, "pg_sleep"))  # it was cancelled on the server
    finally:
        await participant.close()
    assert query(database, BALANCES) == [("alice", 100), ("bob", 5)]


@pytest.mark.parametrize("kind", ["copy", "stream", "pipeline"])
async def test_what_is_half_done_at_the_end_votes_no(
    accounts: PostgreSQL, database: str, kind: str
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def half() -> None:
        connection = await accounts.connection()
        if kind == "copy":
            async with connection.cursor().copy("COPY entry (note) FROM STDIN") as copy:
                await copy.write("x\n")
                entered.set()
                await leave.wait()
        elif kind == "stream":
            async for _ in connection.cursor().stream("SELECT generate_series(1, 10000)"):
                entered.set()
                await leave.wait()
        else:
            async with connection.pipeline():
                await connection.execute("UPDATE account SET balance = 0")
                entered.set()
                await leave.wait()

    async with trial(bound(accounts)) as transaction:
        task = asyncio.create_task(half())
        await entered.wait()
    vote = await accounts.prepare(transaction.branch.xid)
    assert vote.kind is VoteKind.ABORTED and "still running" in vote.reason
    leave.set()
    (error,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(error, Exception)
    assert gids(database) == [] and query(database, BALANCES)[0] == ("alice", 100)
    async with trial(bound(accounts)) as following:
        await (await accounts.connection()).execute("UPDATE account SET balance = 3")
    vote = await accounts.prepare(following.branch.xid)
    assert vote.kind is VoteKind.PREPARED
    await accounts.rollback(following.branch)


async def test_prepared_statements_and_factories_outlive_leases(database: str) -> None:
    async def configure(connection: AsyncConnection[Any]) -> None:
        connection.row_factory = dict_row
        connection.prepare_threshold = 0

    participant = PostgreSQL("accounts", database, pool_size=1, configure=configure)
    await participant.open(binding())
    try:
        for _ in range(3):
            async with trial(bound(participant)) as transaction:
                connection = await participant.connection()
                cursor = await connection.execute("SELECT id FROM account WHERE id = %s", ("bob",))
                assert await cursor.fetchall() == [{"id": "bob"}]
                cursor = await connection.execute(
                    "SELECT count(*) AS n FROM pg_prepared_statements "
                    "WHERE statement LIKE 'SELECT id FROM%%'",
                    prepare=False,
                )
                assert await cursor.fetchall() == [{"n": 1}]
            vote = await participant.prepare(transaction.branch.xid)
            await participant.commit(Branch(transaction.branch.xid, "accounts", vote.token))
    finally:
        await participant.close()


async def test_rolled_back_schema_changes_leave_no_broken_statement(accounts: PostgreSQL) -> None:
    for kind in ("int", "text"):
        async with trial(bound(accounts)) as transaction:
            connection = await accounts.connection()
            await connection.execute(f"CREATE TABLE fresh (n {kind})".encode())
            for _ in range(7):
                await connection.execute("SELECT n FROM fresh", prepare=True)
        assert await accounts.rollback(transaction.branch) == FINISHED


async def test_a_lease_that_is_forgotten_neither_warns_nor_closes(accounts: PostgreSQL) -> None:
    async with trial(bound(accounts)) as transaction:
        connection = await accounts.connection()
        await connection.execute("SELECT 1")
    await accounts.rollback(transaction.branch)
    session = connection.pgconn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del connection
        gc.collect()
    assert session.status == psycopg.pq.ConnStatus.OK


async def test_cancelling_a_statement_in_time_keeps_the_transaction(
    accounts: PostgreSQL, database: str
) -> None:
    async with trial(bound(accounts)) as transaction:
        connection = await accounts.connection()
        with pytest.raises(TimeoutError):
            async with connection.transaction():
                await asyncio.wait_for(connection.execute(SLOW.encode()), 0.1)
        await connection.execute("UPDATE account SET balance = 9 WHERE id = 'bob'")
    vote = await accounts.prepare(transaction.branch.xid)
    assert vote.kind is VoteKind.PREPARED
    await accounts.commit(Branch(transaction.branch.xid, "accounts", vote.token))
    assert query(database, BALANCES)[1] == ("bob", 9)


async def test_a_full_pool_names_the_holders_at_the_deadline(database: str) -> None:
    participant = PostgreSQL("accounts", database, pool_size=1)
    await participant.open(binding())
    try:
        async with trial(bound(participant)) as holder:
            await (await participant.connection()).execute("SELECT 1")
        async with trial(bound(participant), seconds=0.1) as late:
            with pytest.raises(TransactionAborted, match="pool_size") as caught:
                await participant.connection()
        assert caught.value.retryable and holder.id in str(caught.value)
        assert late.branches == []
        async with trial(bound(participant)) as patient:
            task = asyncio.create_task(_lease(participant))
            await asyncio.sleep(0)
            await participant.rollback(holder.branch)
            await (await task).execute("SELECT 1")
        await participant.rollback(patient.branch)
    finally:
        await participant.close()


async def test_finishing_never_waits_for_leases(database: str) -> None:
    participant = PostgreSQL("accounts", database, pool_size=1)
    await participant.open(binding())
    try:
        async with trial(bound(participant)) as first:
            await (await participant.connection()).execute("UPDATE account SET balance = 8")
        vote = await participant.prepare(first.branch.xid)
        async with trial(bound(participant)) as holder:
            await (await participant.connection()).execute("SELECT 1")
        async with asyncio.timeout(5):
            assert len(await participant.recover()) == 1
            await participant.commit(Branch(first.branch.xid, "accounts", vote.token))
        await participant.rollback(holder.branch)
    finally:
        await participant.close()
    assert query(database, BALANCES)[0] == ("alice", 8)


async def test_closing_rolls_back_open_work_and_leaves_no_session(database: str) -> None:
    participant = PostgreSQL("accounts", database)
    await participant.open(binding())
    async with trial(bound(participant)):
        connection = await participant.connection()
        await connection.execute("UPDATE account SET balance = 0")
        stray = asyncio.create_task(connection.execute(SLOW.encode()))
        await until(lambda: running(database, "pg_sleep"))
    await participant.close()
    with pytest.raises(TransactionError, match="was closed"):
        await stray
    await until(lambda: sessions(database) == 0)
    assert query(database, BALANCES)[0] == ("alice", 100)


async def test_limits_apply_to_each_statement(database: str) -> None:
    participant = PostgreSQL("accounts", database, lock_timeout=0.05, statement_timeout=30)
    await participant.open(binding())
    update = "UPDATE account SET balance = 1 WHERE id = 'bob'"
    try:
        async with trial(bound(participant)) as first:
            await (await participant.connection()).execute(update.encode())
        async with trial(bound(participant)) as second:
            with pytest.raises(psycopg.errors.LockNotAvailable):
                await (await participant.connection()).execute(update.encode())
        vote = await participant.prepare(second.branch.xid)
        assert vote.kind is VoteKind.ABORTED and vote.retryable
        await participant.rollback(first.branch)
    finally:
        await participant.close()


@pytest.mark.parametrize(
    ("lease", "base"), [(Lease, AsyncConnection), (BlockingLease, psycopg.Connection)]
)
def test_a_lease_overrides_what_it_must(lease: type[Any], base: type[Any]) -> None:
    """A new psycopg verb that ends a transaction must be looked at before it is let through."""
    public = {name for name in dir(base) if not name.startswith("_")}
    harmless = {
        "add_notice_handler", "add_notify_handler", "adapters", "autocommit", "broken", "connect",
        "connection", "cursor", "deferrable", "execute", "fileno", "info", "isolation_level",
        "notifies", "pipeline", "prepare_threshold", "prepared_max", "read_only",
        "remove_notice_handler", "remove_notify_handler", "set_deferrable", "set_isolation_level",
        "set_read_only", "tpc_recover", "xid",
    }  # fmt: skip
    exceptions = {name for name in public if name[0].isupper()}
    handled = vars(lease).keys() | vars(Leased).keys()
    for name in public - harmless - exceptions - {"cursor_factory", "server_cursor_factory"}:
        assert name in handled, f"{base.__name__}.{name} is not handled by {lease.__name__}"
    assert vars(lease).keys() >= INSTEAD.keys()


async def test_prepares_wait_for_a_slot_until_the_deadline(
    accounts: PostgreSQL, database: str
) -> None:
    assert accounts._open is not None
    accounts._open.slots = Slots(2)  # one is the reserve, one is ours

    async def worked(seconds: float, account: str) -> Branch:
        async with trial(bound(accounts), seconds) as transaction:
            await (await accounts.connection()).execute(
                "UPDATE account SET balance = 1 WHERE id = %s", (account,)
            )
        return transaction.branch

    first, second = await worked(30, "alice"), await worked(30, "bob")
    assert (await accounts.prepare(first.xid)).kind is VoteKind.PREPARED
    waiting = asyncio.create_task(accounts.prepare(second.xid))
    reader = await _reader(accounts)  # who has nothing to prepare needs no slot
    assert (await accounts.prepare(reader.xid)).kind is VoteKind.READ_ONLY
    assert not waiting.done() and gids(database) == [str(first.xid)]
    await accounts.rollback(first)
    assert (await waiting).kind is VoteKind.PREPARED

    late = await worked(0.2, "alice")
    vote = await accounts.prepare(late.xid)
    assert vote.kind is VoteKind.ABORTED and vote.retryable
    assert "max_prepared_transactions" in vote.reason
    assert gids(database) == [str(second.xid)]
    for branch in (reader, second):
        await accounts.rollback(branch)
    assert accounts._open.slots.holders() == []


async def _reader(accounts: PostgreSQL) -> Branch:
    async with trial(bound(accounts)) as transaction:
        await (await accounts.connection()).execute("SELECT 1")
    return transaction.branch
