"""SQLAlchemy's Session in a global transaction of a synchronous function, in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, make_url, select, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import DetachedInstanceError

from coordinator import Coordinator
from coordinator.errors import TransactionAborted, TransactionError
from participants.postgres import PostgreSQL
from participants.postgres.sessions import engine_problem
from tests.support.orm import Author, Book, Shop, create_tables, sqlalchemy_url, titles
from tests.support.postgres import query


@pytest.fixture
def shop(database: str, second_database: str) -> Iterator[Shop]:
    shop = Shop(database, second_database)
    try:
        yield shop
    finally:
        shop.coordinator.blocking.close()


def test_two_databases_commit_together_and_objects_stay_usable(shop: Shop) -> None:
    with shop.coordinator.blocking.transaction():
        with shop.accounts.blocking.session() as session:
            assert isinstance(session, Session)
            author = Author(name="ursula", books=[Book(title="one"), Book(title="two")])
            session.add(author)
        assert shop.accounts.blocking.session() is session
        shop.ledger.blocking.session().add(Author(name="ursula"))
    assert shop.names == [["ursula"], ["ursula"]]
    assert titles(shop.urls[0]) == ["one", "two"]
    assert author.id == 1 and [book.title for book in author.books] == ["one", "two"]


def test_one_branch_with_the_connection(shop: Shop) -> None:
    with shop.coordinator.blocking.transaction():
        session = shop.accounts.blocking.session()
        connection = shop.accounts.blocking.connection()
        connection.execute("INSERT INTO author (name) VALUES ('by hand')")
        session.scalars(select(Author)).one().name = "by both"
        session.flush()
        assert connection.execute("SELECT name FROM author").fetchall() == [("by both",)]
        assert session.connection().connection.driver_connection is connection
    assert shop.names[0] == ["by both"]


def test_lazy_loads_savepoints_and_isolation_level(shop: Shop) -> None:
    with shop.coordinator.blocking.transaction():
        session = shop.accounts.blocking.session()
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        options = {"isolation_level": "SERIALIZABLE", "postgresql_deferrable": True}
        session.connection(execution_options=options)
        level = text("SELECT current_setting('transaction_isolation')")
        assert session.scalar(level) == "serializable"
        author = Author(name="ursula", books=[Book(title="one")])
        session.add(author)
        session.flush()
        session.expire_all()
        assert [book.title for book in author.books] == ["one"]
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(Author(name="ursula"))
        with session.begin_nested():
            session.add(Author(name="octavia"))
        many = select(Author.name).order_by(Author.name).execution_options(yield_per=1)
        assert list(session.scalars(many)) == ["octavia", "ursula"]
    assert shop.names[0] == ["octavia", "ursula"]


VERBS: dict[str, Callable[[Session], object]] = {
    "commit()": lambda session: session.commit(),
    "rollback()": lambda session: session.rollback(),
    "close()": lambda session: session.close(),
    "reset()": lambda session: session.reset(),
    "invalidate()": lambda session: session.invalidate(),
    "begin()": lambda session: session.begin(),
    "connection commit()": lambda session: session.connection().commit(),
    "connection rollback()": lambda session: session.connection().rollback(),
    "connection close()": lambda session: session.connection().close(),
}


def test_verbs_that_would_end_it_are_refused_and_lose_nothing(shop: Shop) -> None:
    with shop.coordinator.blocking.transaction():
        session = shop.accounts.blocking.session()
        session.add(Author(name="flushed"))
        session.flush()
        session.add(Author(name="pending"))
        for verb, call in VERBS.items():
            with pytest.raises(TransactionError) as refused:
                call(session)
            assert verb.removeprefix("connection ") in str(refused.value)
        with session.connection():  # closes nothing
            pass
    assert shop.names[0] == ["flushed", "pending"]


def test_a_flush_error_reaches_the_caller_or_votes_no(shop: Shop) -> None:
    query(shop.urls[0], "INSERT INTO author (name) VALUES ('ursula')")
    with (
        pytest.raises(IntegrityError, match="author_name_key"),
        shop.coordinator.blocking.transaction(),
    ):
        shop.ledger.blocking.session().add(Author(name="ursula"))
        shop.accounts.blocking.session().add(Author(name="ursula"))
    with (
        pytest.raises(TransactionAborted, match="UniqueViolation"),
        shop.coordinator.blocking.transaction(),
    ):
        shop.ledger.blocking.session().add(Author(name="ursula"))
        session = shop.accounts.blocking.session()
        session.add(Author(name="ursula"))
        with pytest.raises(IntegrityError):
            session.flush()
    with (
        pytest.raises(TransactionAborted, match="book_title_key"),
        shop.coordinator.blocking.transaction(),
    ):
        books = [Book(title="one"), Book(title="one")]
        shop.accounts.blocking.session().add(Author(name="octavia", books=books))
        shop.ledger.blocking.session().add(Author(name="octavia"))
    assert shop.names == [["ursula"], []]


def test_events_see_the_true_outcome_and_the_session_is_over(shop: Shop) -> None:
    heard: list[tuple[str, list[list[str]]]] = []

    def work() -> tuple[Session, Author]:
        session = shop.accounts.blocking.session()
        for name in ("after_commit", "after_rollback"):
            event.listen(session, name, lambda _, name=name: heard.append((name, shop.names)))
        author = Author(name="ursula")
        session.add(author)
        session.flush()
        return session, author

    with pytest.raises(RuntimeError), shop.coordinator.blocking.transaction():
        stored = work()[1]
        raise RuntimeError
    shop.assert_nothing_is_left()
    assert stored.name == "ursula"  # as after a rollback: transient again
    with shop.coordinator.blocking.transaction():
        session, author = work()
    assert heard == [("after_rollback", [[], []]), ("after_commit", [["ursula"], []])]
    with pytest.raises(DetachedInstanceError):
        _ = author.books
    for use in (lambda: session.execute(text("SELECT 1")), session.commit, session.begin_nested):
        with pytest.raises(TransactionError, match="over"):
            use()
    session.close()


@pytest.mark.parametrize("kind", ["its own face", "the other face"])
def test_the_users_engine_gives_json_functions_level_and_options(database: str, kind: str) -> None:
    """Of an AsyncEngine the synchronous sessions have these, though not its dialect and events."""
    create_tables(database)
    create = create_engine if kind == "its own face" else create_async_engine
    engine = create(
        sqlalchemy_url(database),
        isolation_level="REPEATABLE READ",
        json_serializer=lambda value: '{"serialised": true}',
        json_deserializer=lambda value: ("deserialised", value),
        execution_options={"from": "the engine"},
    )
    accounts = PostgreSQL("accounts", engine)
    coordinator = Coordinator("memory:", cluster="shop", participants=[accounts])
    try:
        with coordinator.blocking.transaction():
            session = accounts.blocking.session()
            session.add(Author(name="ursula", books=[Book(title="one", facts={"pages": 1})]))
            session.flush()
            session.expire_all()
            stored = session.scalars(select(Book.facts)).one()
            assert stored == ("deserialised", b'{"serialised": true}')
            level = session.scalar(text("SELECT current_setting('transaction_isolation')"))
            assert level == "repeatable read"
            assert session.connection().get_execution_options()["from"] == "the engine"
    finally:
        coordinator.blocking.close()
    assert query(database, "SELECT facts FROM book") == [({"serialised": True},)]


def test_engines_that_cannot_be_used_are_refused_by_their_driver(database: str) -> None:
    url = sqlalchemy_url(database)
    for engine in (
        create_engine(url),
        create_engine(url, poolclass=NullPool),
        create_async_engine(url),
        create_engine(url).execution_options(isolation_level="SERIALIZABLE"),
    ):
        assert engine_problem(engine) == ""
    assert "sqlite+pysqlite" in engine_problem(create_engine("sqlite://"))
    assert "postgresql+psycopg://" in engine_problem(create_engine("sqlite://"))
    assert "postgresql+asyncpg" in engine_problem(_of_driver("asyncpg"))
    assert "AUTOCOMMIT" in engine_problem(create_engine(url, isolation_level="AUTOCOMMIT"))
    options = {"isolation_level": "AUTOCOMMIT"}
    assert "AUTOCOMMIT" in engine_problem(create_engine(url).execution_options(**options))
    assert "AsyncEngine itself" in engine_problem(create_async_engine(url).sync_engine)
    assert "no engine" in engine_problem(url)
    assert "no engine" in engine_problem(make_url(url))


def _of_driver(driver: str) -> Engine:
    """An engine as a driver that is not installed here would have made it."""
    engine = create_engine("postgresql+psycopg://")
    dialect = DefaultDialect()
    dialect.name, dialect.driver = "postgresql", driver
    engine.dialect = dialect
    return engine
