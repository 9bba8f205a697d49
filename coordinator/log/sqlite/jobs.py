"""What is queued for the writer's thread, and how the outcomes come back to the event loops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from coordinator.errors import LogUnavailable
from coordinator.log.sqlite.store import Insertion, Store

Work = Insertion | Callable[[Store], object] | None
"""A proposal, any other operation, or None: open the file."""


class Job(msgspec.Struct, frozen=True):
    """Some work and who waits for it; `writes` tells whether it needs a write transaction."""

    future: asyncio.Future[Any]
    work: Work
    writes: bool


class Failed(msgspec.Struct, frozen=True):
    """The outcome of a job that raised."""

    error: Exception


def unavailable(reason: str, cause: BaseException | None) -> Failed:
    """A failure with an exception of its own, since each caller adds its traceback to it."""
    error = LogUnavailable(reason)
    error.__cause__ = cause
    return Failed(error)


def deliver(jobs: Sequence[Job], outcomes: Sequence[object]) -> None:
    """Hand the outcomes to their futures, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], object]]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        by_loop.setdefault(job.future.get_loop(), []).append((job.future, outcome))
    for loop, pairs in by_loop.items():
        settle(loop, pairs)


def settle(
    loop: asyncio.AbstractEventLoop, pairs: Sequence[tuple[asyncio.Future[Any], object]]
) -> None:
    """Settle futures of one loop from another thread."""
    with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits
        loop.call_soon_threadsafe(_settle, pairs)


def _settle(pairs: Sequence[tuple[asyncio.Future[Any], object]]) -> None:
    for future, outcome in pairs:
        if future.done():
            continue  # its caller was cancelled
        if isinstance(outcome, Failed):
            future.set_exception(outcome.error)
        else:
            future.set_result(outcome)
