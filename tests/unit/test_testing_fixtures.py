"""The fixtures of `coordinator.testing.fixtures`, in a suite of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = "coordinator.testing.fixtures"
SUITE = """
import asyncio
from coordinator.model import FINISHED
from coordinator.testing import Memory, crash_at

class LosesCommits(Memory):
    asked = 0

    async def commit(self, branch):
        self.asked += 1
        if self.asked > 1:
            return await super().commit(branch)
        del self.store.prepared[branch.id]
        return FINISHED

async def sell(coordinator, *stores):
    async with coordinator.transaction():
        for store in stores:
            await store.put("a", 1)

def test_passes_on_a_loop_that_is_gone_later(syncpoint_coordinator):
    async def run():
        first, second = Memory("first"), Memory("second")
        async with syncpoint_coordinator(first, second) as coordinator:
            await sell(coordinator, first, second)
    asyncio.run(run())

def test_passes_after_a_crash(syncpoint_coordinator):
    first, second = Memory("first"), Memory("second")
    coordinator = syncpoint_coordinator(first, second)
    with crash_at(coordinator, "decide:after"), coordinator.blocking.transaction():
        first.blocking.put("a", 1)
        second.blocking.put("a", 1)
    assert not first.committed

def test_passes_though_nothing_was_opened(syncpoint_coordinator):
    syncpoint_coordinator(Memory("first"))

def test_leaves_it_open(syncpoint_coordinator):
    asyncio.run(syncpoint_coordinator(Memory("first")).open())

def test_loses_a_commit(syncpoint_coordinator):
    first, second = Memory("first"), LosesCommits("second")

    async def run():
        async with syncpoint_coordinator(first, second) as coordinator:
            await sell(coordinator, first, second)
    asyncio.run(run())
"""


def test_the_fixture_ends_each_test_with_assert_atomic(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    without = ["-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:anyio", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *without, "-p", PLUGIN, "--rootdir", ".", "--tb=short"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "5 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert "was left open: use `async with coordinator`" in done.stdout
    assert "is committed, but second: heuristic rollback" in done.stdout
