"""Two databases on two servers, a nursery, and what a test reads there from outside."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psycopg

from coordinator import Coordinator
from coordinator.commands.servers import running
from coordinator.model import TransactionId, Xid
from participants.postgres.embedded import EmbeddedServer
from tests.crash.accounting import OPENING_BALANCE, Books
from tests.crash.matrix import ACCOUNTS, LEDGER, PARTICIPANTS
from tests.crash.nursery import Nursery
from tests.support.postgres import gids, query
from tests.support.versions import server_of

SCHEMA = """
CREATE TABLE account (id text PRIMARY KEY, balance int NOT NULL);
CREATE TABLE marker (transaction text NOT NULL, account text NOT NULL);
CREATE TABLE entry (id serial PRIMARY KEY, note text UNIQUE DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION move(amount int, transaction text, owner text) RETURNS void LANGUAGE sql AS $$
    UPDATE account SET balance = balance + amount WHERE id = owner;
    INSERT INTO marker VALUES (transaction, owner)
$$;
"""
# Younger than any horizon, which would protect it as well.
OF_ANOTHER_LOG = {
    name: f"sp:{'f' * 16}:{'e' * 16}:ffffffff-0000-7000-8000-000000000000:{number:016x}"
    for number, name in enumerate(PARTICIPANTS)
}
WAIT_SECONDS_MAX = 30.0
POLL_SECONDS = 0.02


@contextmanager
def two_servers() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    """Of the newest version or the one that SYNCPOINT_TEST_POSTGRESQL names, with room for many.

    They do not wait for the disk: tests crash processes, and not the machine.
    """
    major = int(os.environ.get("SYNCPOINT_TEST_POSTGRESQL", "18"))
    room = {"max_connections": "300"}
    new = (server_of(major, slots=400, settings=room) for _ in range(2))
    with running(*new) as (first, second):
        yield first, second


class Sight(msgspec.Struct):
    """What is in one database: balances, markers, branches, locked accounts."""

    balances: dict[str, int]
    markers: dict[str, list[str]]
    branches: dict[str, list[str]]
    """Names of prepared branches by their transactions."""
    locked: frozenset[str]


class Place:
    """Where cases are run; `servers` hold `accounts` and `ledger`, and are running."""

    def __init__(self, servers: Sequence[EmbeddedServer], nursery: Nursery, folder: Path) -> None:
        self.servers = servers
        self.nursery = nursery
        self.folder = folder
        self.direct: dict[str, str] = {}
        for name, server in zip(PARTICIPANTS, servers, strict=True):
            self.direct[name] = server.create_database(f"crash_{name}_{secrets.token_hex(4)}")
            query(self.direct[name], SCHEMA)

    def open_accounts(self, accounts: Sequence[str]) -> None:
        """Make the accounts in both databases; what a failure has left goes first."""
        self.nursery.end_all()
        for server in self.servers:
            server.start()
        for url in self.direct.values():
            for gid in gids(url):
                query(url, f"ROLLBACK PREPARED '{gid}'")
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(
                    "INSERT INTO account SELECT unnest(%s::text[]), %s",
                    (list(accounts), OPENING_BALANCE),
                )

    @contextmanager
    def branches_of_another_log(self) -> Iterator[list[bool]]:
        """Hold one in each database; fills in at the end whether each was still there."""
        kept: list[bool] = []
        for name, url in self.direct.items():
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("BEGIN")
                connection.execute("INSERT INTO marker VALUES ('another', 'log')")
                connection.execute(f"PREPARE TRANSACTION '{OF_ANOTHER_LOG[name]}'".encode())
        try:
            yield kept
        finally:
            for name, url in self.direct.items():
                kept.append(OF_ANOTHER_LOG[name] in gids(url))
                if kept[-1]:
                    query(url, f"ROLLBACK PREPARED '{OF_ANOTHER_LOG[name]}'")

    def wait_for_sessions_to_end(self) -> None:
        """Of processes that are gone: what they had sent is done then, or never will be."""
        self._wait_for_none(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'syncpoint'"
        )

    def wait_for_branches_to_end(self) -> None:
        """Until nothing is prepared but the branches of another log."""
        self._wait_for_none(
            "SELECT 1 FROM pg_prepared_xacts WHERE database = current_database() "
            f"AND gid NOT IN ('{OF_ANOTHER_LOG[ACCOUNTS]}', '{OF_ANOTHER_LOG[LEDGER]}')"
        )

    def _wait_for_none(self, statement: str) -> None:
        """Poll what no event announces, in both databases."""
        give_up = time.monotonic() + WAIT_SECONDS_MAX
        for url in self.direct.values():
            with psycopg.connect(url, autocommit=True) as connection:
                while connection.execute(statement.encode()).fetchone():
                    assert time.monotonic() < give_up, "it did not come to pass"
                    time.sleep(POLL_SECONDS)

    def prepared(self) -> dict[str, list[str]]:
        """All branches but those of another log, by participant."""
        return {
            name: [gid for gid in gids(url) if gid != OF_ANOTHER_LOG[name]]
            for name, url in self.direct.items()
        }

    def config(self, log: str, timeout: float) -> Path:
        """A file for `syncpoint recover`."""
        tables = "".join(
            f'[participants.{name}]\nkind = "postgresql"\nurl = "{url}"\npool_size = 2\n'
            for name, url in self.direct.items()
        )
        path = self.folder / f"{secrets.token_hex(4)}.toml"
        path.write_text(
            f'cluster = "crash"\nlog = "{log}"\n[settings]\ntimeout = {timeout}\n'
            f"timeout_max = {timeout}\nretention = 120.0\n{tables}"
        )
        return path

    async def books(self, log: str, cases: dict[str, str]) -> dict[str, Books]:
        """The books of many cases, by account; `cases` maps each account to its transaction."""
        sights = {name: _look(url) for name, url in self.direct.items()}
        coordinator = Coordinator(log, cluster="crash")
        await coordinator.open(sweep=False)
        try:
            return {
                account: await _books(coordinator, sights, account, transaction)
                for account, transaction in cases.items()
            }
        finally:
            await coordinator.close()


async def _books(
    coordinator: Coordinator, sights: dict[str, Sight], account: str, transaction: str
) -> Books:
    record = (await coordinator.engine().log.read(TransactionId(transaction))).record
    branches = record.decision.branches if record else ()
    return Books(
        balance={name: sight.balances[account] for name, sight in sights.items()},
        markers={name: sight.markers.get(account, []) for name, sight in sights.items()},
        prepared={name: sight.branches.get(transaction, []) for name, sight in sights.items()},
        locked=frozenset(name for name, sight in sights.items() if account in sight.locked),
        verdict=str(record.decision.verdict) if record else "",
        named=frozenset(branch.participant for branch in branches),
        status=await coordinator.status(transaction),
    )


def _look(url: str) -> Sight:
    with psycopg.connect(url, autocommit=True) as connection:
        balances: dict[str, int] = dict(
            connection.execute("SELECT id, balance FROM account").fetchall()
        )
        markers: dict[str, list[str]] = {}
        for transaction, account in connection.execute("SELECT transaction, account FROM marker"):
            markers.setdefault(account, []).append(transaction)
        free = connection.execute("SELECT id FROM account FOR UPDATE SKIP LOCKED").fetchall()
    branches: dict[str, list[str]] = {}
    for gid in gids(url):
        if xid := Xid.parse(gid):
            branches.setdefault(xid.transaction, []).append(gid)
    locked = balances.keys() - {account for (account,) in free}
    return Sight(balances, markers, branches, frozenset(locked))


@contextmanager
def stopped(server: EmbeddedServer) -> Iterator[None]:
    """No process of the server runs while the block does."""
    first = server.process_id
    assert first is not None
    os.kill(first, signal.SIGSTOP)  # first, so that it starts no more of them
    processes = [first, *_children_of(first)]
    for each in processes:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in processes:
            os.kill(each, signal.SIGCONT)


def _children_of(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(each) for each in found]
