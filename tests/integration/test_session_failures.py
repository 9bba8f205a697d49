"""SQLAlchemy's AsyncSession in a global transaction: what it refuses, and how its work fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from coordinator.errors import TransactionAborted, TransactionError
from tests.support.orm import Author, Book, Shop, sqlalchemy_url
from tests.support.postgres import query


@pytest.fixture
async def shop(database: str, second_database: str) -> AsyncIterator[Shop]:
    shop = Shop(database, second_database)
    async with shop.coordinator:
        yield shop


# What is refused, and loses nothing.


VERBS: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
    "commit()": lambda session: session.commit(),
    "rollback()": lambda session: session.rollback(),
    "close()": lambda session: session.close(),
    "reset()": lambda session: session.reset(),
    "invalidate()": lambda session: session.invalidate(),
    "begin()": lambda session: session.begin().start(),
    "sync commit()": lambda session: session.run_sync(lambda sync: sync.commit()),
    "sync rollback()": lambda session: session.run_sync(lambda sync: sync.rollback()),
    "sync begin()": lambda session: session.run_sync(lambda sync: sync.begin()),
}


async def test_verbs_that_would_end_it_are_refused_and_lose_nothing(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        session.add(Author(name="flushed"))
        await session.flush()
        session.add(Author(name="pending"))
        for verb, call in VERBS.items():
            with pytest.raises(TransactionError) as refused:
                await call(session)
            assert verb.removeprefix("sync ") in str(refused.value)
            assert "global transaction" in str(refused.value)
        session.add(Author(name="later"))
    assert shop.names[0] == ["flushed", "later", "pending"]


async def test_a_begin_block_is_refused_with_the_way_out(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        async with await shop.accounts.session() as session:  # closes nothing
            pass
        with pytest.raises(TransactionError, match="begin_nested"):
            async with session.begin():
                pytest.fail("the block is not entered")
        session.add(Author(name="ursula"))
    assert shop.names[0] == ["ursula"]


async def test_the_connection_under_it_is_no_way_around(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        session.add(Author(name="ursula"))
        await session.flush()
        connection = await session.connection()
        for verb in ("commit", "rollback", "close", "invalidate"):
            with pytest.raises(TransactionError, match=f"{verb}\\(\\)"):
                await getattr(connection, verb)()
        raw = await connection.get_raw_connection()
        for verb in ("commit", "detach"):
            with pytest.raises(TransactionError):
                getattr(raw, verb)()
        raw.close()  # as the pool's: it is not the end of anything
        session.add(Author(name="octavia"))
    assert shop.names[0] == ["octavia", "ursula"]


@pytest.mark.parametrize("verb", ["commit", "rollback"])
async def test_nor_is_its_transaction_object(shop: Shop, verb: str) -> None:
    """SQLAlchemy's books are closed then, and its session with them; the database's are not."""
    with pytest.raises(TransactionError) as raised:
        async with shop.coordinator.transaction():
            session = await shop.accounts.session()
            session.add(Author(name="ursula"))
            await session.flush()
            transaction = (await session.connection()).get_transaction()
            assert transaction is not None
            await getattr(transaction, verb)()
            if verb == "rollback":
                session.add(Author(name="octavia"))
    assert isinstance(raised.value, TransactionAborted) == (verb == "rollback")
    assert verb.removesuffix("back") in str(raised.value)
    shop.assert_nothing_is_left()


async def test_a_statement_for_another_engine_is_refused(shop: Shop) -> None:
    engine = create_async_engine(sqlalchemy_url(shop.urls[1]))
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        session.add(Author(name="ursula"))
        insert = text("INSERT INTO author (name) VALUES ('astray')")
        with pytest.raises(TransactionError, match="not the database of its branch"):
            await session.execute(insert, bind_arguments={"bind": engine.sync_engine})
    await engine.dispose()
    assert shop.names == [["ursula"], []]


# Failures of the work itself.


async def test_a_flush_that_fails_before_the_commit_reaches_the_caller(shop: Shop) -> None:
    query(shop.urls[0], "INSERT INTO author (name) VALUES ('ursula')")
    with pytest.raises(IntegrityError, match="author_name_key"):
        async with shop.coordinator.transaction():
            (await shop.ledger.session()).add(Author(name="ursula"))
            (await shop.accounts.session()).add(Author(name="ursula"))
    assert shop.names == [["ursula"], []]


async def test_a_flush_error_that_was_swallowed_votes_no_and_says_why(shop: Shop) -> None:
    query(shop.urls[0], "INSERT INTO author (name) VALUES ('ursula')")
    with pytest.raises(TransactionAborted, match="UniqueViolation: duplicate key") as aborted:
        async with shop.coordinator.transaction():
            (await shop.ledger.session()).add(Author(name="octavia"))
            session = await shop.accounts.session()
            session.add(Author(name="ursula"))
            with pytest.raises(IntegrityError):
                await session.flush()
            with pytest.raises(InvalidRequestError):
                await session.execute(text("SELECT 1"))
    assert not aborted.value.retryable
    assert shop.names == [["ursula"], []]


async def test_a_flush_that_fails_in_python_votes_no_although_the_server_would_commit(
    shop: Shop,
) -> None:
    """SQLAlchemy has forgotten what it wrote before the error: that half must not be committed."""

    @event.listens_for(Book, "before_insert")
    def refuse(*_: object) -> None:
        raise ValueError("no books")

    try:
        with pytest.raises(TransactionAborted, match="ValueError: no books"):
            async with shop.coordinator.transaction():
                session = await shop.accounts.session()
                session.add(Author(name="ursula", books=[Book(title="one")]))
                with pytest.raises(ValueError, match="no books"):
                    await session.flush()
    finally:
        event.remove(Book, "before_insert", refuse)
    shop.assert_nothing_is_left()


async def test_a_deferred_constraint_is_found_by_the_vote(shop: Shop) -> None:
    with pytest.raises(TransactionAborted, match="book_title_key"):
        async with shop.coordinator.transaction():
            author = Author(name="ursula", books=[Book(title="one"), Book(title="one")])
            (await shop.accounts.session()).add(author)
            (await shop.ledger.session()).add(Author(name="octavia"))
    shop.assert_nothing_is_left()


async def test_a_lock_that_times_out_may_be_retried(shop: Shop) -> None:
    query(shop.urls[0], "INSERT INTO author (name) VALUES ('ursula')")
    async with await psycopg.AsyncConnection.connect(shop.urls[0]) as other:
        await other.execute("SELECT FROM author FOR UPDATE")
        with pytest.raises(TransactionAborted) as aborted:
            async with shop.coordinator.transaction():
                session = await shop.accounts.session()
                await session.execute(text("SET LOCAL lock_timeout = '20ms'"))
                with pytest.raises(DBAPIError):
                    await session.execute(text("UPDATE author SET name = name"))
    assert aborted.value.retryable


async def test_the_deadline_ends_a_statement_of_the_session(shop: Shop) -> None:
    heard: list[str] = []
    with pytest.raises(TransactionAborted, match="deadline") as aborted:
        async with shop.coordinator.transaction(timeout=0.5):
            session = await shop.accounts.session()
            event.listen(session.sync_session, "after_rollback", lambda _: heard.append("rollback"))
            session.add(Author(name="ursula"))
            await session.flush()
            await session.execute(text("SELECT pg_sleep(60)"))
    assert aborted.value.retryable and heard == ["rollback"]
    shop.assert_nothing_is_left()


async def test_a_statement_that_was_cancelled_and_swallowed_votes_no(shop: Shop) -> None:
    with pytest.raises(TransactionAborted):
        async with shop.coordinator.transaction():
            (await shop.ledger.session()).add(Author(name="octavia"))
            session = await shop.accounts.session()
            session.add(Author(name="ursula"))
            await session.flush()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await session.execute(text("SELECT pg_sleep(60)"))
    shop.assert_nothing_is_left()


async def test_a_task_that_still_uses_the_session_at_the_end_costs_the_branch(shop: Shop) -> None:
    tasks: list[asyncio.Task[object]] = []
    with pytest.raises(TransactionAborted, match="statement was still running"):
        async with shop.coordinator.transaction():
            (await shop.ledger.session()).add(Author(name="octavia"))
            connection = await shop.accounts.connection()
            session = await shop.accounts.session()
            session.add(Author(name="ursula"))
            await session.flush()
            tasks.append(asyncio.create_task(connection.execute("SELECT pg_sleep(60)")))
            while not connection.lock.locked():
                await asyncio.sleep(0)
    with pytest.raises(TransactionError):
        await tasks[0]
    shop.assert_nothing_is_left()


# A connection that breaks under a session: what SQLAlchemy itself would raise.


END_MYSELF = text("SELECT pg_terminate_backend(pg_backend_pid())")


@pytest.mark.parametrize("savepoint", [False, True])
async def test_a_connection_that_breaks_is_told_as_ever(shop: Shop, savepoint: bool) -> None:
    with pytest.raises(OperationalError, match="terminating connection") as raised:
        async with shop.coordinator.transaction():
            session = await shop.accounts.session()
            session.add(Author(name="ursula"))
            await session.flush()
            if savepoint:
                async with session.begin_nested():
                    await session.execute(END_MYSELF)
            await session.execute(END_MYSELF)
    assert raised.value.connection_invalidated
    shop.assert_nothing_is_left()
    async with shop.coordinator.transaction():
        (await shop.accounts.session()).add(Author(name="octavia"))
    assert shop.names[0] == ["octavia"]


@pytest.mark.parametrize("savepoint", [False, True])
async def test_a_connection_that_breaks_in_a_thread(shop: Shop, savepoint: bool) -> None:
    def work() -> None:
        with shop.coordinator.blocking.transaction():
            session = shop.accounts.blocking.session()
            session.add(Author(name="ursula"))
            session.flush()
            if savepoint:
                with session.begin_nested():
                    session.execute(END_MYSELF)
            session.execute(END_MYSELF)

    with pytest.raises(OperationalError, match="terminating connection"):
        await asyncio.to_thread(work)
    shop.assert_nothing_is_left()
