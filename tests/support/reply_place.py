"""Where the rows of the reply table are tried: a database on a live server, clean for each row."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg

from coordinator.model import Branch
from participants.conformance import binding
from participants.postgres import PostgreSQL
from participants.postgres.connection import ServerConnection
from participants.postgres.embedded import EmbeddedServer
from participants.postgres.replies import Reply
from tests.support.branches import until
from tests.support.postgres import SCHEMA, gids, new_database, query

# An INSERT into it fails when the transaction ends, with the SQLSTATE inserted.
_FAILING = """
CREATE TABLE failing (sqlstate text);
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'planted' USING ERRCODE = NEW.sqlstate; END $$;
CREATE CONSTRAINT TRIGGER fails_at_the_end AFTER INSERT ON failing
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail();
"""
_CLEAN = f"DROP TABLE account, entry; TRUNCATE failing; {SCHEMA}"
_OTHERS = (
    "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend'"
)
SLOTS = 12


class Place:
    """The database `url` on a running server with `SLOTS` for prepared transactions."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self.url = new_database(server)
        self.database = self.url.rpartition("/")[2]
        query(self.url, _FAILING)

    def clean(self) -> None:
        """End whatever the row before has left, and make the tables anew."""
        query(self.url, f"SELECT pg_terminate_backend(pid) {_OTHERS}")
        for gid in gids(self.url):
            query(self.url, f"ROLLBACK PREPARED '{gid}'")
        query(self.url, _CLEAN)

    @asynccontextmanager
    async def participant(self, url: str = "", **options: Any) -> AsyncIterator[PostgreSQL]:
        """A participant that is open while the block runs."""
        participant = PostgreSQL("accounts", url or self.url, pool_size=2, **options)
        await participant.open(binding())
        try:
            yield participant
        finally:
            await participant.close()

    async def ask(self, *statements: str) -> Reply:
        """The answer to the last of the statements, each of which is sent whatever happens."""
        session = await ServerConnection.open(self.url)
        try:
            for statement in statements:
                reply = await session.ask(statement.encode())
            return reply
        finally:
            session.close()

    @contextmanager
    def role(self) -> Iterator[str]:
        """The url for a login role that may work on the tables, and is no superuser."""
        query(self.url, "CREATE ROLE app LOGIN PASSWORD 'app'")
        query(self.url, "GRANT ALL ON account, entry TO app")
        try:
            yield self.url.replace(f"postgres:{self.server.password}", "app:app")
        finally:
            query(self.url, f"SELECT pg_terminate_backend(pid) {_OTHERS} AND usename = 'app'")
            for (gid,) in query(self.url, "SELECT gid FROM pg_prepared_xacts WHERE owner = 'app'"):
                query(self.url, f"ROLLBACK PREPARED '{gid}'")
            query(self.url, "DROP OWNED BY app")
            query(self.url, "DROP ROLE app")

    async def end_sessions(self) -> None:
        """End every other session in the database, and wait until they are gone."""
        query(self.url, f"SELECT pg_terminate_backend(pid) {_OTHERS}")
        await until(lambda: not query(self.url, f"SELECT 1 {_OTHERS}"))

    def balance(self) -> int:
        return int(str(query(self.url, "SELECT balance FROM account WHERE id = 'alice'")[0][0]))

    def is_prepared(self, branch: Branch) -> bool:
        return str(branch.xid) in gids(self.url)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Another session, open while the block runs."""
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as session:
            yield session


Row = Callable[[Place], Awaitable[None]]


class Table:
    """Rows by their names, which begin with the answer as the table of facts names it."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def row(self, name: str) -> Callable[[Row], Row]:
        def add(row: Row) -> Row:
            assert name not in self.rows, name
            self.rows[name] = row
            return row

        return add
