"""Fixtures that every test may ask for; servers are started when the first test asks."""

from __future__ import annotations

from tests.support.postgres import (
    accounts,
    database,
    postgres_server,
    postgres_servers,
    second_database,
)
from tests.support.stage import config, stage
from tests.support.told import records

__all__ = [
    "accounts",
    "config",
    "database",
    "postgres_server",
    "postgres_servers",
    "records",
    "second_database",
    "stage",
]
