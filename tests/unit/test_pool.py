"""The pool by itself: who waits when it is closed."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from participants.postgres.pool import Pool


async def test_closing_refuses_who_waits_and_who_comes_later() -> None:
    async def open_connection() -> Any:
        return object()

    pool = Pool(open_connection, size=1)
    until = asyncio.get_running_loop().time() + 60.0
    assert cast(object, await pool.acquire(until)) is not None
    waiting = asyncio.create_task(pool.acquire(until))
    await asyncio.sleep(0)
    pool.close()
    for late in (waiting, asyncio.create_task(pool.acquire(until))):
        with pytest.raises(TimeoutError, match="closed"):
            await late
