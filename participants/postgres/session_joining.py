"""Sessions and connections of SQLAlchemy that were made elsewhere, for the length of a transaction.

Until the outcome is told, the psycopg connection under them is held out of its pool, and the verbs
that would end the work are refused; afterwards everything is as it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import psycopg
from psycopg import BaseConnection
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import greenlet_spawn

from coordinator.errors import ConfigurationError, TransactionError
from coordinator.model import Outcome
from coordinator.transactional import GlobalTransaction
from participants.postgres.session_views import refusal_of
from participants.postgres.sessions import dialect_problem, other_database, prepare

OWNER = "SQLAlchemy"
"""Who rolls the psycopg connection back by itself, while it handles errors."""

_OPEN = (
    "has an open transaction, whose work so far would not be part of this one: commit it, or "
    "enlist before its first statement"
)


@asynccontextmanager
async def joining(
    candidate: object, transaction: GlobalTransaction
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Ready an AsyncSession or AsyncConnection for a branch of the transaction.

    Yields the psycopg connection under it, on which the block is to begin the branch; leaving it
    without an exception registers what is to happen around the end, and with one undoes everything.
    For a candidate that takes part in the transaction already it yields the same and changes
    nothing. Raises `ConfigurationError` for what can take no part, saying what to do instead, and
    what SQLAlchemy raises when it has no connection.
    """
    target = _target_of_async(candidate)
    if (guest := _taking_part(target, transaction)) is not None:
        yield guest.driver
        return
    guest = await greenlet_spawn(_guest_of, target, transaction)
    try:
        yield guest.driver
    except BaseException:
        await greenlet_spawn(guest.leave)
        raise

    async def flush() -> None:
        await greenlet_spawn(guest.prepare_commit)

    async def end(outcome: Outcome) -> None:
        await greenlet_spawn(guest.end, outcome)

    transaction.before_commit(flush)
    transaction.after_end(end)


@contextmanager
def joining_blocking(
    candidate: object, transaction: GlobalTransaction
) -> Iterator[psycopg.Connection[Any]]:
    """As `joining`, for a Session or Connection."""
    target = candidate() if isinstance(candidate, scoped_session) else candidate
    if isinstance(target, AsyncSession | AsyncConnection | async_scoped_session):
        raise ConfigurationError(
            f"{type(target).__name__} is asynchronous: enlist it with `await "
            "participant.enlist(...)` in an asynchronous function"
        )
    if (guest := _taking_part(target, transaction)) is not None:
        yield guest.driver
        return
    guest = _guest_of(target, transaction)
    try:
        yield guest.driver
    except BaseException:
        guest.leave()
        raise
    transaction.before_commit(guest.prepare_commit)
    transaction.after_end(guest.end)


def _target_of_async(candidate: object) -> object:
    if isinstance(candidate, async_scoped_session):
        candidate = candidate()
    if isinstance(candidate, AsyncSession):
        return candidate.sync_session
    if isinstance(candidate, AsyncConnection):
        if candidate.sync_connection is None:
            raise ConfigurationError(
                "the AsyncConnection was not started: write `await engine.connect()`, or `async "
                "with engine.connect() as connection`"
            )
        return candidate.sync_connection
    if isinstance(candidate, Session | Connection | scoped_session):
        raise ConfigurationError(
            f"{type(candidate).__name__} is synchronous: enlist it with "
            "`participant.blocking.enlist(...)` in a synchronous function"
        )
    return candidate


class _Guest:
    """What takes part, with its verbs shadowed. `driver` is the psycopg connection under it."""

    def __init__(
        self,
        target: Session | Connection,
        connection: Connection,
        transaction: GlobalTransaction,
    ) -> None:
        self.driver: Any = _driver_at_rest(connection, type(target).__name__)
        self.transaction = transaction
        self._connection = connection
        self._target = target
        self._wants_close = False
        self._shadowed: list[str] = []
        self._shadow("close", self._close_later)
        for verb in ("commit", "rollback", "invalidate"):
            self._shadow(verb, _refusing(f"{verb}()", type(target).__name__))
        _guests[target] = self

    def leave(self) -> None:
        """Make the user's object what it was."""
        for name in self._shadowed:
            vars(self._target).pop(name, None)
        self._shadowed.clear()
        _guests.pop(self._target, None)

    def prepare_commit(self) -> None:
        """A connection holds nothing back."""

    def end(self, outcome: Outcome) -> None:
        """Let SQLAlchemy's books say what the database says; nothing is sent."""
        self.leave()
        transaction = self._connection.get_transaction()
        if transaction is not None:
            with _silent(self.driver):
                if outcome is Outcome.COMMITTED:
                    transaction.commit()
                else:
                    transaction.rollback()
        if self._wants_close:
            self._target.close()

    def _shadow(self, name: str, method: Callable[..., Any]) -> None:
        vars(self._target)[name] = method
        self._shadowed.append(name)

    def _close_later(self) -> None:
        """Leaving the block that made it changes nothing: it is closed after the end."""
        self._wants_close = True


