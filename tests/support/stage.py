"""The two databases of the demonstration on the servers of the tests, for those of commands.

Each module has databases of its own, dropped at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.commands.demo.stage import Database, Stage
from participants.postgres.embedded import EmbeddedServer
from tests.support.postgres import query

ACCOUNT, AMOUNT = 3, 100


@pytest.fixture(scope="module")
def stage(
    postgres_servers: tuple[EmbeddedServer, EmbeddedServer], request: pytest.FixtureRequest
) -> Iterator[Stage]:
    first, second = (server.start() for server in postgres_servers)
    prefix = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    stage = Stage(
        Database("accounts", first, first.create_database(f"{prefix}_accounts")),
        Database("ledger", second, second.create_database(f"{prefix}_ledger")),
    )
    for database in stage.databases:
        database.create()
    yield stage
    for database in stage.databases:
        query(database.server.url(), f"DROP DATABASE {prefix}_{database.name} WITH (FORCE)")


@pytest.fixture
def config(stage: Stage, tmp_path: Path) -> Path:
    """Of a service whose log is new."""
    assert stage.prepared() == []
    return stage.write_config(tmp_path)


def service(config: Path, point: str) -> tuple[str, ...]:
    """The module and arguments of a service that stops at a point of its first transfer."""
    return ("coordinator.commands.demo.transfer", str(config), point, str(ACCOUNT), str(AMOUNT))
