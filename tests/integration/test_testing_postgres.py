"""`coordinator.testing` on real servers: several transactions at once when a coordinator dies."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from coordinator.testing import Crashed, assert_atomic, assert_atomic_blocking, crash_at
from coordinator.testing import coordinator as make_coordinator
from participants.postgres import PostgreSQL
from tests.support.postgres import gids, query

POINTS = [("prepare:before", 2), ("prepare:after", 3), ("decide:after", 1), ("commit:before", 2)]
AT_ONCE = 6


@pytest.fixture
def participants(database: str, second_database: str) -> tuple[PostgreSQL, PostgreSQL]:
    return PostgreSQL("accounts", database), PostgreSQL("ledger", second_database)


def check_agree(database: str, second_database: str) -> None:
    urls = database, second_database
    counts = [query(url, "SELECT note FROM entry ORDER BY note") for url in urls]
    assert counts[0] == counts[1]
    assert [gids(url) for url in urls] == [[], []]


@pytest.mark.parametrize(("point", "occurrence"), POINTS)
async def test_tasks(
    participants: tuple[PostgreSQL, PostgreSQL],
    database: str,
    second_database: str,
    point: str,
    occurrence: int,
) -> None:
    coordinator = make_coordinator(*participants)

    @coordinator.transactional
    async def write(note: str) -> None:
        for each in participants:
            connection = await each.connection()
            await connection.execute("INSERT INTO entry (note) VALUES (%s)", (note,))

    async with coordinator, crash_at(coordinator, point, occurrence=occurrence):
        tasks = [write(str(number)) for number in range(2 * AT_ONCE)]
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert Crashed in {type(end) for end in ends}
    await assert_atomic(coordinator)
    check_agree(database, second_database)


@pytest.mark.parametrize(("point", "occurrence"), POINTS)
def test_threads(
    participants: tuple[PostgreSQL, PostgreSQL],
    database: str,
    second_database: str,
    point: str,
    occurrence: int,
) -> None:
    coordinator = make_coordinator(*participants)

    @coordinator.transactional
    def write(note: str) -> None:
        for each in participants:
            connection = each.blocking.connection()
            connection.execute("INSERT INTO entry (note) VALUES (%s)", (note,))

    with (
        crash_at(coordinator, point, occurrence=occurrence),
        ThreadPoolExecutor(AT_ONCE) as threads,
    ):
        ends = [threads.submit(write, str(number)) for number in range(2 * AT_ONCE)]
    assert Crashed in {type(end.exception()) for end in ends}
    assert_atomic_blocking(coordinator)
    check_agree(database, second_database)
