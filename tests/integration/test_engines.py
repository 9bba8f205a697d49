"""SQLAlchemy engines as the place where a database is, loops, and forks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import AsyncAdaptedQueuePool, Engine, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from coordinator.errors import ConfigurationError, TransactionAborted
from participants.conformance import binding
from participants.postgres import PostgreSQL
from participants.postgres.embedded import EmbeddedServer
from tests.support.bank import GIVE, TAKE, Bank, blocking_bank
from tests.support.orm import sqlalchemy_url
from tests.support.postgres import query

AnyEngine = Engine | AsyncEngine
KINDS = [create_engine, create_async_engine]


@pytest.fixture(params=KINDS, ids=["Engine", "AsyncEngine"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Any]]:
    """Makes engines of either face, which are disposed of at the end."""
    made: list[AnyEngine] = []

    def make(*args: Any, **options: Any) -> AnyEngine:
        made.append(request.param(*args, **options))
        return made[-1]

    yield make
    for each in made:
        if isinstance(each, AsyncEngine):
            await each.dispose()
        else:
            each.dispose()


def inner(engine: AnyEngine) -> Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


async def transfer(bank: Bank) -> None:
    async with bank.coordinator.transaction():
        await (await bank.accounts.connection()).execute(TAKE.encode())
        await (await bank.ledger.session()).execute(text(GIVE))


async def test_both_faces_work_over_either_kind_of_engine(
    make: Callable[..., Any], database: str, second_database: str
) -> None:
    urls = make(sqlalchemy_url(database)), make(sqlalchemy_url(second_database))

    def blocking_transfers() -> None:
        with blocking_bank((database, second_database), urls) as bank:
            for _ in range(2):
                with bank.coordinator.blocking.transaction():
                    bank.accounts.blocking.connection().execute(TAKE.encode())
                    bank.ledger.blocking.session().execute(text(GIVE))

    bank = Bank((database, second_database), urls)
    async with bank.coordinator:
        for _ in range(2):
            await transfer(bank)
    assert bank.balances() == (98, 102) and bank.nothing_is_prepared()
    await asyncio.to_thread(blocking_transfers)
    assert bank.balances() == (96, 104) and bank.nothing_is_prepared()


async def test_connections_are_made_by_the_engines_own_means(
    make: Callable[..., Any], database: str, second_database: str
) -> None:
    wrong = make_url(sqlalchemy_url(database)).set(password="wrong")
    right = make_url(sqlalchemy_url(database)).password
    engine = make(wrong, isolation_level="REPEATABLE READ", pool_size=1, max_overflow=0)
    seen: list[str] = []

    @event.listens_for(inner(engine), "do_connect")
    def give_the_password(_: Any, __: Any, ___: Any, parameters: dict[str, Any]) -> None:
        parameters["password"] = right
        seen.append("do_connect")

    @event.listens_for(inner(engine), "connect")
    def choose_a_path(raw: Any, _: Any) -> None:
        cursor = raw.cursor()
        cursor.execute("SET search_path = pg_catalog, public")
        cursor.close()
        seen.append("connect")

    bank = Bank((database, second_database), (engine, second_database))
    async with bank.coordinator:
        async with bank.coordinator.transaction():
            connection = await bank.accounts.connection()
            cursor = await connection.execute("SHOW search_path")
            assert await cursor.fetchone() == ("pg_catalog, public",)
            cursor = await connection.execute("SHOW transaction_isolation")
            assert await cursor.fetchone() == ("repeatable read",)
        await transfer(bank)
    assert seen == ["do_connect", "connect"] * (len(seen) // 2)
    assert bank.balances() == (99, 101)


async def test_who_holds_the_engines_pool_does_not_hold_us_up(
    database: str, second_database: str
) -> None:
    """A request's session that is idle has the only connection, and waits for our transaction."""
    engine = create_async_engine(
        sqlalchemy_url(database),
        pool_size=1,
        max_overflow=0,
        pool_timeout=30,
        poolclass=AsyncAdaptedQueuePool,
    )
    bank = Bank((database, second_database), (engine, second_database))
    async with asyncio.timeout(20), bank.coordinator, engine.connect() as held:
        await transfer(bank)
        await held.execute(text("SELECT 1"))
    await engine.dispose()
    assert bank.balances() == (99, 101)


