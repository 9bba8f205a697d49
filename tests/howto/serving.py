"""Real servers for the how-tos: processes on a socket of loopback, stopped by their id."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import httpx
import psycopg
import pytest

from participants.postgres.embedded import EmbeddedServer
from tests.support.postgres import gids, query

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SECONDS_MAX = 30.0
BALANCE = 10_000
DATABASE = "shop"
COMMANDS = {
    "script": 'python script.py a1 bob 30 "invoice 7"',
    "flask": "gunicorn --workers 2 --threads 4 flask_app:app",
    "preload": "gunicorn --workers 2 --threads 4 --preload flask_app:app",
    "fastapi": "uvicorn --workers 2 fastapi_app:app",
    "wsgi": "gunicorn --workers 2 --threads 4 django_app:wsgi",
    "asgi": "uvicorn --lifespan on django_app:asgi",
    "celery": "celery --app celery_app worker --pool prefork --concurrency 2",
}
"""What the page gives to run; every one is run by a test."""
ACCOUNTS = f"""
DROP TABLE IF EXISTS account;
CREATE TABLE account (id text PRIMARY KEY, balance integer NOT NULL CHECK (balance >= 0));
INSERT INTO account SELECT 'a' || number, {BALANCE} FROM generate_series(0, 9) AS number;
"""
LEDGER = """
DROP TABLE IF EXISTS entry;
CREATE TABLE entry (request text, account text, amount integer);
"""


class Shop:
    """Two databases with the tables of the how-tos, and a log beside them."""

    def __init__(self, accounts_url: str, ledger_url: str, folder: Path) -> None:
        self.urls = (accounts_url, ledger_url)
        self.folder = folder
        self.environment = {
            "ACCOUNTS_URL": accounts_url,
            "LEDGER_URL": ledger_url,
            "SYNCPOINT_LOG": f"sqlite:///{folder / 'syncpoint.db'}",
        }
        empty(accounts_url, ACCOUNTS)
        empty(ledger_url, LEDGER)

    def balance(self, account: str) -> int:
        [(balance,)] = query(self.urls[0], f"SELECT balance FROM account WHERE id = '{account}'")
        return int(str(balance))

    def entries(self) -> dict[str, int]:
        """How often each request is in the ledger."""
        rows = query(self.urls[1], "SELECT request, count(*) FROM entry GROUP BY request")
        return {str(request): int(str(count)) for request, count in rows}

    def check(self) -> None:
        """Nothing is left prepared, and no money was made or lost."""
        wait_until(lambda: [gids(url) for url in self.urls] == [[], []], "something stays prepared")
        [(here,)] = query(self.urls[0], "SELECT sum(balance) FROM account")
        [(there,)] = query(self.urls[1], "SELECT coalesce(sum(amount), 0) FROM entry")
        assert int(str(here)) + int(str(there)) == 10 * BALANCE


def database_of(server: EmbeddedServer) -> str:
    """The url of the shop's database on a server."""
    if not query(server.url(), f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"):
        server.create_database(DATABASE)
    return server.url(DATABASE)


def command(name: str, instead_of: str = "", other: str = "") -> list[str]:
    """The words of a command of the page; `other` is what tests put around the named one."""
    words = shlex.split(COMMANDS[name])
    assert not instead_of or instead_of in words
    return [other if instead_of and each == instead_of else each for each in words]


def load(name: str, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example as a module, read anew for the databases of this test."""
    for variable, value in shop.environment.items():
        monkeypatch.setenv(variable, value)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


class Server:
    """A server process and its children; `url` is where it answers."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, output: Path) -> None:
        self.process = process
        self.url = url
        self._output = output

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def post(self, path: str, key: str | None = None, **order: object) -> httpx.Response:
        """A request; before the server is up the kernel lets it wait."""
        headers = {} if key is None else {"Idempotency-Key": key}
        return httpx.post(
            self.url + path, json=order, headers=headers, timeout=SECONDS_MAX, trust_env=False
        )


@contextmanager
def serving(
    shop: Shop,
    command: Sequence[str],
    *,
    socket_option: str,
    environment: Mapping[str, str] | None = None,
    folder: Path = EXAMPLES,
) -> Iterator[Server]:
    """Run a command of the how-tos in `folder`, on a socket that it inherits.

    `socket_option` hands it the descriptor, for instance `--fd={}`. What it printed is shown if the
    block fails, and it has to end with 0 when it is asked to.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        listening.set_inheritable(True)
        descriptor, port = listening.fileno(), listening.getsockname()[1]
        arguments = [*command, socket_option.format(descriptor)]
        with running(shop, arguments, environment=environment, folder=folder,
                     descriptors=(descriptor,)) as (process, output):  # fmt: skip
            listening.close()
            yield Server(process, f"http://127.0.0.1:{port}", output)


@contextmanager
def running(
    shop: Shop,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path = EXAMPLES,
    descriptors: Sequence[int] = (),
    graceful: bool = True,
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A program of this virtual environment, from now until the end of the block.

    Yields it with the file of what it prints. At the end it is asked to stop, which must succeed,
    or killed.
    """
    output = shop.folder / f"{command[0]}.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [Path(sys.executable).with_name(command[0]), *command[1:]],
            cwd=folder,
            env=environment_of(shop, environment),
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
        )
    try:
        yield process, output
        if graceful:
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS_MAX) in (0, -signal.SIGTERM)
    except BaseException as error:
        error.add_note(output.read_text(errors="replace")[-8000:])
        raise
    finally:
        kill_all(process)


def empty(url: str, tables: str) -> None:
    """End whatever an earlier test left in the database, and make its tables anew."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        for gid in gids(url):
            connection.execute(f"ROLLBACK PREPARED '{gid}'".encode())
        connection.execute(tables.encode())


def environment_of(shop: Shop, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment in which an example runs."""
    path = os.pathsep.join((str(ROOT), str(EXAMPLES)))
    return {
        **os.environ,
        **shop.environment,
        "PYTHONPATH": path,
        "HOME": str(shop.folder),  # gunicorn has a socket there
        "PYTHONDONTWRITEBYTECODE": "1",
        **(more or {}),
    }


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the process and its children, if it still runs."""
    if process.poll() is None:
        children = children_of(process.pid)
        process.kill()
        process.wait()
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue


def children_of(process_id: int) -> list[int]:
    try:
        told = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(each) for each in told.split()]


def wait_until(condition: Callable[[], object], complaint: str) -> None:
    """Poll a condition that no event announces."""
    give_up = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < give_up, complaint
        time.sleep(0.02)
