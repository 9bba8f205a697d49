"""Sessions and connections of SQLAlchemy that somebody else made, and the other verbs' way out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import (
    Engine,
    NullPool,
    create_engine,
    event,
    select,
    text,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from coordinator.errors import ConfigurationError, TransactionAborted, TransactionError
from tests.support.orm import Author, Book, Shop, sqlalchemy_url
from tests.support.postgres import query


class SharedShop(Shop):
    """With an engine of somebody's on the first database, of one connection."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first, second)
        self.engine = create_async_engine(sqlalchemy_url(first), pool_size=1, max_overflow=0)
        self.transaction = self.coordinator.transaction

    @property
    def checked_out(self) -> int:
        return self.engine.pool.checkedout()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
async def shop(database: str, second_database: str) -> AsyncIterator[SharedShop]:
    shop = SharedShop(database, second_database)
    async with shop.coordinator:
        yield shop
    await shop.engine.dispose()


# The ordinary way: a framework makes the session before, and closes it later.


async def test_a_session_takes_part_and_is_its_owners_again(shop: SharedShop) -> None:
    async with AsyncSession(shop.engine) as session:
        for attempt in ("ursula", "octavia"):
            session.add(Author(name=attempt))  # before it takes part: pending is not work yet
            async with shop.transaction():
                await shop.accounts.enlist(session)
                await shop.accounts.enlist(session)  # twice is harmless
                (await shop.ledger.session()).add(Author(name=attempt))
                await session.flush()
                connection = await shop.accounts.connection()
                cursor = await connection.execute("SELECT count(*) FROM author")
                assert await cursor.fetchone() == (len(shop.names[0]) + 1,)
            assert attempt in shop.names[0] and shop.names[0] == shop.names[1]
        # And then it is an ordinary session: it commits, rolls back and closes for itself.
        session.add(Author(name="samuel"))
        await session.commit()
        session.add(Author(name="nobody"))
        await session.rollback()
    assert shop.names == [["octavia", "samuel", "ursula"], ["octavia", "ursula"]]
    assert shop.checked_out == 0


async def test_an_abort_is_a_rollback_of_the_session(shop: SharedShop) -> None:
    heard: list[str] = []
    session = AsyncSession(shop.engine)
    for name in ("after_commit", "after_rollback"):
        event.listen(session.sync_session, name, lambda _, name=name: heard.append(name))
    author = Author(name="ursula")
    with pytest.raises(RuntimeError):
        async with shop.transaction():
            await shop.accounts.enlist(session)
            session.add(author)
            await session.flush()
            raise RuntimeError
    assert heard == ["after_rollback"] and author not in session
    shop.assert_nothing_is_left()
    session.add(Author(name="octavia"))
    await session.commit()
    await session.close()
    assert shop.names[0] == ["octavia"]


async def test_a_connection_that_breaks_after_the_vote_changes_no_outcome(shop: SharedShop) -> None:
    heard: list[str] = []
    async with AsyncSession(shop.engine) as session:
        event.listen(session.sync_session, "after_commit", lambda _: heard.append("commit"))
        async with shop.transaction() as transaction:
            # Registered first, so that it runs before the session hears of the outcome.
            transaction.after_end(lambda _: raw.driver_connection.pgconn.finish())
            await shop.accounts.enlist(session)
            raw: Any = await (await session.connection()).get_raw_connection()
            (await shop.ledger.session()).add(Author(name="ursula"))
            session.add(Author(name="ursula"))
        assert heard == ["commit"] and shop.names == [["ursula"], ["ursula"]]
        assert await session.scalar(select(Author.name)) == "ursula"  # on a new connection


async def test_leaving_the_block_that_made_it_changes_nothing(shop: SharedShop) -> None:
    async with shop.transaction():
        async with AsyncSession(shop.engine) as session:
            await shop.accounts.enlist(session)
            session.add(Author(name="ursula"))
        assert shop.checked_out == 1
    assert shop.names[0] == ["ursula"]
    assert shop.checked_out == 0
    assert not list(session)  # closed since


async def test_a_connection_takes_part(shop: SharedShop) -> None:
    insert = "INSERT INTO author (name) VALUES ('%s')"
    async with shop.engine.connect() as connection:
        async with shop.transaction():
            await shop.accounts.enlist(connection)
            await shop.accounts.enlist(connection)
            await connection.execute(text(insert % "ursula"))
            for verb in ("commit", "rollback", "invalidate"):
                with pytest.raises(TransactionError, match=f"{verb}\\(\\)"):
                    await getattr(connection, verb)()
            (await shop.ledger.session()).add(Author(name="ursula"))
        assert shop.names == [["ursula"], ["ursula"]]
        with pytest.raises(RuntimeError):
            async with shop.transaction():
                await shop.accounts.enlist(connection)
                await connection.execute(text(insert % "nobody"))
                raise RuntimeError
        await connection.execute(text(insert % "octavia"))
        await connection.commit()
    async with shop.engine.begin() as connection, shop.transaction():
        await shop.accounts.enlist(connection)
        await connection.execute(text(insert % "samuel"))
    assert shop.names[0] == ["octavia", "samuel", "ursula"]