async def test_an_engine_that_cannot_connect_is_an_outage_and_never_shows_its_password(
    make: Callable[..., Any], database: str, second_database: str
) -> None:
    secret = "hidden-password"
    url = make_url(sqlalchemy_url(database))
    bad = Bank((database, second_database), (make(url.set(password=secret)), second_database))
    with pytest.raises(ConfigurationError, match="password authentication failed") as caught:
        await bad.coordinator.open()
    assert secret not in str(caught.value) and secret not in repr(bad.accounts)
    assert f"127.0.0.1:{url.port}/{url.database}" in repr(bad.accounts)

    engine = make(url)
    bank = Bank((database, second_database), (engine, second_database))
    async with bank.coordinator:
        opened = bank.accounts._open
        assert opened is not None
        opened.pool._close_idle()

        @event.listens_for(inner(engine), "do_connect")
        def fail(*_: object) -> None:
            raise LookupError("no token to be had")

        with pytest.raises(TransactionAborted, match="no token to be had") as aborted:
            await transfer(bank)
        assert aborted.value.retryable
        event.remove(inner(engine), "do_connect", fail)
        await transfer(bank)
    assert bank.balances() == (99, 101)


def test_what_is_no_url_and_no_engine_on_psycopg_is_refused(database: str) -> None:
    async def configure(_: psycopg.AsyncConnection[Any]) -> None: ...

    engine = create_engine(sqlalchemy_url(database))
    with pytest.raises(ConfigurationError, match="with an engine, listen to its event 'connect'"):
        PostgreSQL("accounts", engine, configure=configure)
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="`enlist`"):
        PostgreSQL("accounts", connection)  # type: ignore[arg-type]
    engine.dispose()
    with pytest.raises(ConfigurationError, match=r"postgresql\+psycopg://"):
        PostgreSQL("accounts", create_engine("sqlite://"))
    with pytest.raises(ConfigurationError, match="expected a url"):
        PostgreSQL("accounts", 5)  # type: ignore[arg-type]


async def test_the_server_behind_an_engine_is_checked_too(
    make: Callable[..., Any], postgres_servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    with_none = EmbeddedServer(max_prepared_transactions=0)
    await asyncio.to_thread(with_none.start)
    try:
        participant = PostgreSQL("accounts", make(sqlalchemy_url(with_none.url())))
        with pytest.raises(ConfigurationError, match="max_prepared_transactions is 0"):
            await participant.open(binding())
    finally:
        await asyncio.to_thread(with_none.close)


def test_a_second_loop_is_refused_while_open_and_welcome_afterwards(database: str) -> None:
    participant = PostgreSQL("accounts", database)

    async def open_elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="is open already"):
            await participant.open(binding())

    async def open_here() -> None:
        await participant.open(binding())
        await asyncio.to_thread(asyncio.run, open_elsewhere())

    asyncio.run(open_here())
    asyncio.run(_reopen(participant))  # the first loop ended without closing it


async def _reopen(participant: PostgreSQL) -> None:
    await participant.open(binding())
    await participant.close()


FORKING = """
import asyncio, gc, os, sys, warnings
from coordinator.errors import ConfigurationError, TransactionError
from tests.support.bank import Bank, GIVE, TAKE

warnings.simplefilter("error")
bank = Bank((sys.argv[1], sys.argv[2]))
asynchronous = sys.argv[3] == "asynchronous"

def transfer():
    with bank.coordinator.blocking.transaction():
        bank.accounts.blocking.connection().execute(TAKE.encode())
        bank.ledger.blocking.connection().execute(GIVE.encode())

def child(connection):
    try:
        connection.execute("SELECT 1")
    except TransactionError as error:
        assert "belongs to the process that forked" in str(error), error
    else:
        raise AssertionError("the parent's connection was used")
    try:
        bank.accounts._opened()
    except ConfigurationError as error:
        assert "before a fork" in str(error), error
    else:
        raise AssertionError("the parent's state was used")

async def child_opens():
    async with bank.coordinator:
        async with bank.coordinator.transaction():
            await (await bank.accounts.connection()).execute(TAKE.encode())
            await (await bank.ledger.connection()).execute(GIVE.encode())

with bank.coordinator.blocking.transaction():
    connection = bank.accounts.blocking.connection()
    connection.execute("SELECT 1")
    process = os.fork()
    if process == 0:
        code = 1
        try:
            child(connection)
            from coordinator.context import enter
            enter(None)
            if asynchronous:
                asyncio.run(child_opens())
            else:
                bank.coordinator.blocking.open()
                transfer()
                bank.coordinator.blocking.close()
            del connection
            gc.collect()  # nothing of the parent's is closed by this process
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitpid(process, 0)[1] == 0
    connection.execute(TAKE.encode())
    bank.ledger.blocking.connection().execute(GIVE.encode())
transfer()
print(*bank.balances(), bank.nothing_is_prepared())
"""


@pytest.mark.parametrize("face", ["synchronous", "asynchronous"])
def test_after_a_fork_parent_and_child_each_have_their_own(
    database: str, second_database: str, face: str
) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING), database, second_database, face],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    # One by the child, one by the transaction that saw the fork, one afterwards.
    assert finished.stdout.split() == ["97", "103", "True"], finished.stdout
    assert "Warning" not in finished.stderr, finished.stderr
    assert query(database, "SELECT 1") == [(1,)]
