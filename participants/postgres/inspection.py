"""`syncpoint check` for a PostgreSQL database: its settings against what is needed, with the fixes.

What is read stands in `observation`, and what it means in `findings`.
"""

from __future__ import annotations

import asyncio

import psycopg
from psycopg.conninfo import conninfo_to_dict

from coordinator.config import Settings
from coordinator.model import LogId
from coordinator.participant import Finding, Level
from participants.postgres.checks import refusal
from participants.postgres.findings import judge, quoted
from participants.postgres.location import Location
from participants.postgres.observation import FUNCTIONS, connect, read
from participants.postgres.statements import Begin

INSPECTION_SECONDS_MAX = 20.0


async def inspect(
    location: Location, pool_size: int, begin: Begin, log: LogId | None, settings: Settings
) -> list[Finding]:
    """Everything that can be seen over a connection of the participant's own role.

    `begin` holds the limits that every branch sets for itself. Changes nothing and never raises for
    what the server does: that is a finding.
    """
    try:
        async with asyncio.timeout(INSPECTION_SECONDS_MAX):
            connection = await connect(location)
            try:
                server = await read(connection, location)
            except psycopg.Error as error:
                return [_unanswered(location, error)]
            finally:
                await connection.close()
    except psycopg.Error as error:
        return [Finding("connection", Level.MUST_CHANGE, *refusal(location, str(error)))]
    except TimeoutError:
        message = f"{location} does not answer within {INSPECTION_SECONDS_MAX:g} s"
        fix = "look at the server and at the network to it"
        return [Finding("connection", Level.MUST_CHANGE, message, fix)]
    return list(judge(server, str(location), pool_size, begin, log, settings))


def _unanswered(location: Location, error: psycopg.Error) -> Finding:
    fix = {
        "42501": "run what `syncpoint check --role-sql` prints",
        "57014": "raise the statement_timeout of the server, the database or the role",
    }.get(error.sqlstate or "", "see the log of the server")
    message = f"{location} answers: {location.for_people(str(error))}"
    return Finding("connection", Level.MUST_CHANGE, message, fix)


def role_sql(name: str, location: Location) -> str:
    """SQL that makes a role for a service and gives it what the adapter needs, and no more.

    The user of the url is taken for the role, unless it is the administrator's own.
    """
    given = conninfo_to_dict(location.conninfo)
    user, database = str(given.get("user") or ""), str(given.get("dbname") or "")
    role = quoted("app" if user in ("", "postgres") else user)
    functions = "\n".join(
        f"GRANT EXECUTE ON FUNCTION pg_catalog.{each} TO {role};" for each in FUNCTIONS
    )
    return f"""\
-- Participant {name}, {location}: run as a superuser in database {database or "of the url"}.
-- All processes that share a decision log connect as this one role: a branch can be ended only
-- by the role that prepared it, and by a superuser.
CREATE ROLE {role} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION;
-- Give it a password, in psql: \\password {role}
GRANT CONNECT ON DATABASE {quoted(database or "name")} TO {role};

-- The service's own tables; leave out what it does not do.
GRANT USAGE ON SCHEMA public TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role};
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role};

-- Everybody has these rights, unless they were revoked from PUBLIC.
GRANT SELECT ON pg_catalog.pg_prepared_xacts, pg_catalog.pg_stat_activity TO {role};
{functions}
"""
