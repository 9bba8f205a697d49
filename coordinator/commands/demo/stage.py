"""The two databases of the story, and what can be seen in them from outside."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString

import msgspec
import psycopg
from psycopg import sql

from coordinator.commands.servers import server_version, two_servers
from participants.postgres.embedded import EmbeddedServer

ACCOUNTS = 20
BALANCE = 1000
LOCK_TIMEOUT_MS = 500

_TABLE = sql.SQL("CREATE TABLE account (id integer PRIMARY KEY, balance bigint NOT NULL)")
_FILL = sql.SQL("INSERT INTO account SELECT id, {} FROM generate_series(1, {}) AS id")
_MOVE = "UPDATE account SET balance = balance + %s WHERE id = %s"
_PREPARED = """
SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY prepared
"""
# Locks of prepared transactions belong to no session.
_ORPHANED_LOCKS: LiteralString = "SELECT count(*) FROM pg_locks WHERE granted AND pid IS NULL"


class Database(msgspec.Struct):
    """One of the two: its name in the story, its server, its url."""

    name: str
    server: EmbeddedServer
    url: str

    def total(self) -> int:
        """All the money in it, as a reader sees it now."""
        return self._value("SELECT sum(balance) FROM account")

    def balance(self, account: int) -> int:
        return self._value("SELECT balance FROM account WHERE id = %s", account)

    def prepared(self) -> list[str]:
        """The names of the branches in doubt here."""
        with self._connect() as connection:
            return [str(row[0]) for row in connection.execute(_PREPARED)]

    def orphaned_locks(self) -> int:
        """The locks that no session holds any more, only a branch in doubt."""
        return self._value(_ORPHANED_LOCKS)

    def try_to_move(self, account: int) -> tuple[str, float]:
        """Change a row and put it back: why that failed, or "", and the seconds it took."""
        began = time.monotonic()
        why = ""
        with self._connect() as connection:
            connection.execute(sql.SQL("SET lock_timeout = {}").format(LOCK_TIMEOUT_MS))
            try:
                with connection.transaction(force_rollback=True):
                    connection.execute(_MOVE, (1, account))
            except psycopg.errors.LockNotAvailable as error:
                why = error.diag.message_primary or str(error)
        return why, time.monotonic() - began

    def commit_prepared(self, gid: str) -> None:
        """What an operator types who has decided to believe in commit."""
        with self._connect() as connection:
            connection.execute(sql.SQL("COMMIT PREPARED {}").format(gid))

    def restart(self) -> None:
        self.server.stop()
        self.server.start()

    def create(self) -> None:
        with self._connect() as connection:
            connection.execute(_TABLE)
            connection.execute(_FILL.format(BALANCE, ACCOUNTS))

    def _value(self, query: LiteralString, *values: object) -> int:
        with self._connect() as connection:
            row = connection.execute(query, values).fetchone()
            assert row is not None
            return int(row[0])

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url, autocommit=True)


class Stage(msgspec.Struct):
    """Both databases together."""

    accounts: Database
    ledger: Database

    @property
    def databases(self) -> Sequence[Database]:
        return (self.accounts, self.ledger)

    @property
    def version(self) -> str:
        return server_version(self.accounts.url)

    def total(self) -> int:
        return sum(database.total() for database in self.databases)

    def prepared(self) -> list[str]:
        return [gid for database in self.databases for gid in database.prepared()]

    def write_config(self, folder: Path) -> Path:
        """The `syncpoint.toml` of a service on both, with its log in the same folder."""
        path = folder / "syncpoint.toml"
        path.touch(mode=0o600)  # the urls hold passwords
        tables = [
            f'[participants.{database.name}]\nkind = "postgresql"\nurl = "{database.url}"\n'
            for database in self.databases
        ]
        head = f'cluster = "demo"\nlog = "sqlite:///{folder}/syncpoint.db"\n'
        path.write_text("\n".join([head, *tables]))
        return path

    def orphaned_locks(self) -> int:
        return sum(database.orphaned_locks() for database in self.databases)


@contextmanager
def set_stage() -> Iterator[Stage]:
    """Two servers with a database and its accounts each; gone at the end of the block."""
    with two_servers() as (first, second):
        stage = Stage(
            Database("accounts", first, first.create_database("accounts")),
            Database("ledger", second, second.create_database("ledger")),
        )
        for database in stage.databases:
            database.create()
        yield stage
