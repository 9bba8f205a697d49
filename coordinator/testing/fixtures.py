"""Fixtures for pytest, with or without a plugin for asyncio.

# conftest.py
pytest_plugins = ["coordinator.testing.fixtures"]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest

from coordinator import testing
from coordinator.bridge import LoopThread
from coordinator.config import Settings
from coordinator.coordinator import Coordinator
from coordinator.participant import Participant


class MakeCoordinator(Protocol):
    """What the fixture `syncpoint_coordinator` is."""

    def __call__(self, *participants: Participant, settings: Settings = ...) -> Coordinator:
        """A coordinator as of `coordinator.testing.coordinator`."""


@pytest.fixture
def syncpoint_coordinator() -> Iterator[MakeCoordinator]:
    """Makes coordinators on a log in memory; the test ends with `assert_atomic` for each of them.

    Open them with `async with`, or leave that to `blocking`, which is closed for you.
    """
    made: list[Coordinator] = []

    def make(*participants: Participant, settings: Settings = testing.QUICK) -> Coordinator:
        made.append(testing.coordinator(*participants, settings=settings))
        return made[-1]

    yield make
    loop_thread = LoopThread("syncpoint-testing")
    try:
        for coordinator in made:
            coordinator.blocking.close()
            if not coordinator.is_closed:
                raise AssertionError(f"{coordinator!r} was left open: use `async with coordinator`")
            loop_thread.run(testing.assert_atomic(coordinator))
    finally:
        loop_thread.stop()
