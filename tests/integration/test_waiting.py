"""Which sessions wait for a prepared branch: real waiters on real servers, old ones too."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from coordinator.cli import main
from coordinator.commands.demo.stage import Stage
from coordinator.model import Branch, BranchId, LogId, MemberId, TransactionId, Xid
from coordinator.participant import ShowsWaiters, Waiter
from participants.postgres import DatabaseUnavailable, PostgreSQL
from participants.postgres.embedded import EmbeddedServer
from participants.postgres.waiting import Queued, _line
from tests.support.bank import wait_until
from tests.support.left import leave
from tests.support.postgres import DATABASE, clean_database, new_database, query
from tests.support.stage import ACCOUNT
from tests.support.versions import server_of

ALICE = "UPDATE account SET balance = balance + 1 WHERE id = 'alice'"
BOB = "UPDATE account SET balance = balance + 1 WHERE id = 'bob'"
ALTER = "ALTER TABLE account ADD COLUMN note text"
READ = "SELECT count(*) FROM account"
ADVISORY = "SELECT pg_advisory_xact_lock(17)"
TRANSACTION = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")


def branch(number: int) -> Branch:
    xid = Xid(LogId("a" * 16), MemberId("b" * 16), TRANSACTION, BranchId(f"{number:016x}"))
    return Branch(xid, "accounts")


class Sessions:
    """Sessions of users that wait; they are ended with the block."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._open: list[psycopg.Connection[Any]] = []

    def wait(self, statement: str) -> int:
        """Start a statement that has to wait; returns the process id once it does."""
        connection = psycopg.connect(self.url, autocommit=True)
        self._open.append(connection)
        process = connection.info.backend_pid
        connection.pgconn.send_query(statement.encode())
        connection.pgconn.flush()
        waits = f"SELECT 1 FROM pg_locks WHERE pid = {process} AND NOT granted"
        wait_until(lambda: query(self.url, waits))
        return process

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._open:
            process = connection.info.backend_pid
            query(self.url, f"SELECT pg_terminate_backend({process})")
            connection.close()


@contextmanager
def prepared(url: str, *branches: tuple[Branch, tuple[str, ...]]) -> Iterator[Sessions]:
    """Branches that ran their statements, each in a savepoint, and sessions to wait for them."""
    for each, statements in branches:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("BEGIN")
            for statement in statements:
                with connection.transaction():
                    connection.execute(statement.encode())
            connection.execute(f"PREPARE TRANSACTION '{each.xid}'".encode())
    try:
        with Sessions(url) as sessions:
            yield sessions
    finally:
        for each, _ in branches:
            query(url, f"ROLLBACK PREPARED '{each.xid}'")


def ask(url: str, *branches: Branch) -> list[Waiter]:
    """What a participant says, which need not be open."""
    participant = PostgreSQL("accounts", url)
    assert isinstance(participant, ShowsWaiters)
    return list(asyncio.run(participant.waiting(branches)))


def line(waiters: list[Waiter]) -> dict[int, int | None]:
    """Each session, and whom it stands behind."""
    return {each.session: each.behind for each in waiters}


def test_who_waits_for_a_row_a_table_an_advisory_lock_and_who_queues_behind(
    database: str,
) -> None:
    one, other = branch(1), branch(2)
    with prepared(database, (one, (ALICE, ADVISORY)), (other, (BOB,))) as sessions:
        row = sessions.wait(ALICE)
        second = sessions.wait(ALICE)
        advisory = sessions.wait(ADVISORY)
        found = ask(database, one)
        assert line(found) == {row: None, second: row, advisory: None}
        assert [each.session for each in found] == [row, second, advisory], "longest first"
        assert {each.query for each in found} == {ALICE, ADVISORY}
        assert all(each.seconds is not None and 0 <= each.seconds < 60 for each in found)
        assert {each.branch for each in found} == {one.id}
        assert ask(database, other) == [] == ask(database)
        table = sessions.wait(ALTER)
        reader = sessions.wait(READ)
        both = ask(database, one, other)
        of_other = [each for each in both if each.branch == other.id]
        assert line(of_other) == {table: None, reader: table}
        of_one = [each for each in both if each.branch == one.id]
        assert line(of_one) == {row: None, second: row, advisory: None, table: None, reader: table}


def test_who_waits_for_somebody_else_is_not_named(database: str) -> None:
    one = branch(1)
    with psycopg.connect(database) as user:
        user.execute(BOB.encode())
        with prepared(database, (one, (ALICE,))) as sessions:
            elsewhere = sessions.wait(BOB)
            behind = sessions.wait(BOB)
            assert ask(database, one) == []
            mine = sessions.wait(ALICE)
            assert line(ask(database, one)) == {mine: None}
            assert len({elsewhere, behind, mine}) == 3


def test_only_a_conflicting_lock_is_blamed(database: str) -> None:
    """Both branches hold a lock on the table; SHARE conflicts with that of the writer only."""
    reader, writer = branch(1), branch(2)
    share = "LOCK TABLE account IN SHARE MODE"
    reading = "SELECT 1 FROM account FOR KEY SHARE LIMIT 1"
    with prepared(database, (reader, (reading,)), (writer, (BOB,))) as sessions:
        waiter = sessions.wait(f"BEGIN; {share}")
        found = ask(database, reader, writer)
        assert [(each.branch, each.session) for each in found] == [(writer.id, waiter)]


