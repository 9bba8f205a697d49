"""Every participant keeps the promises of the port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coordinator.participant import Participant
from participants import conformance
from participants.conformance import Harness
from participants.memory import Memory, MemoryStore
from participants.postgres.embedded import EmbeddedServer
from tests.support.postgres import PostgresHarness, new_database
from tests.support.versions import server_of


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


@pytest.fixture(scope="module")
def older_server() -> Iterator[EmbeddedServer]:
    with server_of(15) as server:
        yield server


@pytest.fixture(params=["memory", "postgres", "postgres 15"])
def harness(request: pytest.FixtureRequest) -> Harness:
    match request.param:
        case "memory":
            return MemoryHarness()
        case "postgres":
            return PostgresHarness(request.getfixturevalue("database"))
    return PostgresHarness(new_database(request.getfixturevalue("older_server")))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: conformance.Check, harness: Harness) -> None:
    await check(harness)
