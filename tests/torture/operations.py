"""What a client does, drawn by its seed, and how it is done on both faces.

An operation moves money between accounts in one branch or two, and leaves a marker row for every
change in the same branch. Some are meant to fail: by the work's own will, by a vote against, by
their deadline, or because their caller is cancelled.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import msgspec
import psycopg
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from coordinator import (
    AlreadyDecided,
    ConfigurationError,
    Coordinator,
    HeuristicOutcome,
    LogUnavailable,
    OutcomeUnknown,
    ProtocolError,
    TransactionAborted,
    TransactionError,
)
from coordinator.transactional import GlobalTransaction
from participants.postgres import DatabaseUnavailable, PostgreSQL
from tests.torture.values import DATABASES, Change

KEY_SECONDS = 3.0
"""For so long the same few keys are drawn by all clients; they repeat those of the time before."""
KEYS_AT_A_TIME = 4

MOVE = "UPDATE account SET balance = balance + {amount} WHERE id = {account}"
LOOK = "SELECT sum(balance) FROM account"
REFUSE = "INSERT INTO refused (note) VALUES ('twice'), ('twice')"
TABLES = """
CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0));
CREATE TABLE marker (place bigserial PRIMARY KEY, op text NOT NULL, change int NOT NULL,
    account int NOT NULL, amount int NOT NULL, transaction text, key text);
