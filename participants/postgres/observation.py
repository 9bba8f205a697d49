"""What `syncpoint check` reads of a PostgreSQL server.

One session reads, in one read-only transaction; a second one is opened only where a pooler sits
between, to see whether it shares sessions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import psycopg
from psycopg.rows import dict_row

from participants.postgres.location import Location

FUNCTIONS = (
    "pg_control_system",
    "pg_backend_pid",
    "pg_is_in_recovery",
    "pg_current_wal_lsn",
    "pg_walfile_name",
    "pg_prepared_xact",
    "pg_current_xact_id",
    "pg_current_xact_id_if_assigned",
    "pg_xact_status",
    "pg_stat_get_activity",
    "pg_terminate_backend",
)
"""What the statements of the protocol call."""

_SETTINGS = (
    "default_transaction_read_only",
    "fsync",
    "full_page_writes",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "max_connections",
    "max_prepared_transactions",
    "reserved_connections",
    "statement_timeout",
    "superuser_reserved_connections",
    "synchronous_commit",
    "synchronous_standby_names",
    "transaction_timeout",
)

_WHO = """
SELECT current_user::text AS role,
       current_database()::text AS database,
       pg_backend_pid() AS process_id,
       pg_is_in_recovery() AS in_recovery,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS is_superuser,
       (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS role_limit,
       (SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS database_limit,
       (SELECT sum(numbackends)::integer FROM pg_stat_database) AS sessions,
       has_table_privilege('pg_prepared_xacts', 'SELECT') AS sees_prepared,
       ARRAY(SELECT name FROM unnest(%s::text[]) AS name
             WHERE NOT has_function_privilege(to_regproc(name), 'EXECUTE')) AS forbidden
"""
_OTHERS = """
SELECT (SELECT count(*) FROM pg_stat_replication) AS standbys,
       ARRAY(SELECT DISTINCT usename::text FROM pg_stat_activity
             WHERE datname = current_database() AND usename <> current_user
             AND application_name = 'syncpoint') AS other_roles
"""
_PREPARED = """
SELECT gid, owner::text AS owner, database = current_database() AS here,
       extract(epoch FROM clock_timestamp() - prepared)::float8 AS age
FROM pg_prepared_xacts ORDER BY prepared
"""


class Value(msgspec.Struct, frozen=True):
    """A setting as new sessions of this role have it here, and where it comes from."""

    name: str
    setting: str
    source: str


class Prepared(msgspec.Struct, frozen=True):
    """A prepared branch of anybody in the whole cluster; `age` in seconds by the server's clock."""

    gid: str
    owner: str
    here: bool
    age: float


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What was read. `ahead` and `unsure` in seconds: the server's clock against ours, and how
    exactly that is known. `shared` tells that a pooler gave one session to two clients; `prepared`
    is None where it may not be seen."""

    version: int
    role: str
    database: str
    process_id: int
    in_recovery: bool
    is_superuser: bool
    role_limit: int
    database_limit: int
    sessions: int
    sees_prepared: bool
    forbidden: Sequence[str]
    values: dict[str, Value]
    ahead: float = 0.0
    unsure: float = 0.0
    has_pooler: bool = False
    shared: bool = False
    standbys: int = 0
    other_roles: Sequence[str] = ()
    prepared: Sequence[Prepared] | None = None

    def number(self, setting: str) -> int:
        """A setting's value in its unit, milliseconds for times; 0 for one that is not there."""
        return int(self.values[setting].setting) if setting in self.values else 0

    def text(self, setting: str) -> str:
        return self.values[setting].setting if setting in self.values else ""


async def connect(location: Location) -> psycopg.AsyncConnection[dict[str, Any]]:
    """A session with the server's own settings for this role. Raises `psycopg.Error`."""
    return await psycopg.AsyncConnection.connect(
        location.conninfo, autocommit=True, prepare_threshold=None, row_factory=dict_row
    )


async def read(connection: psycopg.AsyncConnection[dict[str, Any]], location: Location) -> Server:
    """Ask for all of it. Raises `psycopg.Error`."""

    async def ask(statement: str, *values: object) -> list[dict[str, Any]]:
        cursor = await connection.execute(statement.encode(), values or None)
        return await cursor.fetchall()

    await connection.set_read_only(True)
    async with connection.transaction():
        (who,) = await ask(_WHO, list(FUNCTIONS))
        values = await ask(
            "SELECT name, setting, source FROM pg_settings WHERE name = ANY(%s)", list(_SETTINGS)
        )
        found: dict[str, Any] = {**who, "version": connection.info.server_version}
        found["values"] = {each["name"]: msgspec.convert(each, Value) for each in values}
        if "pg_stat_get_activity" not in who["forbidden"]:
            (others,) = await ask(_OTHERS)
            found |= others
        if who["sees_prepared"] and "pg_prepared_xact" not in who["forbidden"]:
            found["prepared"] = await ask(_PREPARED)
        before = time.time()
        (clock,) = await ask("SELECT extract(epoch FROM clock_timestamp())::float8 AS now")
        after = time.time()
        found["ahead"] = clock["now"] - (before + after) / 2
        found["unsure"] = (after - before) / 2
    # A pooler makes up the process id that it tells its clients.
    if who["process_id"] != connection.info.backend_pid:
        found["has_pooler"] = True
        found["shared"] = await _is_shared(location, who["process_id"])
    return msgspec.convert(found, Server)


async def _is_shared(location: Location, process_id: int) -> bool:
    """Whether a second client is given the session that an idle, connected first one had."""
    async with await connect(location) as second:
        cursor = await second.execute("SELECT pg_backend_pid() AS process_id")
        row = await cursor.fetchone()
    return row is not None and row["process_id"] == process_id
