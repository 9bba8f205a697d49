"""SQLAlchemy's AsyncSession in a global transaction: what it does there, and what it cannot do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, selectinload
from sqlalchemy.orm.exc import DetachedInstanceError

from coordinator import Coordinator
from coordinator.errors import TransactionAborted, TransactionError
from participants.postgres import PostgreSQL
from participants.postgres.channel import Channel
from tests.support.orm import Author, Book, Shop, create_tables, sqlalchemy_url, titles
from tests.support.postgres import query


@pytest.fixture
async def shop(database: str, second_database: str) -> AsyncIterator[Shop]:
    shop = Shop(database, second_database)
    async with shop.coordinator:
        yield shop


async def test_two_databases_commit_together_and_objects_stay_usable(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        async with shop.accounts.session() as session:
            assert isinstance(session, AsyncSession)
            author = Author(name="ursula", books=[Book(title="one"), Book(title="two")])
            session.add(author)
        (await shop.ledger.session()).add(Author(name="ursula"))
        assert shop.names == [[], []]
    assert shop.names == [["ursula"], ["ursula"]]
    assert titles(shop.urls[0]) == ["one", "two"]
    # Nothing has expired: what was loaded can be read without a database.
    assert author.id == 1 and [book.title for book in author.books] == ["one", "two"]


async def test_an_exception_leaves_nothing_anywhere(shop: Shop) -> None:
    with pytest.raises(RuntimeError, match="changed my mind"):
        async with shop.coordinator.transaction():
            for participant in (shop.accounts, shop.ledger):
                session = await participant.session()
                session.add(Author(name="ursula"))
                await session.flush()
            raise RuntimeError("changed my mind")
    shop.assert_nothing_is_left()


async def test_one_branch_with_the_connection_and_asked_twice_one_session(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        assert await shop.accounts.session() is session
        connection = await shop.accounts.connection()
        await connection.execute("INSERT INTO author (name) VALUES ('by hand')")
        found = (await session.scalars(select(Author))).one()
        found.name = "by both"
        await session.flush()
        cursor = await connection.execute("SELECT name FROM author")
        assert await cursor.fetchall() == [("by both",)]
        raw = await (await session.connection()).get_raw_connection()
        assert raw.driver_connection is connection
    assert shop.names[0] == ["by both"]


async def test_rows_are_tuples_whatever_the_connection_makes_of_them(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        connection = await shop.accounts.connection()
        connection.row_factory = psycopg.rows.dict_row  # type: ignore[assignment]
        session = await shop.accounts.session()
        session.add(Author(name="ursula"))
        assert (await session.execute(select(Author.name))).all() == [("ursula",)]


async def test_what_sessions_do(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        author = Author(name="ursula", books=[Book(title=str(n)) for n in range(3)])
        session.add(author)
        await session.flush()
        key = author.id
        session.expire_all()
        assert await session.get(Author, key) is author
        assert len(await author_books(session, author)) == 3
        streamed = [row async for row in await session.stream_scalars(select(Book.title))]
        assert sorted(streamed) == ["0", "1", "2"]
        await session.execute(text("UPDATE author SET name = 'le guin'"))
        await session.refresh(author)
        assert author.name == "le guin"
        await session.delete((await author_books(session, author))[0])
        assert await session.scalar(select(func.count()).select_from(Book)) == 2
        eager = select(Author).options(selectinload(Author.books))
        again = eager.execution_options(populate_existing=True)
        assert len((await session.scalars(again)).one().books) == 2
    assert shop.names[0] == ["le guin"] and len(titles(shop.urls[0])) == 2


async def author_books(session: AsyncSession, author: Author) -> list[Book]:
    """By a lazy load."""
    return await session.run_sync(lambda _: list(author.books))


async def test_a_caught_error_in_a_savepoint_costs_only_the_savepoint(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        session.add(Author(name="ursula"))
        await session.flush()
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                session.add(Author(name="ursula"))
        async with session.begin_nested():
            session.add(Author(name="octavia"))
        savepoint = await session.begin_nested()
        session.add(Author(name="taken back"))
        await savepoint.rollback()
        await session.begin_nested()  # left open: the commit releases it
        session.add(Author(name="samuel"))
    assert shop.names[0] == ["octavia", "samuel", "ursula"]


async def test_the_isolation_level_can_be_chosen_before_the_first_statement(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        for participant, options in (
            (shop.accounts, {"isolation_level": "SERIALIZABLE", "postgresql_deferrable": True}),
            (shop.ledger, {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}),
        ):
            session = await participant.session()
            await session.connection(execution_options=options)
        level = text("SELECT current_setting('transaction_isolation')")
        assert await (await shop.accounts.session()).scalar(level) == "serializable"
        assert await (await shop.ledger.session()).scalar(level) == "repeatable read"
        (await shop.accounts.session()).add(Author(name="ursula"))
    assert shop.names == [["ursula"], []]


async def test_autocommit_is_refused(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        session.add(Author(name="ursula"))
    assert shop.names[0] == ["ursula"]


async def test_a_session_costs_no_round_trip_of_its_own(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges: list[None] = []
    original = Channel._await

    def counted(*args: Any) -> None:
        exchanges.append(None)
        original(*args)

    async def cost(work: Callable[[], Awaitable[object]]) -> int:
        async with shop.coordinator.transaction():  # what only a first time costs
            await work()
        before = len(exchanges)
        async with shop.coordinator.transaction():
            await work()
        return len(exchanges) - before

    async def with_connection() -> None:
        await (await shop.accounts.connection()).execute("UPDATE author SET name = name")

    async def with_session() -> None:
        await (await shop.accounts.session()).execute(text("UPDATE author SET name = name"))

    async def with_idle_session() -> None:
        await shop.accounts.session()
        await (await shop.accounts.connection()).execute("UPDATE author SET name = name")

    monkeypatch.setattr(Channel, "_await", counted)
    costs = [await cost(work) for work in (with_connection, with_session, with_idle_session)]
    assert costs == [costs[0]] * 3 and costs[0] > 2


# Events, and the time after.


async def test_events_and_objects_see_the_true_outcome(shop: Shop) -> None:
    heard: list[str] = []

    def listen(session: Session) -> None:
        for name in ("before_commit", "after_commit", "after_rollback", "after_soft_rollback"):
            event.listen(session, name, lambda *_, name=name: heard.append(name))

    @event.listens_for(Session, "before_flush")
    def add_one_more(session: Session, *_: object) -> None:
        heard.append("before_flush")

    async def run(fail: bool) -> Author:
        heard.clear()
        async with shop.coordinator.transaction() as transaction:
            session = await shop.accounts.session()
            listen(session.sync_session)
            author = Author(name="ursula")
            session.add(author)
            if fail:
                await session.flush()
                transaction.abort("enough")
        return author

    try:
        with pytest.raises(TransactionAborted, match="enough"):
            await run(fail=True)
        assert heard == ["before_flush", "after_rollback", "after_soft_rollback"]
        author = await run(fail=False)
        assert heard == ["before_commit", "before_flush", "after_commit"]
        assert author.name == "ursula"
    finally:
        event.remove(Session, "before_flush", add_one_more)


async def test_before_commit_still_writes_and_after_commit_runs_when_it_is_visible(
    shop: Shop,
) -> None:
    seen: list[list[str]] = []
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        event.listen(
            session.sync_session, "before_commit", lambda sync: sync.add(Author(name="audit"))
        )
        event.listen(session.sync_session, "after_commit", lambda _: seen.extend(shop.names))
        (await shop.ledger.session()).add(Author(name="octavia"))
    assert seen == [["audit"], ["octavia"]]


async def test_after_the_end_every_use_is_refused(shop: Shop) -> None:
    async with shop.coordinator.transaction():
        session = await shop.accounts.session()
        author = Author(name="ursula", books=[Book(title="one")])
        session.add(author)
    over = pytest.raises(TransactionError, match="over")
    for use in (
        lambda: session.execute(text("SELECT 1")),
        lambda: session.get(Author, 1),
        lambda: session.connection(),
        lambda: session.begin_nested().start(),
        lambda: session.commit(),
        lambda: session.rollback(),
    ):
        with over:
            await use()
    with over:
        session.add(Author(name="too late"))
    await session.close()  # a framework may do so once more
    assert shop.names[0] == ["ursula"]


async def test_an_aborted_object_is_as_after_a_rollback(shop: Shop) -> None:
    query(shop.urls[0], "INSERT INTO author (name) VALUES ('ursula')")
    with pytest.raises(RuntimeError):
        async with shop.coordinator.transaction():
            session = await shop.accounts.session()
            stored = (await session.scalars(select(Author))).one()
            stored.name = "changed"
            new = Author(name="octavia")
            session.add(new)
            await session.flush()
            raise RuntimeError
    with pytest.raises(DetachedInstanceError):  # and expired
        _ = stored.name
    assert new.id is not None and new not in session


# Engines.


async def test_the_users_engine_gives_dialect_options_and_events(
    database: str, second_database: str
) -> None:
    create_tables(database)
    engine = create_async_engine(
        sqlalchemy_url(database),
        isolation_level="REPEATABLE READ",
        json_serializer=lambda value: '{"serialised": true}',
        json_deserializer=lambda value: ("deserialised", value),
        execution_options={"from": "the engine"},
    )
    statements: list[str] = []
    event.listen(
        engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    accounts = PostgreSQL("accounts", engine)
    coordinator = Coordinator("memory:", cluster="shop", participants=[accounts])
    async with coordinator, coordinator.transaction():
        session = await accounts.session()
        session.add(Author(name="ursula", books=[Book(title="one", facts={"pages": 1})]))
        await session.flush()
        session.expire_all()
        assert (await session.scalars(select(Book.facts))).one() == (
            "deserialised",
            b'{"serialised": true}',
        )
        level = await session.scalar(text("SELECT current_setting('transaction_isolation')"))
        assert level == "repeatable read"
        connection = await session.connection()
        assert connection.sync_connection is not None
        assert connection.sync_connection.get_execution_options()["from"] == "the engine"
    await engine.dispose()
    assert query(database, "SELECT facts FROM book") == [({"serialised": True},)]
    assert any(statement.startswith("INSERT INTO author") for statement in statements)
