"""Mistakes that both type checkers must find, each in a line marked `# wrong`. Never run."""

from __future__ import annotations

from typing import assert_type

from coordinator import Coordinator
from coordinator.testing import crash_at
from participants.memory import Memory
from participants.postgres import PostgreSQL

accounts = PostgreSQL("accounts", "postgresql://db1/accounts")
coordinator = Coordinator("memory:", cluster="shop", participants=[accounts, Memory("stock")])


@coordinator.transactional
async def transfer(source: str, amount: int) -> bool:
    return True


@coordinator.transactional(timeout=10)
def ordinary(source: str) -> bool:
    return True


class Service:
    @coordinator.transactional
    async def method(self, name: str) -> int:
        return 1


async def calls(service: Service) -> None:
    await transfer("a", "1")  # wrong: an argument's type
    await transfer("a")  # wrong: an argument is missing
    await transfer("a", 1, note="n")  # wrong: there is no such parameter
    await ordinary("a")  # wrong: it returns no awaitable
    await service.method(1)  # wrong: an argument's type, behind self
    assert_type(transfer("a", 1), bool)  # wrong: it was not awaited
    number: int = await service.method("a")
    text: str = await service.method("a")  # wrong: what it returns
    print(number, text)


async def blocks() -> None:
    with coordinator.transaction():  # wrong: it is asynchronous
        pass
    async with coordinator.blocking.transaction():  # wrong: it is synchronous
        pass
    async with coordinator.transaction("k"):  # wrong: the key goes by name
        pass
    await coordinator.status()  # wrong: of which transaction
    await coordinator.blocking.status("id")  # wrong: it is synchronous


async def leases() -> None:
    connection = accounts.connection()
    connection.execute("SELECT 1")  # wrong: it was not awaited
    await accounts.blocking.connection()  # wrong: it is synchronous
    with accounts.connection():  # wrong: it is asynchronous
        pass
    (await accounts.connection()).executed("SELECT 1")  # wrong: psycopg has no such method


def definitions() -> None:
    coordinator.transactional(1)  # wrong: no function
    coordinator.transactional(timeout="10")  # wrong: seconds are a number
    coordinator.transactional(retries=3)  # wrong: there is no such option
    coordinator.transactional(idempotency_key="k")  # wrong: a key is computed from the arguments
    coordinator.blocking.transactional(retries=3)  # wrong: there is no such option
    Coordinator("memory:")  # wrong: the cluster has no name
    Coordinator("memory:", cluster="shop", participants=["accounts"])  # wrong: no participant
    PostgreSQL("accounts", 5432)  # wrong: neither url nor engine
    crash_at(accounts, "decide:before")  # wrong: no coordinator