async def test_the_isolation_level_of_the_engine_holds(shop: SharedShop) -> None:
    engine = create_async_engine(sqlalchemy_url(shop.urls[0]), isolation_level="SERIALIZABLE")
    async with AsyncSession(engine) as session, shop.transaction():
        await shop.accounts.enlist(session)
        level = text("SELECT current_setting('transaction_isolation')")
        assert await session.scalar(level) == "serializable"
    await engine.dispose()


# What is refused while it takes part.


VERBS: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
    "commit()": lambda session: session.commit(),
    "rollback()": lambda session: session.rollback(),
    "reset()": lambda session: session.reset(),
    "invalidate()": lambda session: session.invalidate(),
}


async def test_verbs_that_would_end_it_are_refused_and_lose_nothing(shop: SharedShop) -> None:
    async with AsyncSession(shop.engine) as session, shop.transaction():
        await shop.accounts.enlist(session)
        session.add(Author(name="flushed"))
        await session.flush()
        session.add(Author(name="pending"))
        for verb, call in VERBS.items():
            with pytest.raises(TransactionError) as refused:
                await call(session)
            assert verb in str(refused.value)
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                session.add(Author(name="flushed"))
        async with session.begin_nested():
            session.add(Author(name="nested"))
    assert shop.names[0] == ["flushed", "nested", "pending"]


async def test_the_end_of_a_begin_block_inside_the_transaction_is_refused(shop: SharedShop) -> None:
    with pytest.raises(TransactionError, match="commit"):
        async with shop.transaction(), AsyncSession(shop.engine) as session, session.begin():
            await shop.accounts.enlist(session)
            session.add(Author(name="ursula"))
    shop.assert_nothing_is_left()
    assert shop.checked_out == 0


async def test_a_begin_block_around_the_transaction_finds_it_committed(shop: SharedShop) -> None:
    """As of a framework's dependency that begins, yields its session, and commits afterwards."""
    async with async_sessionmaker(shop.engine).begin() as session, shop.transaction():
        await shop.accounts.enlist(session)
        session.add(Author(name="ursula"))
    assert shop.names[0] == ["ursula"]
    assert shop.checked_out == 0


async def test_a_swallowed_flush_error_votes_no(shop: SharedShop) -> None:
    query(shop.urls[0], "INSERT INTO author (name) VALUES ('ursula')")
    async with AsyncSession(shop.engine) as session:
        with pytest.raises(TransactionAborted, match="duplicate key"):
            async with shop.transaction():
                await shop.accounts.enlist(session)
                (await shop.ledger.session()).add(Author(name="octavia"))
                session.add(Author(name="ursula"))
                with pytest.raises(IntegrityError):
                    await session.flush()
        assert await session.scalar(select(Author.name)) == "ursula"
    assert shop.names == [["ursula"], []]


async def test_a_flush_that_fails_in_python_votes_no(shop: SharedShop) -> None:
    @event.listens_for(Book, "before_insert")
    def refuse(*_: object) -> None:
        raise ValueError("no books")

    try:
        async with AsyncSession(shop.engine) as session:
            with pytest.raises(TransactionAborted, match="rolled back by SQLAlchemy"):
                async with shop.transaction():
                    await shop.accounts.enlist(session)
                    session.add(Author(name="ursula", books=[Book(title="one")]))
                    with pytest.raises(ValueError, match="no books"):
                        await session.flush()
    finally:
        event.remove(Book, "before_insert", refuse)
    shop.assert_nothing_is_left()


async def test_a_flush_error_before_the_commit_reaches_the_caller(shop: SharedShop) -> None:
    query(shop.urls[0], "INSERT INTO author (name) VALUES ('ursula')")
    async with AsyncSession(shop.engine) as session:
        with pytest.raises(IntegrityError, match="author_name_key"):
            async with shop.transaction():
                await shop.accounts.enlist(session)
                (await shop.ledger.session()).add(Author(name="octavia"))
                session.add(Author(name="ursula"))
    assert shop.names == [["ursula"], []]


async def test_a_session_of_several_databases_is_kept_to_its_branch(shop: SharedShop) -> None:
    other = create_async_engine(sqlalchemy_url(shop.urls[1]))
    session = AsyncSession(shop.engine, binds={Book: other})
    with pytest.raises(TransactionError, match="not the database of its branch"):
        async with shop.transaction():
            await shop.accounts.enlist(session)
            session.add(Author(name="ursula"))
            await session.execute(select(Book))
    await session.close()
    await other.dispose()
    shop.assert_nothing_is_left()


# What cannot take part, and how it is told.


async def refused(
    shop: SharedShop, candidate: object, match: str, kind: type[Exception] = ConfigurationError
) -> None:
    with pytest.raises(kind, match=match):
        async with shop.transaction():
            await shop.accounts.enlist(candidate)
    assert shop.checked_out <= 1


