"""What `syncpoint check` finds on real PostgreSQL servers, and that its fixes mend it."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from coordinator.config import Settings
from coordinator.model import BranchId, LogId, MemberId, TransactionId, Xid
from coordinator.participant import Finding, Level
from participants.postgres import embedded, inspection, observation, statements
from participants.postgres.embedded import EmbeddedServer
from participants.postgres.inspection import inspect
from participants.postgres.location import Location
from participants.postgres.statements import Begin
from tests.support.postgres import new_database, query
from tests.support.proxy import Proxy
from tests.support.versions import server_of

LOG, OTHER_LOG = LogId("0" * 15 + "1"), LogId("0" * 15 + "2")
MUST, NOTE, OK = Level.MUST_CHANGE, Level.NOTE, Level.OK


async def look(
    url: str,
    *,
    pool_size: int = 5,
    begin: Begin | None = None,
    log: LogId | None = LOG,
    settings: Settings | None = None,
) -> dict[str, Finding]:
    """The findings by their subjects; whatever is not well says what to do."""
    location = Location("accounts", url)
    found = await inspect(location, pool_size, begin or Begin(), log, settings or Settings())
    assert len({each.subject for each in found}) == len(found)
    password = psycopg.conninfo.conninfo_to_dict(url).get("password")
    for each in found:
        assert each.fix or each.level is OK
        assert password is None or str(password) not in each.message + each.fix
    return {each.subject: each for each in found}


def wrong(found: dict[str, Finding]) -> set[str]:
    return {each.subject for each in found.values() if each.level is MUST}


def as_role(url: str, role: str) -> str:
    """The url for a new role that may only log in."""
    query(url, f"CREATE ROLE {role} LOGIN PASSWORD 'app'")
    parts = psycopg.conninfo.conninfo_to_dict(url)
    return f"postgresql://{role}:app@127.0.0.1:{parts['port']}/{parts['dbname']}"


def gid(log: LogId) -> str:
    transaction = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")
    return str(Xid(log, MemberId("0" * 16), transaction, BranchId(secrets.token_hex(8))))


def prepare(url: str, name: str) -> None:
    query(url, f"BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION '{name}'")


def end(url: str) -> None:
    for (name,) in query(
        url, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
    ):
        query(url, f"ROLLBACK PREPARED '{name}'")


@pytest.fixture
def fresh(database: str) -> Iterator[str]:
    """The url of the database; roles, settings and branches made in the test go with it."""
    roles = "SELECT rolname FROM pg_roles"
    before = query(database, roles)
    yield database
    end(database)
    query(database, f"ALTER DATABASE {database.rpartition('/')[2]} RESET ALL")
    for (role,) in set(query(database, roles)) - set(before):
        query(database, f"DROP ROLE {role}")


@pytest.fixture
def own(fresh: str, postgres_server: EmbeddedServer) -> Iterator[str]:
    """The url of a database of the test's own, for rights that are not given back."""
    url = new_database(postgres_server)
    yield url
    query(fresh, f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")


@pytest.fixture(scope="module")
def careless() -> Iterator[EmbeddedServer]:
    """A server as somebody sets it up who wants speed and has little memory."""
    settings = {
        "fsync": "off",
        "full_page_writes": "off",
        "synchronous_commit": "off",
        "max_connections": "12",
    }
    with EmbeddedServer(settings, max_prepared_transactions=4) as server:
        yield server


async def test_a_plain_role_on_a_plain_server_is_enough(fresh: str) -> None:
    found = await look(as_role(fresh, "plain"))
    assert wrong(found) == set()
    assert found["role"].level is OK and "role plain may see prepared" in found["role"].message
    assert "PostgreSQL 18." in found["connection"].message
    assert found["durability"].level is found["timeouts"].level is found["clock"].level is OK
    assert found["standbys"].level is NOTE and "promoted" in found["standbys"].message
    assert "pooler" not in found


async def test_a_superuser_is_noted(fresh: str) -> None:
    found = await look(fresh)
    assert wrong(found) == set()
    assert found["role"].level is NOTE and "--role-sql" in found["role"].fix


async def test_what_a_careless_server_must_change(careless: EmbeddedServer) -> None:
    found = await look(careless.url(), pool_size=10)
    assert wrong(found) == {"slots", "connections", "fsync", "full_page_writes"}
    assert "4, of which 3 can be used" in found["slots"].message
    assert "ALTER SYSTEM SET max_prepared_transactions = 64" in found["slots"].fix
    assert "12 connections" in found["connections"].message
    assert "up to 14" in found["connections"].message
    assert "the adapter sets it on" in found["synchronous_commit"].message
    for name in ("fsync", "full_page_writes"):
        sql, _, reload = found[name].fix.partition("; ")
        query(careless.url(), sql)
        query(careless.url(), reload)
        while query(careless.url(), f"SHOW {name}") != [("on",)]:
            pass
    assert wrong(await look(careless.url(), pool_size=3)) == set()


async def test_fewer_slots_than_connections_are_noted(careless: EmbeddedServer) -> None:
    found = await look(careless.url(), pool_size=2)
    assert found["slots"].level is NOTE
    assert "enough for 1 process of pool_size 2" in found["slots"].message
    assert "max_connections has room for 2" in found["slots"].message


async def test_slots_that_are_all_in_use(careless: EmbeddedServer) -> None:
    for number in range(4):
        prepare(careless.url(), f"other-{number}")
    try:
        found = await look(careless.url(), pool_size=3)
    finally:
        end(careless.url())
    assert "branches" in wrong(found)
    assert "4 of 4 slots are in use: 4 of others; the oldest for 0:0" in found["branches"].message


async def test_synchronous_standbys(careless: EmbeddedServer) -> None:
    url = careless.url()
    query(url, "ALTER SYSTEM SET synchronous_standby_names = 'second'")
    query(url, "SELECT pg_reload_conf()")
    while query(url, "SHOW synchronous_standby_names") != [("second",)]:
        pass
    assert (await look(url, pool_size=3))["standbys"] == Finding(
        "standbys", OK, "synchronous_standby_names is 'second'"
    )


async def test_a_standby_and_no_slots() -> None:
    with EmbeddedServer({"hot_standby": "on"}, max_prepared_transactions=0) as server:
        found = await look(server.url())
        assert wrong(found) == {"slots"}
        assert "SET max_prepared_transactions = 64; then restart" in found["slots"].fix
        server.stop()
        (server._data / "standby.signal").touch()
        embedded._give_to_server(server._data / "standby.signal")
        server.start()
        found = await look(server.url())
    assert wrong(found) == {"primary"} and "name the primary" in found["primary"].fix


async def test_revoked_rights_and_their_grants(own: str) -> None:
    url = as_role(own, "stripped")
    for right in (
        "EXECUTE ON FUNCTION pg_control_system, pg_prepared_xact, pg_stat_get_activity",
        "SELECT ON pg_prepared_xacts",
    ):
        query(own, f"REVOKE {right} FROM PUBLIC")
    found = await look(url)
    assert wrong(found) == {"role"} and "branches" not in found
    query(own, found["role"].fix.partition(": ")[2])
    found = await look(url)
    assert wrong(found) == set() and found["role"].level is OK and "branches" in found


def test_every_function_that_is_called_is_asked_for() -> None:
    called = set(re.findall(r"\b(pg_\w+)\(", Path(statements.__file__).read_text()))
    behind_views = {"pg_prepared_xact", "pg_stat_get_activity"}
    assert set(observation.FUNCTIONS) == called | behind_views


async def test_branches_of_ours_of_other_logs_and_of_others(fresh: str) -> None:
    url = as_role(fresh, "worker")
    for name in (gid(LOG), gid(LOG), gid(OTHER_LOG), "somebody"):
        prepare(url, name)
    told = "4 of 64 slots are in use: 2 ours, 1 of other decision logs, 1 of others; the oldest"
    found = await look(url)
    assert told in found["branches"].message and wrong(found) == set()
    assert not {"old branches", "foreign branches", "owners"} & found.keys()
    unknown = (await look(url, log=None))["branches"].message
    assert "3 of decision logs, 1 of others" in unknown


async def test_old_branches_are_told_with_the_way_to_end_them(fresh: str) -> None:
    for name in (gid(LOG), gid(OTHER_LOG), "somebody"):
        prepare(fresh, name)
    found = await look(fresh, settings=Settings(timeout_max=0.000001))
    assert found["old branches"].level is found["foreign branches"].level is NOTE
    assert found["old branches"].message.startswith("1 of ours are prepared for longer")
    assert "syncpoint recover" in found["old branches"].fix
    assert found["foreign branches"].message.startswith("2 that are not ours")
    assert "ROLLBACK PREPARED" in found["foreign branches"].fix


async def test_branches_that_another_role_prepared_cannot_be_ended(fresh: str) -> None:
    prepare(as_role(fresh, "first_role"), gid(LOG))
    other = as_role(fresh, "second_role")
    found = await look(other)
    assert wrong(found) == {"owners"}
    assert "connect as first_role" in found["owners"].fix
    (name,) = query(fresh, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        query(other, f"ROLLBACK PREPARED '{name[0]}'")
    assert "owners" not in await look(fresh)  # a superuser may


async def test_other_roles_that_use_the_adapter_here(fresh: str) -> None:
    first, second = as_role(fresh, "role_a"), as_role(fresh, "role_b")
    with psycopg.connect(first, application_name="syncpoint"):
        found = await look(second)
    assert found["other roles"].level is NOTE and "role_a" in found["other roles"].message
    assert "other roles" not in await look(second)


async def test_limits_of_connections(fresh: str) -> None:
    url = as_role(fresh, "limited")
    query(fresh, "ALTER ROLE limited CONNECTION LIMIT 8")
    found = await look(url)
    assert wrong(found) == {"connections"}
    assert "8 connections are open to role limited" in found["connections"].message
    assert (await look(url, pool_size=4))["connections"].message.endswith(
        "room for 1 process at full load"
    )


@pytest.mark.parametrize(
    ("made_by", "restored_by"),
    [
        ("ALTER ROLE r SET {} = 5000", 'ALTER ROLE "r" RESET {}'),
        ("ALTER DATABASE d SET {} = 5000", 'ALTER DATABASE "d" RESET {}'),
        ("ALTER ROLE r IN DATABASE d SET {} = 5000", 'ALTER ROLE "r" IN DATABASE "d" RESET {}'),
    ],
)
async def test_timeouts_that_cut_transactions_short(
    fresh: str, made_by: str, restored_by: str
) -> None:
    database = fresh.rpartition("/")[2]
    url = as_role(fresh, "r")
    levels = {"transaction_timeout": MUST, "statement_timeout": NOTE, "lock_timeout": NOTE}
    for name in (*levels, "idle_in_transaction_session_timeout"):
        query(fresh, made_by.format(name).replace(" d ", f" {database} "))
    found = await look(url)
    assert wrong(found) == {"transaction_timeout"}
    for name, level in levels.items():
        assert found[name].level is level and f"{name} is 5 s by ALTER" in found[name].message
        fix = restored_by.format(name).replace('"d"', f'"{database}"')
        assert fix in found[name].fix
        query(fresh, fix)
    assert "sets its own" in found["idle_in_transaction_session_timeout"].message
    assert not levels.keys() & (await look(url)).keys()


async def test_timeouts_that_cut_nothing(fresh: str) -> None:
    """Longer than the deadline; or the participant sets its own for every branch."""
    url = as_role(fresh, "patient")
    query(fresh, "ALTER ROLE patient SET lock_timeout = '5s'")
    query(fresh, "ALTER ROLE patient SET idle_session_timeout = '5s'")
    assert (await look(url, settings=Settings(timeout=5)))["timeouts"].level is OK
    own = await look(url, begin=Begin(lock_timeout_ms=1000))
    assert own["timeouts"].level is OK and "lock_timeout" not in own
    assert own["idle_session_timeout"].level is OK
    in_url = await look(f"{url}?options=-c%20statement_timeout%3D7000")
    assert "7 s by the url" in in_url["statement_timeout"].message
    assert "out of the url" in in_url["statement_timeout"].fix


async def test_transactions_that_are_read_only_by_default(fresh: str) -> None:
    url = as_role(fresh, "reader")
    query(fresh, "ALTER ROLE reader SET default_transaction_read_only = on")
    found = await look(url)
    assert wrong(found) == {"read only"}
    query(fresh, found["read only"].fix)
    assert wrong(await look(url)) == set()


@pytest.mark.parametrize("off", [-60.0, 60.0])
async def test_a_clock_that_is_wrong(
    fresh: str, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moves this machine's clock, since the server's cannot be moved alone."""
    now = observation.time.time
    monkeypatch.setattr(observation.time, "time", lambda: now() + off)
    clock = (await look(fresh))["clock"]
    assert clock.level is NOTE and "NTP" in clock.fix
    assert ("behind" if off > 0 else "ahead of") in clock.message and "60." in clock.message


async def test_servers_that_are_away_or_refuse_are_findings(
    fresh: str, postgres_server: EmbeddedServer
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        down = await look(f"postgresql://app:hidden@127.0.0.1:{port}/x")
    assert set(down) == wrong(down) == {"connection"}
    assert "cannot be reached" in down["connection"].message
    for url, fix in (
        (fresh.replace(postgres_server.password, "wrong-one"), "correct the user"),
        (postgres_server.url("nowhere"), "CREATE DATABASE"),
    ):
        found = await look(url)
        assert wrong(found) == {"connection"} and fix in found["connection"].fix


async def test_a_server_that_does_not_answer(
    fresh: str, postgres_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "INSPECTION_SECONDS_MAX", 0.3)
    async with Proxy(postgres_server.port) as proxy:
        proxy.black_hole()
        found = await look(proxy.url(fresh))
    assert wrong(found) == {"connection"}
    assert "does not answer within 0.3 s" in found["connection"].message


async def test_a_question_that_is_refused_is_a_finding(own: str) -> None:
    url = as_role(own, "refused")
    query(own, "REVOKE EXECUTE ON FUNCTION pg_is_in_recovery FROM PUBLIC")
    found = await look(url)
    assert wrong(found) == {"connection"} and "permission denied" in found["connection"].message
    assert "--role-sql" in found["connection"].fix


async def test_the_oldest_version_that_is_served() -> None:
    with server_of(13) as server:
        found = await look(as_role(server.url(), "plain"), pool_size=3)
        assert wrong(found) == {"fsync"}, "off to save time, and a server of tests need not keep"
        assert found["version"].level is NOTE and "13 gets no" in found["version"].message
