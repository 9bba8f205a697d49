"""Logs of the version before and of the one after: read and brought to the present, or refused."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import apsw
import msgspec
import pytest

from coordinator.config import Settings
from coordinator.errors import ConfigurationError, LogUnavailable
from coordinator.log.base import (
    Attempt,
    Incident,
    KeyState,
    Mark,
    Proposal,
    Record,
    Resource,
    Unreadable,
    Word,
)
from coordinator.log.sqlite import SQLiteLog, file, schema
from coordinator.log.sqlite.lock import FileLock
from coordinator.model import ABORT, BranchId, LogId, Verdict, id_floor
from coordinator.participant import Level
from tests.conformance.log_suite import KEY, MEMBER, Place, stands
from tests.integration.log_files import (
    above_all,
    ask,
    edit,
    end_of,
    in_child,
    make,
    records_of,
    start_child,
    with_log,
)

ROOT = Path(__file__).parents[2]

FIRST = """
CREATE TABLE log (
    only_row   INTEGER PRIMARY KEY CHECK (only_row = 1),
    id         TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    horizon    BLOB NOT NULL
);
CREATE TABLE record (
    id         BLOB PRIMARY KEY,
    decision   BLOB NOT NULL,
    unmarked   BLOB NOT NULL,
    answer     TEXT,
    unfinished INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX record_unfinished ON record (id) WHERE unfinished = 1;
CREATE TABLE claim (
    space      TEXT NOT NULL,
    key        TEXT NOT NULL,
    holder     BLOB NOT NULL,
    attachment BLOB NOT NULL,
    PRIMARY KEY (space, key)
) WITHOUT ROWID;
CREATE INDEX claim_by_holder ON claim (holder);
CREATE TABLE attempt (
    space      TEXT NOT NULL,
    key        TEXT NOT NULL,
    id         BLOB NOT NULL,
    timeout_ms INTEGER NOT NULL,
    member     TEXT NOT NULL,
    PRIMARY KEY (space, key)
) WITHOUT ROWID;
CREATE INDEX attempt_by_id ON attempt (id);
CREATE TABLE resource (
    name     TEXT NOT NULL UNIQUE,
    identity TEXT NOT NULL,
    clear    BLOB NOT NULL,
    swept_ms INTEGER NOT NULL
);
CREATE TABLE incident (
    gid         TEXT NOT NULL UNIQUE,
    participant TEXT NOT NULL,
    kind        TEXT,
    evidence    TEXT NOT NULL,
    noticed_ms  INTEGER NOT NULL
);
PRAGMA application_id = 0x53796E63;
PRAGMA user_version = 1;
"""

LOG = LogId("00000000000000bb")
CREATED_MS = 1_760_000_000_000
COMMITTED, DELEGATED, ABORTED = (id_floor(CREATED_MS + number) for number in (1, 2, 3))
ONE, OTHER = BranchId("1" * 16), BranchId("2" * 16)
WORD = Word("sp:gone", Verdict.ABORT, "no such order", "ann", CREATED_MS)


def packed(identity: str) -> bytes:
    return bytes.fromhex(identity.replace("-", ""))


def first_bytes(verdict: str, branches: tuple[str, ...] = (), last: str | None = None) -> bytes:
    """A record as the first programs wrote it."""
    ids = b"".join(packed(MEMBER) + packed(each) for each in (*branches, last) if each)
    parts = [("orders", b"token") for _ in branches]
    body = (verdict, ids, parts, None if last is None else ("kafka", b""), b"result")
    return b"\x01" + msgspec.msgpack.encode(body)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A log as the first programs left it, with something in each table."""
    path = tmp_path / "log.db"
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.execute(FIRST)
    committed, delegated, aborted = map(packed, (COMMITTED, DELEGATED, ABORTED))
    for statement, values in (
        ("log VALUES (1, ?, ?, ?)", (LOG, CREATED_MS, packed(id_floor(CREATED_MS)))),
        (
            "record VALUES (?, ?, ?, NULL, 1)",
            (committed, first_bytes("commit", (ONE, OTHER)), packed(OTHER)),
        ),
        (
            "record VALUES (?, ?, ?, 'awaited', 1)",
            (delegated, first_bytes("delegated", (ONE,), OTHER), packed(ONE)),
        ),
        ("record VALUES (?, ?, x'', NULL, 0)", (aborted, first_bytes("abort"))),
        ("claim VALUES (?, ?, ?, ?)", (*KEY_PARTS, committed, b"result")),
        ("attempt VALUES (?, ?, ?, ?, ?)", (*KEY_PARTS, committed, 10_000, MEMBER)),
        ("resource VALUES (?, ?, ?, ?)", ("orders", "system 7", committed, CREATED_MS)),
        ("incident VALUES (?, ?, NULL, ?, ?)", ("sp:x", "stock", "seen", CREATED_MS)),
    ):
        connection.execute(f"INSERT INTO {statement}", values)
    connection.close()
    return path


KEY_PARTS = (KEY.space, KEY.key)


async def check_kept(log: SQLiteLog) -> None:
    """All that the fixture wrote is there."""
    assert (await log.open()).id == LOG
    assert (await log.read(COMMITTED)).horizon == id_floor(CREATED_MS)
    records = (await log.scan(None, 10, unfinished_only=False)).records
    committed, delegated, aborted = records
    assert isinstance(committed, Record) and isinstance(delegated, Record)
    assert isinstance(aborted, Record)
    assert [each.transaction for each in records] == [COMMITTED, DELEGATED, ABORTED]
    assert committed.ended == {ONE} and committed.attachment == b"result"
    assert [each.id for each in committed.decision.branches] == [ONE, OTHER]
    assert delegated.unresolved and delegated.decision.last_resource is not None
    assert aborted.decision.verdict is Verdict.ABORT
    attempt = Attempt(COMMITTED, 10_000, MEMBER)
    assert await log.read_key(KEY) == KeyState(COMMITTED, True, b"result", attempt)
    assert await log.resources() == (Resource("orders", "system 7", COMMITTED, CREATED_MS),)
    assert await log.incidents() == (Incident("sp:x", "stock", None, "seen", CREATED_MS),)
    assert not stands(await log.propose(Proposal(COMMITTED, ABORT))).ours


async def check_used(place: Place, log: SQLiteLog) -> None:
    await check_kept(log)
    assert await log.words() == ()
    assert await log.give_word(WORD) == WORD
    await log.propose(Proposal(place.draw(), ABORT))


def check_upgrade(path: Path) -> None:
    former = tables(path)
    with_log(path, check_used)
    new = path.with_name("new.db")
    make(new)
    assert former.items() <= tables(path).items(), "older programs use those they know"
    assert tables(path) == tables(new)
    assert ask(path, "PRAGMA user_version") == ask(new, "PRAGMA user_version") == 2
    assert ask(path, "PRAGMA integrity_check") == "ok"


def tables(path: Path) -> dict[str, str | None]:
    connection = apsw.Connection(str(path))
    found = connection.execute("SELECT name, sql FROM sqlite_schema").fetchall()
    connection.close()
    return {name: sql and " ".join(sql.split()) for name, sql in found}


def test_a_log_of_the_first_version_is_read_and_brought_to_the_present(first: Path) -> None:
    check_upgrade(first)


STEP = schema.STEPS[1]
PLANTED = {
    "a table is made anew": (schema.STEPS[0], f"{STEP} DROP TABLE incident;"
        + FIRST[FIRST.index("CREATE TABLE incident") : FIRST.index("PRAGMA")]),
    "rows are lost": (schema.STEPS[0], f"{STEP} DELETE FROM claim;"),
    "the new table is forgotten": (schema.STEPS[0], ""),
    "an index is lost": (schema.STEPS[0], f"{STEP} DROP INDEX claim_by_holder;"),
    "the horizon moves": (schema.STEPS[0], f"{STEP} UPDATE log SET horizon = x'{'f' * 32}';"),
}  # fmt: skip


@pytest.mark.parametrize("bug", list(PLANTED))
def test_the_check_finds_an_upgrade_where(
    first: Path, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "STEPS", PLANTED[bug])
    with pytest.raises((AssertionError, LogUnavailable)):
        check_upgrade(first)


def test_two_processes_that_open_it_at_once_upgrade_it_once(first: Path) -> None:
    before = tables(first)
    lock = FileLock(first.with_name("log.db.lock"))
    lock.acquire(1)
    reading, writing = os.pipe()

    def open_it() -> None:
        lock.close()  # it would be held here as well
        own = FileLock(first.with_name("log.db.lock"))
        os.write(writing, b".")
        own.acquire(20)
        file.open_file(first)

    children = [start_child(open_it) for _ in range(2)]
    assert os.read(reading, 1) + os.read(reading, 1) == b".."
    assert tables(first) == before
    lock.close()
    assert [end_of(each) for each in children] == [0, 0]
    check_upgrade(first)


def test_killed_at_any_step_of_the_upgrade_nothing_is_lost(first: Path, tmp_path: Path) -> None:
    before = first.read_bytes()
    killed = 0
    while True:
        for each in tmp_path.iterdir():
            each.unlink()
        first.write_bytes(before)
        code = in_child(lambda: file.open_file(first), kill_before=killed)
        assert code in (0, -9)
        if code == -9:
            killed += 1
        version = ask(first, "PRAGMA user_version")
        assert version in (1, 2) and (code == -9 or version == 2)
        assert ("word" in tables(first)) == (version == 2), "all of it or nothing"
        with_log(first, check_used)
        if code == 0:
            break
    assert killed > 5, "it begins, makes the table, sets the version and commits, among others"


UPGRADE = """
import asyncio, sys
from coordinator.log.base import Word
from coordinator.log.sqlite import SQLiteLog
async def upgrade():
    log = SQLiteLog(sys.argv[1])
    await log.open()
    await log.give_word(Word("sp:gone", None, "seen", "ann", 1))
    await log.close()
asyncio.run(upgrade())
"""


def test_an_older_program_that_has_it_open_goes_on_and_is_then_refused(
    first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is the older program: it knows the former tables only."""

    async def go_on() -> None:
        place = Place(lambda: SQLiteLog(first))
        log = await place.open()
        assert isinstance(log, SQLiteLog)
        await check_kept(log)
        transaction = id_floor(CREATED_MS + 10)
        decision = place.commit(transaction, "orders")
        command = [sys.executable, "-c", UPGRADE, str(first)]
        await asyncio.to_thread(subprocess.run, command, check=True, cwd=ROOT)
        await check_kept(log)
        assert stands(await log.propose(Proposal(transaction, decision, (), b"result"))).ours
        await log.finish([Mark(transaction, decision.branches[0].id)])
        await log.raise_horizon(id_floor(CREATED_MS + 1))
        assert (await log.register("stock", "system 8", 1)).name == "stock"
        await place.close()

    with monkeypatch.context() as older:
        older.setattr(schema, "STEPS", schema.STEPS[:1])
        older.setattr(schema, "VERSION", 1)
        asyncio.run(go_on())
        with pytest.raises(ConfigurationError, match=r"version 2.*up to version 1; upgrade"):
            with_log(first, lambda place, log: log.open())
    assert [word.reason for word in with_log(first, lambda place, log: log.words())] == ["seen"]
    found = records_of(first)
    assert [type(each) for each in found] == [Record] * 4


async def test_check_tells_what_opening_will_do(first: Path) -> None:
    found = await SQLiteLog(first).check(Settings())
    (told,) = (each for each in found.findings if each.subject == "file")
    assert told.level is Level.OK and found.log == LOG
    assert "version 1" in told.message and "brings it to version 2" in told.message
    assert ask(first, "PRAGMA user_version") == 1, "it only looked"
    edit(first, "PRAGMA user_version = 3")
    found = await SQLiteLog(first).check(Settings())
    (told,) = (each for each in found.findings if each.subject == "file")
    assert told.level is Level.MUST_CHANGE and "version 3" in told.message


@pytest.mark.parametrize("version", [3, 99, -1])
def test_a_version_that_this_program_does_not_know_is_refused(first: Path, version: int) -> None:
    edit(first, f"PRAGMA user_version = {version}")
    before = first.read_bytes()
    with pytest.raises(ConfigurationError) as caught:
        with_log(first, lambda place, log: log.open())
    told = str(caught.value)
    assert "\n" not in told and str(first) in told and f"version {version}" in told
    assert ("up to version 2; upgrade Syncpoint" in told) == (version > 0)
    assert first.read_bytes() == before


def test_a_record_of_a_later_format_parks_its_own_transaction_only(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    ids = make(path, commits=2, aborts=4)
    later = [ids[0], ids[2], ids[3]]
    for each in later:
        edit(path, f"UPDATE record SET decision = x'02c1' WHERE id = x'{packed(each).hex()}'")

    async def look(place: Place, log: SQLiteLog) -> None:
        page = await log.scan(None, 10, unfinished_only=False)
        found = {each.transaction: each for each in page.records}
        assert {each for each in found if isinstance(found[each], Unreadable)} == set(later)
        for each in later:
            with pytest.raises(LogUnavailable, match=r"format 2.*newer version"):
                await log.propose(Proposal(each, ABORT))
        await log.finish([Mark(ids[1], each.id) for each in found[ids[1]].decision.branches])
        await log.raise_horizon(await above_all(log))
        assert await log.forget(1, claims_before_ms=0) == 1, "those in front hold it up"
        assert await log.forget(10, claims_before_ms=0) == 2
        left = (await log.scan(None, 10, unfinished_only=False)).records
        assert [each.transaction for each in left] == later
        unfinished = (await log.scan(None, 10)).records
        assert [each.transaction for each in unfinished] == [ids[0]], "the others are as they were"

    with_log(path, look)
