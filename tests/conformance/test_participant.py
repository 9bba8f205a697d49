"""Every participant keeps the promises of the port."""

from __future__ import annotations

import pytest

from coordinator.participant import Participant
from participants import conformance
from participants.conformance import Harness
from participants.memory import Memory, MemoryStore
from tests.support.postgres import PostgresHarness


class MemoryHarness:
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.writes = 0

    def participant(self) -> Memory:
        return Memory("stock", self.store)

    async def write(self, participant: Participant) -> None:
        assert isinstance(participant, Memory)
        self.writes += 1
        await participant.put(f"key {self.writes}", self.writes)

    async def read(self, participant: Participant) -> None:
        assert isinstance(participant, Memory)
        await participant.get("key 1")

    async def count(self) -> int:
        return len(self.store.committed)


@pytest.fixture(params=["memory", "postgres"])
def harness(request: pytest.FixtureRequest) -> Harness:
    if request.param == "memory":
        return MemoryHarness()
    return PostgresHarness(request.getfixturevalue("database"))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: conformance.Check, harness: Harness) -> None:
    await check(harness)
