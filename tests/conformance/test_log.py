"""Every decision log against the one suite, and planted bugs against the suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import tests.conformance.log_suite_housekeeping
import tests.conformance.log_suite_keys  # noqa: F401  adds its checks
from coordinator.log.memory import MemoryLog, new_register
from coordinator.log.register import Register
from coordinator.log.sqlite import SQLiteLog
from tests.conformance.log_suite import CHECKS, Place
from tests.conformance.planted_log_bugs import LOGS, REGISTERS


def memory_place(directory: Path) -> Place:
    register = new_register()
    return Place(lambda: MemoryLog(register))


def sqlite_place(directory: Path) -> Place:
    return Place(lambda: SQLiteLog(directory / "log.db"))


IMPLEMENTATIONS: dict[str, Callable[[Path], Place]] = {
    "memory": memory_place,
    "sqlite": sqlite_place,
}


@pytest.fixture(params=list(IMPLEMENTATIONS))
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    place = IMPLEMENTATIONS[request.param](tmp_path)
    yield place
    await place.close()


@pytest.mark.parametrize("name", list(CHECKS))
async def test_promise(place: Place, name: str) -> None:
    await CHECKS[name](place)


@pytest.mark.parametrize("bug", list(REGISTERS))
async def test_the_suite_finds_a_register_that_is(bug: type[Register]) -> None:
    register = bug(new_register().identity)
    await _must_find(Place(lambda: MemoryLog(register)), REGISTERS[bug])


@pytest.mark.parametrize("bug", list(LOGS))
async def test_the_suite_finds_a_log_that_is(bug: type[MemoryLog]) -> None:
    register = new_register()
    await _must_find(Place(lambda: bug(register)), LOGS[bug])


async def _must_find(place: Place, name: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await CHECKS[name](place)
