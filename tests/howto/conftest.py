"""What the how-tos have in common: two databases with their tables, and a log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from participants.postgres.embedded import EmbeddedServer
from tests.howto.serving import Shop, database_of


@pytest.fixture
def shop(postgres_servers: tuple[EmbeddedServer, EmbeddedServer], tmp_path: Path) -> Iterator[Shop]:
    """A shop that nobody uses yet; after the test nothing of it may be in doubt."""
    accounts, ledger = (database_of(server.start()) for server in postgres_servers)
    shop = Shop(accounts, ledger, tmp_path)
    yield shop
    shop.check()