CREATE TABLE refused (note text UNIQUE DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE planted (note text);
"""


class Base(DeclarativeBase):
    pass


class MarkerRow(Base):
    __tablename__ = "marker"
    place: Mapped[int] = mapped_column(primary_key=True)
    op: Mapped[str]
    change: Mapped[int]
    account: Mapped[int]
    amount: Mapped[int]
    transaction: Mapped[str | None]
    key: Mapped[str | None]


class Unwanted(Exception):
    """The work's own reason to abort."""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do. `fate` is what is to happen to it of its own, most often nothing."""

    op: str
    changes: tuple[Change, ...]
    reads: tuple[str, ...] = ()
    seconds: float
    sessions: bool = False
    decorated: bool = False
    joined: bool = False
    savepoint: bool = False
    attempts: int = 1
    key: str | None = None
    fate: str = "none"
    after: float = 0.0

    @property
    def publishes(self) -> bool:
        return not self.decorated

    @property
    def how(self) -> str:
        """For people who read a history."""
        words = ["session" if self.sessions else "connection"]
        words.append("decorated" if self.decorated else "block")
        words += [name for name in ("joined", "savepoint") if getattr(self, name)]
        words += [f"reads {name}" for name in self.reads]
        words += [self.fate] if self.fate != "none" else []
        return ", ".join(words)


def draw_operation(
    draw: random.Random, op: str, accounts: int, elapsed: float, *, blocking: bool
) -> Operation:
    """The next operation of a client; `elapsed` is the seconds since the run began."""
    fates = ["none"] * 72 + ["raise"] * 8 + ["doom"] * 4 + ["vote no"] * 6 + ["slow"] * 4
    fates += ["slow"] * 3 if blocking else ["cancel"] * 3
    fate = draw.choice(fates)
    decorated = fate not in ("doom", "cancel") and draw.random() < 0.5
    changes, reads = _changes(draw, accounts)
    key = None
    if draw.random() < 0.12:
        window = max(int(elapsed / KEY_SECONDS) - draw.randrange(2), 0)
        key = f"{window}.{draw.randrange(KEYS_AT_A_TIME)}"
    seconds = 0.5 if fate == "slow" else draw.choice((0.5, 2.0, 3.0, 3.0, 5.0))
    return Operation(
        op=op,
        changes=changes,
        reads=reads,
        seconds=seconds,
        sessions=draw.random() < 0.3,
        decorated=decorated,
        joined=draw.random() < 0.1,
        savepoint=draw.random() < 0.1,
        attempts=3 if decorated and draw.random() < 0.3 else 1,
        key=key,
        fate=fate,
        after=draw.uniform(0.8, 1.3) * seconds if fate == "slow" else draw.uniform(0, 0.03),
    )


def _changes(draw: random.Random, accounts: int) -> tuple[tuple[Change, ...], tuple[str, ...]]:
    """What it moves, and where it only looks. The amounts are zero together."""
    shape = draw.choices(("two", "wide", "one", "one and look", "look"), (60, 10, 15, 10, 5))[0]
    here, there = draw.sample(DATABASES, 2)
    amount = draw.randint(1, 5)

    def change(database: str, amount: int) -> Change:
        return Change(database, draw.randrange(accounts), amount)

    if shape == "look":
        return (), (here, there)
    changes = [change(here, -amount)]
    if shape in ("two", "wide"):
        changes.append(change(there, amount))
    else:
        changes.append(change(here, amount))
    if shape == "wide":
        changes += [change(here, amount), change(there, -amount)]
    return tuple(changes), (there,) if shape == "one and look" else ()


# The work itself, in words that both kinds of connection and session understand.


def _marker(operation: Operation, number: int, transaction: str | None) -> dict[str, Any]:
    change = operation.changes[number]
    return {
        "op": operation.op,
        "change": number,
        "account": change.account,
        "amount": change.amount,
        "transaction": transaction,
        "key": operation.key,
    }


MARK = (
    "INSERT INTO marker (op, change, account, amount, transaction, key) VALUES "
    "(%(op)s, %(change)s, %(account)s, %(amount)s, %(transaction)s, %(key)s)"
)


class AsyncFace:
    """Operations on an event loop. `ids` gets the id of each that reads it, while it runs."""

    def __init__(
        self, coordinator: Coordinator, participants: dict[str, PostgreSQL], ids: dict[str, str]
    ) -> None:
        self._coordinator = coordinator
        self._participants = participants
        self._ids = ids

    async def run(self, operation: Operation) -> str:
        """Returns what the transaction returned: the name of the operation that was applied."""
        if operation.fate == "cancel":
            task = asyncio.ensure_future(self._run(operation))
            asyncio.get_running_loop().call_later(operation.after, task.cancel)
            return await task
        return await self._run(operation)

    async def _run(self, operation: Operation) -> str:
        if not operation.decorated:
            scope = self._coordinator.transaction(timeout=operation.seconds, key=operation.key)
            async with scope as transaction:
                await self._work(operation, transaction)
            return operation.op

        async def body() -> str:
            await self._work(operation, None)
            return operation.op

        decorate = self._coordinator.transactional(**_how(operation))
        return str(await decorate(body)())

    async def _work(self, operation: Operation, transaction: GlobalTransaction | None) -> None:
        name = None
        if transaction is not None:
            name = self._ids[operation.op] = transaction.id
        for number in range(len(operation.changes)):
            if operation.joined and number == len(operation.changes) - 1:
                join = self._coordinator.transactional(self._change)
                await join(operation, number, name)
            else:
                await self._change(operation, number, name)
        for database in operation.reads:
            await self._execute(operation, database, LOOK)
        if operation.fate == "vote no":
            database = operation.changes[0].database if operation.changes else DATABASES[0]
            await self._execute(operation, database, REFUSE)
        if operation.fate == "slow":
            await asyncio.sleep(operation.after)
        if operation.fate == "raise":
            raise Unwanted
        if operation.fate == "doom" and transaction is not None:
            transaction.abort("doomed by its own")

    async def _change(self, operation: Operation, number: int, transaction: str | None) -> None:
        change, marker = operation.changes[number], _marker(operation, number, transaction)
        move = MOVE.format(amount=change.amount, account=change.account)
        participant = self._participants[change.database]
        if operation.sessions:
            session = await participant.session()
            if operation.savepoint:
                async with session.begin_nested():
                    await session.execute(text(move))
            else:
                await session.execute(text(move))
            session.add(MarkerRow(**marker))
            return
        connection = await participant.connection()
        if operation.savepoint:
            async with connection.transaction():
                await connection.execute(move.encode())
        else:
            await connection.execute(move.encode())
        await connection.execute(MARK, marker)

    async def _execute(self, operation: Operation, database: str, statement: str) -> None:
        participant = self._participants[database]
        if operation.sessions:
            await (await participant.session()).execute(text(statement))
        else:
            await (await participant.connection()).execute(statement.encode())


class BlockingFace:
    """The same operations in a thread without an event loop."""

    def __init__(
        self, coordinator: Coordinator, participants: dict[str, PostgreSQL], ids: dict[str, str]
    ) -> None:
        self._coordinator = coordinator
        self._participants = participants
        self._ids = ids

    def run(self, operation: Operation) -> str:
        if not operation.decorated:
            blocking = self._coordinator.blocking
            scope = blocking.transaction(timeout=operation.seconds, key=operation.key)
            with scope as transaction:
                self._work(operation, transaction)
            return operation.op

        def body() -> str:
            self._work(operation, None)
            return operation.op

        decorate = self._coordinator.blocking.transactional(**_how(operation))
        return str(decorate(body)())

    def _work(self, operation: Operation, transaction: GlobalTransaction | None) -> None:
        name = None
        if transaction is not None:
            name = self._ids[operation.op] = transaction.id
        for number in range(len(operation.changes)):
            if operation.joined and number == len(operation.changes) - 1:
                join = self._coordinator.blocking.transactional(self._change)
                join(operation, number, name)
            else:
                self._change(operation, number, name)
        for database in operation.reads:
            self._execute(operation, database, LOOK)
        if operation.fate == "vote no":
            database = operation.changes[0].database if operation.changes else DATABASES[0]
            self._execute(operation, database, REFUSE)
        if operation.fate == "slow":
            time.sleep(operation.after)
        if operation.fate == "raise":
            raise Unwanted
        if operation.fate == "doom" and transaction is not None:
            transaction.abort("doomed by its own")

    def _change(self, operation: Operation, number: int, transaction: str | None) -> None:
        change, marker = operation.changes[number], _marker(operation, number, transaction)
        move = MOVE.format(amount=change.amount, account=change.account)
        participant = self._participants[change.database]
        if operation.sessions:
            session = participant.blocking.session()
            if operation.savepoint:
                with session.begin_nested():
                    session.execute(text(move))
            else:
                session.execute(text(move))
            session.add(MarkerRow(**marker))
            return
        connection = participant.blocking.connection()
        if operation.savepoint:
            with connection.transaction():
                connection.execute(move.encode())
        else:
            connection.execute(move.encode())
        connection.execute(MARK, marker)

    def _execute(self, operation: Operation, database: str, statement: str) -> None:
        participant = self._participants[database]
        if operation.sessions:
            participant.blocking.session().execute(text(statement))
        else:
            participant.blocking.connection().execute(statement.encode())


def _how(operation: Operation) -> dict[str, Any]:
    how: dict[str, Any] = {"timeout": operation.seconds, "attempts": operation.attempts}
    if operation.key is not None:
        key = operation.key
        how |= {"idempotency_key": lambda: key, "record_result": True}
    return how


# What the caller was told.

_DEFINITE = (
    Unwanted,
    TransactionAborted,
    LogUnavailable,
    DatabaseUnavailable,
    psycopg.Error,
    SQLAlchemyError,
)
_NEVER = (ConfigurationError, HeuristicOutcome, ProtocolError)


def told(operation: Operation, returned: str | None, error: BaseException | None) -> dict[str, Any]:
    """The fields of `Told` for how a call ended: by returning, or by an exception."""
    fields: dict[str, Any] = {"op": operation.op}
    if error is None:
        if returned == operation.op:
            return fields | {"outcome": "committed"}
        return fields | {"outcome": "repeat", "first": returned}
    fields["error"] = f"{type(error).__name__}: {error}"
    fields["transaction"] = getattr(error, "transaction_id", None)
    if isinstance(error, asyncio.CancelledError):
        # A note tells what became of the transaction; without one nothing was begun.
        _, name, outcome = str(getattr(error, "__notes__", ["- - aborted"])[-1]).split()
        return fields | {"outcome": outcome, "transaction": name.strip("-:") or None}
    return fields | {"outcome": _outcome(error)}


def _outcome(error: BaseException) -> str:
    if isinstance(error, OutcomeUnknown):
        return "unknown"
    if isinstance(error, AlreadyDecided):
        return "repeat"
    if isinstance(error, _NEVER):
        return "surprise"
    return "aborted" if isinstance(error, (*_DEFINITE, TransactionError)) else "surprise"