@pytest.fixture
def poor_role(postgres_server: EmbeddedServer) -> Iterator[str]:
    """The url of a role with no more rights than any other."""
    clean = clean_database(postgres_server)
    query(clean, "CREATE ROLE poor LOGIN PASSWORD 'poor'")
    try:
        yield psycopg.conninfo.make_conninfo(clean, user="poor", password="poor")
    finally:
        query(clean, "DROP ROLE poor")


def test_a_role_that_may_not_see_the_query_gets_the_rest(database: str, poor_role: str) -> None:
    one = branch(1)
    with prepared(database, (one, (ALICE,))) as sessions:
        first = sessions.wait(ALICE)
        second = sessions.wait(ALICE)
        found = ask(poor_role, one)
        assert line(found) == {first: None, second: first}
        for each in found:
            assert each.query == "" and "pg_read_all_stats" in each.note
            assert each.seconds is not None


def test_a_long_query_is_shortened(database: str) -> None:
    one = branch(1)
    with prepared(database, (one, (ALICE,))) as sessions:
        sessions.wait(f"/* {'long ' * 100} */\n\n  {ALICE}")
        (waiter,) = ask(database, one)
        assert waiter.query.startswith("/* long long") and waiter.query.endswith("…")
        assert len(waiter.query) == 120 and "\n" not in waiter.query


def test_after_a_restart_the_branch_still_blocks(
    postgres_server: EmbeddedServer, database: str
) -> None:
    one = branch(1)
    with prepared(database, (one, (ALICE,))) as sessions:
        postgres_server.stop()
        postgres_server.start()
        sessions.url = postgres_server.url(DATABASE)
        waiter = sessions.wait(ALICE)
        assert line(ask(sessions.url, one)) == {waiter: None}


def test_a_server_of_version_13_tells_too() -> None:
    with server_of(13) as server:
        url = new_database(server)
        one = branch(1)
        with prepared(url, (one, (ALICE,))) as sessions:
            first = sessions.wait(ALICE)
            second = sessions.wait(ALICE)
            found = ask(url, one)
            assert line(found) == {first: None, second: first}
            assert all(each.seconds is not None for each in found)


def test_a_server_that_does_not_answer_raises_without_the_password(database: str) -> None:
    gone = psycopg.conninfo.make_conninfo(database, port=1, password="secret")
    with pytest.raises(DatabaseUnavailable) as raised:
        ask(gone, branch(1))
    assert "accounts does not tell who waits" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_queue_that_bites_its_tail_comes_to_an_end() -> None:
    """Sessions that block each other, as two that a parallel query has made one can seem to."""
    gid = str(branch(1).xid)
    held = [(gid, "ExclusiveLock")]
    queue = [
        Queued(1, "ShareLock", [0, 3], 3.0, "one", held),
        Queued(2, "ShareLock", [1, 2], 2.0, "two"),
        Queued(3, "ShareLock", [2], 1.0, "three"),
        Queued(4, "ShareLock", [9], 1.0, "four"),
        Queued(5, "SIReadLock", [0], 1.0, "five", held),
    ]
    assert line(list(_line(queue, gid, branch(1).id))) == {1: None, 2: 1, 3: 2}


def test_show_tells_whom_it_blocks(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    (xid,) = leave(config, stage.ledger, account=ACCOUNT)
    update = f"UPDATE account SET balance = balance + 1 WHERE id = {ACCOUNT}"
    arguments = ["show", xid.transaction, "--config", str(config)]
    assert main(arguments) == 0
    assert "No session waits for what it holds." in capsys.readouterr().out
    with Sessions(stage.ledger.url) as sessions:
        first = sessions.wait(update)
        second = sessions.wait(update)
        assert main([*arguments, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [
            (each["participant"], each["branch"], each["session"], each["behind"], each["query"])
            for each in told["waiters"]
        ] == [
            ("ledger", xid.branch, first, None, update),
            ("ledger", xid.branch, second, first, update),
        ]
        assert told["waiters_unknown"] == {} and told["waiters"][0]["seconds"] >= 0
        assert main(arguments) == 0
        page = capsys.readouterr().out
        assert re.search(rf"ledger +{first} +[0-9.]+ s +the branch +UPDATE account SET", page)
        assert re.search(rf"ledger +{second} +[0-9.]+ s +{first} +UPDATE account SET", page)
    assert main(["recover", "--config", str(config)]) == 0
    assert stage.prepared() == []


def test_show_goes_on_where_a_participant_cannot_tell(
    config: Path, stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (xid,) = leave(config, stage.ledger, account=ACCOUNT)

    async def refused(*_: object) -> list[Waiter]:
        raise DatabaseUnavailable("too many connections")

    monkeypatch.setattr(PostgreSQL, "waiting", refused)
    arguments = ["show", xid.transaction, "--config", str(config)]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["waiters_unknown"] == {"ledger": "too many connections"}
    assert main(arguments) == 0
    assert "ledger: who waits is not known: too many connections" in capsys.readouterr().out
    assert main(["recover", "--config", str(config)]) == 0
