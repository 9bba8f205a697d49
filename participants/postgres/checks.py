"""What is checked when a participant is opened, each failure with its fix."""

from __future__ import annotations

import psycopg

from coordinator.errors import ConfigurationError
from participants.postgres.connection import Configure, ServerConnection
from participants.postgres.location import Location
from participants.postgres.replies import DatabaseUnavailable
from participants.postgres.statements import Greeting

VERSION_MIN = 130000

_REFUSALS = {
    "password authentication failed": "correct the user or the password in the url",
    "no password supplied": "put a password into the url, or use PGPASSFILE",
    "no pg_hba.conf entry": "allow this host, user and database in the server's pg_hba.conf",
    "role": "create the role, or correct the user in the url",
    "database": "create it with CREATE DATABASE, or correct the url",
    "too many": "raise max_connections, or lower pool_size",
}


async def connect_checked(
    name: str, location: Location, configure: Configure | None
) -> ServerConnection:
    """A first connection to a server that can take part in two-phase commit.

    Raises `ConfigurationError` naming what is wrong, where, and the fix.
    """
    try:
        session = await ServerConnection.open(location.conninfo, configure)
    except psycopg.Error as error:
        raise ConfigurationError(_unreachable(name, location, str(error))) from error
    except DatabaseUnavailable as error:
        raise ConfigurationError(f"participant {name!r} at {location}: {error}") from error
    problem = _problem(session.greeting, session.pgconn.server_version)
    if problem:
        session.close()
        raise ConfigurationError(f"participant {name!r} at {location}: {problem}")
    return session


def _unreachable(name: str, location: Location, message: str) -> str:
    said = location.for_people(message.removeprefix("connection failed: "))
    reason = said.partition("FATAL:")[2].strip()
    for start, fix in _REFUSALS.items():
        if start in reason.partition('"')[0]:
            return f"participant {name!r} is refused by {location}: {reason}. Fix: {fix}"
    if reason:
        return f"participant {name!r} is refused by {location}: {reason}"
    return (
        f"participant {name!r} cannot be reached at {location}: {said}. Start the server, or "
        "correct the url"
    )


def _problem(greeting: Greeting, version: int) -> str:
    if version < VERSION_MIN:
        return f"PostgreSQL {version // 10000} is too old: 13 or newer is needed"
    if greeting.in_recovery:
        return (
            "the server is a standby, where nothing can be prepared. Name the primary in the url; "
            "with several hosts add target_session_attrs=read-write"
        )
    if greeting.max_prepared_transactions == 0:
        return (
            "max_prepared_transactions is 0, so that nothing can be prepared. Fix: ALTER SYSTEM "
            "SET max_prepared_transactions = 64; then restart the server (a reload is not enough)"
        )
    return ""
