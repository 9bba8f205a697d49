"""Many transfers at once, in both directions, always the same ones."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from coordinator.commands.demo.stage import ACCOUNTS
from coordinator.commands.demo.transfer import open_service

AT_ONCE = 16
AMOUNT_MAX = 50
SEED = 1


async def run_traffic(config: Path, transfers: int, advance: Callable[[], None]) -> float:
    """Make the transfers and return the seconds they took; `advance` is called after each."""
    coordinator, transfer = open_service(config)
    orders = _orders(transfers)

    async def work() -> None:
        for source, target, amount in orders:
            await transfer(source, target, amount)
            advance()

    loop = asyncio.get_running_loop()
    async with coordinator:
        began = loop.time()
        async with asyncio.TaskGroup() as workers:
            for _ in range(AT_ONCE):
                workers.create_task(work())
        return loop.time() - began


async def transfer_once(config: Path, account: int, amount: int) -> float:
    """One transfer, and the seconds it took."""
    coordinator, transfer = open_service(config)
    loop = asyncio.get_running_loop()
    async with coordinator:
        began = loop.time()
        await transfer(account, account, amount)
        return loop.time() - began


def _orders(transfers: int) -> Iterator[tuple[int, int, int]]:
    """Who pays whom how much; a negative amount goes the other way."""
    numbers = random.Random(SEED)
    for _ in range(transfers):
        amount = numbers.randint(1, AMOUNT_MAX) * numbers.choice((1, -1))
        yield numbers.randint(1, ACCOUNTS), numbers.randint(1, ACCOUNTS), amount
