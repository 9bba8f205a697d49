"""Ordinary uses with the types that they must have. Never run: mypy and pyright read it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, assert_type

import psycopg
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from coordinator import Coordinator, GlobalTransaction, Outcome, Settings, Status, TransactionId
from coordinator.recovery import Round
from coordinator.testing import (
    Crash,
    Fault,
    assert_atomic,
    crash_at,
    lose_answer,
    refuse,
    rolled_back,
    rolled_back_blocking,
    unreachable,
)
from participants.memory import Memory
from participants.postgres import PostgreSQL

T = TypeVar("T")
P = ParamSpec("P")

accounts = PostgreSQL("accounts", "postgresql://db1/accounts", pool_size=3, lock_timeout=1)
by_engine = PostgreSQL("ledger", create_async_engine("postgresql+psycopg://db2/ledger"))
stock = Memory("stock")
coordinator = Coordinator("memory:", cluster="shop", participants=[accounts, by_engine, stock])
Coordinator("memory:", cluster="shop", participants=(stock,), settings=Settings(timeout=1))


class Order:
    id: str


# Functions keep their parameters, their names and what they return.


@coordinator.transactional
async def bare(source: str, amount: int = 1, *rest: bytes, note: str | None = None) -> Order:
    return Order()


@coordinator.transactional(timeout=10, propagation="requires_new", attempts=3)
async def with_arguments(source: str, *, amount: int) -> list[Order]:
    return []


@coordinator.transactional(idempotency_key=lambda order: order.id, record_result=True)
async def with_a_key(order: Order) -> int:
    return 1


@coordinator.transactional
def ordinary(source: str, amount: int = 1) -> Order:
    return Order()


@coordinator.blocking.transactional
def blocking_bare(source: str) -> int:
    return 1


@coordinator.blocking.transactional(timeout=10)
def blocking_with_arguments(source: str) -> int:
    return 1


@coordinator.transactional
async def generic(value: T) -> list[T]:
    return [value]


async def functions(order: Order) -> None:
    assert_type(await bare("a", 2, b"", note="n"), Order)
    assert_type(await bare(source="a", amount=2), Order)
    assert_type(await with_arguments("a", amount=2), list[Order])
    assert_type(await with_a_key(order), int)
    assert_type(ordinary("a", amount=2), Order)
    assert_type(blocking_bare("a"), int)
    assert_type(blocking_with_arguments(source="a"), int)
    assert_type(await generic("a"), list[str])
    assert_type(await generic(1), list[int])
    assert_type(bare.__name__, str)
    unwaited: Coroutine[Any, Any, Order] = bare("a")
    assert_type(await unwaited, Order)
    as_argument: Callable[[str], Awaitable[Order]] = bare
    assert_type(await as_argument("a"), Order)


# Methods, with and without arguments, under and over other decorators.


class Service:
    @coordinator.transactional
    async def method(self, name: str) -> int:
        return 1

    @coordinator.transactional(timeout=1)
    def ordinary_method(self, name: str) -> int:
        return 1

    @staticmethod
    @coordinator.transactional
    async def static(name: str) -> int:
        return 1

    @coordinator.transactional
    @staticmethod
    def static_below(name: str) -> int:
        return 1

    @classmethod
    @coordinator.transactional
    async def of_class(cls, name: str) -> Service:
        return cls()

    @property
    @coordinator.transactional
    def number(self) -> int:
        return 1


class Repository(Generic[T]):
    @coordinator.transactional
    async def get(self, key: str) -> T | None:
        return None


class Callback(Protocol):
    def __call__(self, name: str) -> int:
        """A callable by its shape."""
        ...


def other_decorator(function: Callable[P, T]) -> Callable[P, T]:
    return function


@other_decorator
@coordinator.transactional
@other_decorator
def between(name: str) -> int:
    return 1


async def methods(service: Service, repository: Repository[Order], callback: Callback) -> None:
    assert_type(await service.method("a"), int)
    assert_type(await Service.method(service, name="a"), int)
    assert_type(service.ordinary_method("a"), int)
    assert_type(await Service.static("a"), int)
    assert_type(await service.static(name="a"), int)
    assert_type(Service.static_below("a"), int)
    assert_type(service.static_below("a"), int)
    assert_type(await Service.of_class("a"), Service)
    assert_type(service.number, int)
    assert_type(await repository.get("a"), Order | None)
    assert_type(between("a"), int)
    assert_type(coordinator.transactional(callback)("a"), int)
    assert_type(coordinator.transactional(lambda: len("a"))(), int)


# Blocks and questions, on both faces.


async def blocks() -> None:
    async with coordinator as opened:
        assert_type(opened, Coordinator)
    async with coordinator.transaction(timeout=1, key="k", propagation="mandatory") as transaction:
        assert_type(transaction, GlobalTransaction)
        assert_type(transaction.id, TransactionId)
        assert_type(transaction.outcome, Outcome)
        transaction.abort("a reason")
    assert_type(await coordinator.status("id"), Status)
    assert_type(await coordinator.abort(transaction.id), Status)
    assert_type(await coordinator.recover(dry_run=True), Round)


def blocking_blocks() -> None:
    with coordinator.blocking.transaction(timeout=1, key="k") as transaction:
        assert_type(transaction, GlobalTransaction)
    assert_type(coordinator.blocking.status("id"), Status)
    assert_type(coordinator.blocking.abort(transaction.id), Status)
    assert_type(coordinator.blocking.recover(dry_run=True), Round)


# Connections and sessions.


async def leases(engine: sqlalchemy.Engine, session: AsyncSession) -> None:
    connection = await accounts.connection()
    assert_type(connection, psycopg.AsyncConnection[Any])
    cursor = await connection.execute("SELECT 1")
    assert_type(cursor, psycopg.AsyncCursor[Any])
    async with accounts.connection() as leased:
        assert_type(leased, psycopg.AsyncConnection[Any])
    assert_type(await accounts.session(), AsyncSession)
    async with accounts.session() as leased_session:
        assert_type(leased_session, AsyncSession)
    await accounts.enlist(session)
    PostgreSQL("ledger", engine)
    assert_type(accounts.name, str)


def blocking_leases(session: Session) -> None:
    connection = accounts.blocking.connection()
    assert_type(connection, psycopg.Connection[Any])
    assert_type(connection.execute("SELECT 1"), psycopg.Cursor[Any])
    with accounts.blocking.connection() as leased:
        assert_type(leased, psycopg.Connection[Any])
    assert_type(accounts.blocking.session(), Session)
    accounts.blocking.enlist(session)


# A service's tests.


async def tests() -> None:
    with lose_answer(accounts, "commit", times=2) as fault, refuse(stock), unreachable(coordinator):
        assert_type(fault, Fault)
    async with crash_at(coordinator, "decide:before", occurrence=2) as crash:
        assert_type(crash, Crash)
    async with rolled_back(coordinator, timeout=1) as transaction:
        assert_type(transaction, GlobalTransaction)
    with rolled_back_blocking(coordinator) as transaction:
        assert_type(transaction, GlobalTransaction)
    await assert_atomic(coordinator, within=1)
