"""Branches on a real database, worked on and ended the way the engine does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from coordinator.model import Branch, Ending, Vote
from participants.conformance import TrialTransaction, trial
from participants.postgres import DatabaseUnavailable, PostgreSQL
from tests.support.postgres import query

UPDATE = "UPDATE account SET balance = balance - 1 WHERE id = 'alice'"
BALANCE = "SELECT balance FROM account WHERE id = 'alice'"
WAIT_SECONDS_MAX = 20.0


@asynccontextmanager
async def working(
    participant: PostgreSQL,
) -> AsyncIterator[tuple[TrialTransaction, psycopg.AsyncConnection[Any]]]:
    """A transaction whose connection the block works on."""
    opened = participant._open
    assert opened is not None
    async with trial(opened.binding) as transaction:
        yield transaction, await participant.connection()


async def work(participant: PostgreSQL, *statements: str) -> Branch:
    """A branch in which the statements ran, and whose vote is still to be asked for."""
    async with working(participant) as (transaction, connection):
        for statement in statements or (UPDATE,):
            await connection.execute(statement.encode())
    return transaction.branch


async def vote_after(participant: PostgreSQL, *statements: str) -> tuple[Branch, Vote]:
    """Run statements in a transaction and ask for the vote."""
    branch = await work(participant, *statements)
    vote = await participant.prepare(branch.xid)
    return Branch(branch.xid, participant.name, vote.token), vote


async def until_ended(end: Callable[[], Awaitable[Ending]]) -> Ending:
    """Repeat as the engine does."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            try:
                return await end()
            except DatabaseUnavailable:
                await asyncio.sleep(0.02)


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def missing_standby(url: str) -> AsyncIterator[None]:
    """While the block runs, every commit in the server waits for a standby that does not exist."""
    query(url, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    query(url, "SELECT pg_reload_conf()")
    try:
        await _until_commits_wait(url)
        yield
    finally:
        query(url, "ALTER SYSTEM RESET synchronous_standby_names")
        query(url, "SELECT pg_reload_conf()")


async def _until_commits_wait(url: str) -> None:
    """A reload returns before the server obeys: commit something until that waits."""
    commit_something = "SELECT pg_logical_emit_message(true, 'syncpoint', 'something')"
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as session:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while True:
                commit = asyncio.create_task(session.execute(commit_something))
                while not commit.done():
                    if waiting(url):
                        await session.cancel_safe()
                        await commit
                        return
                    await asyncio.sleep(0.005)


def waiting(url: str) -> list[int]:
    """The process ids of the sessions in this database that wait for a standby."""
    rows = query(
        url,
        "SELECT pid FROM pg_stat_activity "
        "WHERE wait_event = 'SyncRep' AND datname = current_database()",
    )
    return [int(str(row[0])) for row in rows]


async def end_the_wait(url: str, how: str = "pg_cancel_backend") -> None:
    """Cancel, or with `pg_terminate_backend` end, whoever waits for a standby, once one does."""
    await until(lambda: waiting(url))
    for process in waiting(url):
        query(url, f"SELECT {how}({process})")
