"""Real PostgreSQL servers for tests: two, started once in a test session, on first use.

A server that does not start fails the test that asked for it. The fixture `database` is emptied
before each test, whatever the one before left there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

from coordinator.commands.servers import running
from coordinator.participant import Participant
from participants.conformance import binding
from participants.postgres import PostgreSQL
from participants.postgres.embedded import EmbeddedServer
from tests.support.versions import server_of

DATABASE = "trial"
SCHEMA = """
CREATE TABLE account (id text PRIMARY KEY, balance int NOT NULL CHECK (balance >= 0));
INSERT INTO account VALUES ('alice', 100), ('bob', 100);
CREATE TABLE entry (id serial PRIMARY KEY, note text UNIQUE DEFERRABLE INITIALLY DEFERRED);
"""


def new_server() -> EmbeddedServer:
    """A server of the newest version, or of the one that SYNCPOINT_TEST_POSTGRESQL names."""
    major = os.environ.get("SYNCPOINT_TEST_POSTGRESQL")
    return server_of(int(major)) if major else EmbeddedServer()


@pytest.fixture(scope="session")
def postgres_servers() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    """Two running servers; a test that stops one starts it again."""
    with running(new_server(), new_server()) as (first, second):
        yield first, second


@pytest.fixture
def postgres_server(
    postgres_servers: tuple[EmbeddedServer, EmbeddedServer],
) -> EmbeddedServer:
    """The first server, running."""
    return postgres_servers[0].start()


@pytest.fixture
def database(postgres_server: EmbeddedServer) -> str:
    """The url of the database `trial` on the first server, with the tables of `SCHEMA` as new."""
    return clean_database(postgres_server)


@pytest.fixture
def second_database(postgres_servers: tuple[EmbeddedServer, EmbeddedServer]) -> str:
    """The same on the second server."""
    return clean_database(postgres_servers[1].start())


@pytest.fixture
async def accounts(database: str) -> AsyncIterator[PostgreSQL]:
    """A participant on `database`, opened for a log of its own."""
    participant = PostgreSQL("accounts", database, pool_size=3)
    await participant.open(binding())
    yield participant
    await participant.close()


def clean_database(server: EmbeddedServer) -> str:
    """End whatever an earlier test left in the database, and make its tables anew."""
    url = server.url(DATABASE)
    if not query(server.url(), f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"):
        server.create_database(DATABASE)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        for gid in gids(url):
            connection.execute(f"ROLLBACK PREPARED '{gid}'".encode())
        connection.execute("DROP TABLE IF EXISTS account, entry")
        connection.execute(SCHEMA)
    return url


def new_database(server: EmbeddedServer) -> str:
    """The url of one more database with the tables."""
    url = server.create_database(f"t{secrets.token_hex(6)}")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SCHEMA)
    return url


def query(url: str, statement: str) -> list[tuple[object, ...]]:
    """Run a statement from outside and return its rows, if any."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def gids(url: str) -> list[str]:
    """What is prepared in the database, whoever prepared it."""
    rows = query(url, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
    return [str(row[0]) for row in rows]


def sessions(url: str) -> int:
    """How many sessions of participants are in the database."""
    rows = query(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'syncpoint'",
    )
    return int(str(rows[0][0]))


class PostgresHarness:
    """A database as the conformance checks want it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def participant(self) -> PostgreSQL:
        return PostgreSQL("accounts", self.url, pool_size=4)

    async def write(self, participant: Participant) -> None:
        assert isinstance(participant, PostgreSQL)
        connection = await participant.connection()
        await connection.execute("INSERT INTO entry (note) VALUES (NULL)")

    async def read(self, participant: Participant) -> None:
        assert isinstance(participant, PostgreSQL)
        connection = await participant.connection()
        await connection.execute("SELECT count(*) FROM entry")

    async def count(self) -> int:
        return int(str(query(self.url, "SELECT count(*) FROM entry")[0][0]))
