"""What is checked when a participant is opened, each failure with its fix."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import psycopg

from coordinator.errors import ConfigurationError
from participants.postgres.connection import ServerConnection
from participants.postgres.location import Location
from participants.postgres.replies import DatabaseUnavailable

VERSION_MIN = 130000

_REFUSALS = {
    "password authentication failed": "correct the user or the password in the url",
    "no password supplied": "put a password into the url, or use PGPASSFILE",
    "no pg_hba.conf entry": "allow this host, user and database in the server's pg_hba.conf",
    "role": "create the role with what `syncpoint check --role-sql` prints, or correct the user "
    "in the url",
    "database": "create it with CREATE DATABASE, or correct the url",
    "too many": "raise max_connections, or lower pool_size",
    "sorry, too many clients": "raise max_connections, or lower pool_size",
    "remaining connection slots": "raise max_connections, or lower pool_size",
    "permission denied for database": "run what `syncpoint check --role-sql` prints",
    "the database system is": "wait until it accepts connections, then try again",
}


async def connect_checked(
    name: str, location: Location, connect: Callable[[], Awaitable[ServerConnection]]
) -> ServerConnection:
    """A first connection, made by `connect`, to a server that can take part in two-phase commit.

    Raises `ConfigurationError` naming what is wrong, where, and the fix.
    """
    try:
        session = await connect()
    except psycopg.Error as error:
        wrong, fix = refusal(location, str(error))
        raise ConfigurationError(f"participant {name!r} {wrong}. Fix: {fix}") from error
    except DatabaseUnavailable as error:
        raise ConfigurationError(f"participant {name!r} at {location}: {error}") from error
    greeting = session.greeting
    problem = unfit(
        session.pgconn.server_version, greeting.in_recovery, greeting.max_prepared_transactions
    )
    if problem is not None:
        session.close()
        _, wrong, fix = problem
        raise ConfigurationError(f"participant {name!r} at {location}: {wrong}. Fix: {fix}")
    return session


def refusal(location: Location, message: str) -> tuple[str, str]:
    """What a failed connection means, and the fix; `message` is libpq's."""
    said = location.for_people(message.removeprefix("connection failed: "))
    reason = said.partition("FATAL:")[2].strip()
    if not reason:
        return f"cannot be reached at {location}: {said}", "start the server, or correct the url"
    unquoted = reason.partition('"')[0]
    fixes = (fix for start, fix in _REFUSALS.items() if start in unquoted)
    return f"is refused by {location}: {reason}", next(fixes, "see the log of the server")


def unfit(version: int, in_recovery: bool, slots: int) -> tuple[str, str, str] | None:
    """Why nothing can be prepared on a server: subject, what is wrong, and the fix; None if it can.

    `version` as libpq tells it, `slots` is max_prepared_transactions.
    """
    if version < VERSION_MIN:
        return (
            "version",
            f"PostgreSQL {version // 10000} is too old: 13 or newer is needed",
            "upgrade the server",
        )
    if in_recovery:
        return (
            "primary",
            "the server is a standby, where nothing can be prepared",
            "name the primary in the url; with several hosts add target_session_attrs=read-write",
        )
    if slots == 0:
        return (
            "slots",
            "max_prepared_transactions is 0, so that nothing can be prepared",
            "ALTER SYSTEM SET max_prepared_transactions = 64; then restart the server (a reload "
            "is not enough), its standbys first",
        )
    return None