class _GuestSession(_Guest):
    """Works on one connection, which it does not give back to its pool before the end."""

    def __init__(self, session: Session, transaction: GlobalTransaction) -> None:
        bind = _bind_of(session)
        self._session = session
        self._is_borrowed = isinstance(bind, Engine)
        connection = bind.connect() if isinstance(bind, Engine) else bind
        try:
            super().__init__(session, connection, transaction)
        except BaseException:
            if self._is_borrowed:
                connection.close()
            raise
        self._find = session.get_bind
        self._shadow("get_bind", self._get_bind)
        self._shadow("reset", _refusing("reset()", "Session"))

    def leave(self) -> None:
        super().leave()
        if self._is_borrowed:
            self._connection.close()

    def prepare_commit(self) -> None:
        prepare(self._session)

    def end(self, outcome: Outcome) -> None:
        session = self._session
        try:
            with _silent(self.driver):
                if outcome is Outcome.COMMITTED:
                    Session.commit(session)
                else:
                    Session.rollback(session)
        finally:
            self.leave()
        if self._wants_close:
            session.close()

    def _get_bind(self, *args: Any, **options: Any) -> Connection:
        found = self._find(*args, **options)
        if found.engine.pool is not self._connection.engine.pool:
            raise other_database(found.engine)
        return self._connection


_guests: WeakKeyDictionary[Session | Connection, _Guest] = WeakKeyDictionary()
"""What takes part in a running transaction."""


def _taking_part(target: object, transaction: GlobalTransaction) -> _Guest | None:
    guest = _guests.get(target) if isinstance(target, Session | Connection) else None
    if guest is not None and guest.transaction is not transaction:
        raise TransactionError(
            f"the {type(target).__name__} takes part in another transaction already: give each one "
            "of its own"
        )
    return guest


def _guest_of(target: object, transaction: GlobalTransaction) -> _Guest:
    if isinstance(target, Session):
        return _GuestSession(target, transaction)
    if isinstance(target, Connection):
        _check_engine(target.engine, target)
        return _Guest(target, target, transaction)
    raise ConfigurationError(
        f"{type(target).__name__} cannot be enlisted: give a connection or session of SQLAlchemy, "
        "or a connection of psycopg"
    )


def _bind_of(session: Session) -> Engine | Connection:
    transaction = session.get_transaction()
    if session.in_nested_transaction() or (transaction is not None and transaction._connections):
        raise ConfigurationError(f"the {type(session).__name__} {_OPEN}")
    if session.twophase:
        raise ConfigurationError(
            "the session has twophase=True, a two-phase commit of its own: make it without"
        )
    try:
        bind = session.get_bind()
    except UnboundExecutionError as error:
        raise ConfigurationError(
            "the session is not bound to one engine: give it the engine of the participant's "
            "database with Session(bind=...)"
        ) from error
    _check_engine(bind.engine, session)
    if isinstance(bind, Connection) and bind.in_transaction():
        raise ConfigurationError(f"the Connection to which the session is bound {_OPEN}")
    return bind


def _check_engine(engine: Engine, target: object) -> None:
    if problem := dialect_problem(engine):
        raise ConfigurationError(f"the {type(target).__name__} cannot be enlisted: {problem}")


def _driver_at_rest(connection: Connection, what: str) -> Any:
    """The psycopg connection at the bottom, outside any transaction."""
    if connection.closed or connection.invalidated:
        raise ConfigurationError(f"the connection of the {what} is closed: make a new one")
    driver: Any = connection.connection.driver_connection
    if driver.autocommit:
        raise ConfigurationError(
            f"the {what} has isolation level AUTOCOMMIT, so that nothing could be rolled back: "
            "enlist one without"
        )
    if driver.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
        raise ConfigurationError(f"the {what} {_OPEN}")
    return driver


@contextmanager
def _silent(driver: BaseConnection[Any]) -> Iterator[None]:
    """While SQLAlchemy does its books nothing is sent, whatever state the connection is in."""
    own = vars(driver)
    former = {verb: own.get(verb) for verb in ("commit", "rollback")}

    async def nothing_async() -> None: ...

    def nothing() -> None: ...

    own.update(
        dict.fromkeys(
            former, nothing_async if isinstance(driver, psycopg.AsyncConnection) else nothing
        )
    )
    try:
        yield
    finally:
        for verb, method in former.items():
            del own[verb]
            if method is not None:
                own[verb] = method


def _refusing(verb: str, what: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise refusal_of(verb, what)

    return refuse
