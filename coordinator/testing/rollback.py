"""A transaction around a whole test that is never committed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from coordinator.coordinator import Coordinator
from coordinator.transactional import GlobalTransaction


class _EndOfTest(Exception):
    """Rolls back what the test did; goes no further than this file."""


@asynccontextmanager
async def rolled_back(
    coordinator: Coordinator, *, timeout: float | None = None
) -> AsyncIterator[GlobalTransaction]:
    """Roll back at the end of the block everything that was done in it.

    Transactional functions that the block calls join its transaction: they see each other's work,
    never vote and never commit. `requires_new` inside is a real transaction of its own, which
    stays. `timeout` is the deadline of the whole block in seconds, by default the longest that the
    settings allow. Raises what the block raises, and `TransactionAborted` at the deadline.
    """
    try:
        async with coordinator.transaction(timeout=_longest(coordinator, timeout)) as transaction:
            yield transaction
            raise _EndOfTest("the test has ended")
    except _EndOfTest:
        pass


@contextmanager
def rolled_back_blocking(
    coordinator: Coordinator, *, timeout: float | None = None
) -> Iterator[GlobalTransaction]:
    """The same for synchronous functions, in the thread of the test."""
    longest = _longest(coordinator, timeout)
    try:
        with coordinator.blocking.transaction(timeout=longest) as transaction:
            yield transaction
            raise _EndOfTest("the test has ended")
    except _EndOfTest:
        pass


def _longest(coordinator: Coordinator, timeout: float | None) -> float:
    return coordinator.settings.timeout_max if timeout is None else timeout