async def test_a_session_with_an_open_transaction_is_refused_and_unchanged(
    shop: SharedShop,
) -> None:
    async with AsyncSession(shop.engine) as session:
        session.add(Author(name="ursula"))
        await session.flush()
        await refused(shop, session, "open transaction")
        await session.commit()
        async with session.begin_nested():
            await refused(shop, session, "open transaction")
        await session.rollback()
        session.add(Author(name="octavia"))
        await refused(shop, AsyncSession(shop.engine, twophase=True), "twophase")
        await refused(shop, AsyncSession(), "not bound to one engine")
        await session.commit()
    async with shop.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await refused(shop, connection, "open transaction")
        await connection.rollback()
        bound = AsyncSession(connection)
        await connection.begin()
        await refused(shop, bound, "open transaction")
    await refused(shop, connection, "closed")
    assert shop.names[0] == ["octavia", "ursula"]


async def test_what_leads_elsewhere_is_refused_and_given_back(shop: SharedShop) -> None:
    elsewhere = create_async_engine(sqlalchemy_url(shop.urls[1]))
    async with AsyncSession(elsewhere) as session:
        session.add(Author(name="pending"))
        await refused(shop, session, "leads to database")
        assert len(session.new) == 1  # what it held is still there
        await session.commit()
        with pytest.raises(TransactionError, match="in this transaction already"):
            async with shop.transaction():
                await shop.ledger.connection()
                await shop.ledger.enlist(session)
        await session.commit()
    assert elsewhere.pool.checkedout() == 0  # type: ignore[attr-defined]
    await elsewhere.dispose()
    assert shop.names == [[], ["pending"]]


async def test_one_session_cannot_serve_two_transactions_at_once(shop: SharedShop) -> None:
    async with AsyncSession(shop.engine) as session, shop.transaction():
        await shop.accounts.enlist(session)
        with pytest.raises(TransactionError, match="another transaction"):
            async with shop.coordinator.transaction(propagation="requires_new"):
                await shop.accounts.enlist(session)
        session.add(Author(name="ursula"))
    assert shop.names[0] == ["ursula"]


async def test_other_things_are_refused_by_name(shop: SharedShop) -> None:
    await refused(shop, object(), "what can be enlisted")
    await refused(shop, shop.engine, "AsyncEngine cannot be enlisted")
    await refused(shop, shop.engine.connect(), "not started")
    autocommit = shop.engine.execution_options(isolation_level="AUTOCOMMIT")
    await refused(shop, AsyncSession(autocommit), "AUTOCOMMIT")
    synchronous = create_engine(sqlalchemy_url(shop.urls[0]), poolclass=NullPool)
    await refused(shop, Session(synchronous), "blocking.enlist")
    with synchronous.connect() as connection:
        await refused(shop, connection, "blocking.enlist")


# Synchronous functions.


def test_a_synchronous_session_takes_part(database: str, second_database: str) -> None:
    shop = SharedShop(database, second_database)
    engine = create_engine(sqlalchemy_url(database), pool_size=1, max_overflow=0)
    registry = scoped_session(sessionmaker(engine))
    transaction = shop.coordinator.blocking.transaction
    try:
        with transaction():
            shop.accounts.blocking.enlist(registry)
            registry.add(Author(name="ursula"))
            shop.ledger.blocking.session().add(Author(name="ursula"))
            with pytest.raises(TransactionError, match="commit"):
                registry.commit()
            registry.remove()  # a framework's teardown: nothing is lost by it
        assert shop.names == [["ursula"], ["ursula"]]
        with pytest.raises(RuntimeError), Session(engine) as session, transaction():
            shop.accounts.blocking.enlist(session)
            session.add(Author(name="nobody"))
            session.flush()
            raise RuntimeError
        with engine.connect() as connection, transaction():
            shop.accounts.blocking.enlist(connection)
            connection.execute(text("INSERT INTO author (name) VALUES ('octavia')"))
            with pytest.raises(TransactionError, match="rollback"):
                connection.rollback()
        with pytest.raises(ConfigurationError, match="asynchronous"), transaction():
            shop.accounts.blocking.enlist(AsyncSession(shop.engine))
        with Session(engine) as session:
            session.add(Author(name="samuel"))
            session.commit()
    finally:
        shop.coordinator.blocking.close()
        engine.dispose()
    assert shop.names == [["octavia", "samuel", "ursula"], ["ursula"]]


async def test_a_scoped_session_is_looked_through(shop: SharedShop) -> None:
    registry: Any = async_scoped_session(async_sessionmaker(shop.engine), lambda: "here")
    async with shop.transaction():
        await shop.accounts.enlist(registry)
        registry.add(Author(name="ursula"))
        await registry.remove()
    assert shop.names[0] == ["ursula"]


async def test_a_framework_that_looks_for_engines_by_itself(shop: SharedShop) -> None:
    class Routing(Session):
        """As sessions that choose an engine for each statement do."""

        engine: AsyncEngine

        def get_bind(self, *_: object, **__: object) -> Engine:
            return self.engine.sync_engine

    Routing.engine = shop.engine
    async with AsyncSession(sync_session_class=Routing) as session, shop.transaction():
        await shop.accounts.enlist(session)
        session.add(Author(name="ursula"))
    assert shop.names[0] == ["ursula"]
