"""Draws faults, does them, several at once, and writes down each with its times.

Which fault comes when, against whom and for how long, follows from the seed alone; what the clients
were doing at that moment does not. Every kind comes once before any comes again.
"""

from __future__ import annotations

import asyncio
import random
import time
import traceback
from collections import Counter
from collections.abc import Sequence

import msgspec
import psycopg

from tests.torture.faults import KINDS, Scene
from tests.torture.stage import Stage
from tests.torture.values import Fault

TOGETHER = 0.25
"""How often a second fault comes at the same moment."""


class Nemesis:
    """`kinds` are the names to draw from."""

    def __init__(self, stage: Stage, kinds: Sequence[str] = tuple(KINDS)) -> None:
        self.faults: list[Fault] = []
        self._stage = stage
        self._kinds = kinds
        self._draw = random.Random(f"{stage.options.seed} nemesis")
        self._deck: list[str] = []
        self._healing = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._count = 0
        self._file = (stage.folder / "faults.jsonl").open("ab", buffering=0)

    async def run(self, seconds: float, stop: asyncio.Event) -> None:
        """Do faults for so long, or until `stop`; then heal everything and return."""
        until = time.monotonic() + seconds
        try:
            while (left := until - time.monotonic()) > 0 and not stop.is_set():
                pause = min(self._draw.uniform(*self._stage.options.interval), left)
                try:
                    await asyncio.wait_for(stop.wait(), pause)
                except TimeoutError:
                    for _ in range(2 if self._draw.random() < TOGETHER else 1):
                        self._begin()
        finally:
            self._healing.set()
            await asyncio.gather(*self._under_way)
            self._file.close()

    def counts(self) -> Counter[str]:
        """How many faults of each kind have ended."""
        return Counter(fault.kind for fault in self.faults)

    def _begin(self) -> None:
        if not self._deck:
            self._deck = self._draw.sample(self._kinds, len(self._kinds))
        name = self._deck.pop()
        self._count += 1
        draw = random.Random(f"{self._stage.options.seed} fault {self._count}")
        seconds = draw.uniform(0.06, 1.0) * self._stage.options.longest
        scene = Scene(self._stage, draw, seconds, self._healing)
        task = asyncio.get_running_loop().create_task(self._do(name, scene))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _do(self, name: str, scene: Scene) -> None:
        at, mono, detail, failure = time.time(), time.monotonic(), "", ""
        try:
            detail = await KINDS[name](scene)
        except psycopg.Error as error:
            detail = f"not possible just now: {error}"
        except Exception:
            failure = traceback.format_exc()
        fault = Fault(name, detail, at, mono, time.monotonic() - mono, failure)
        self.faults.append(fault)
        self._file.write(msgspec.json.encode(fault) + b"\n")
