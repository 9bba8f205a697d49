"""What `syncpoint check` finds in an SQLite log, and that looking leaves it as it was."""

from __future__ import annotations

import os
import pwd
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest

from coordinator.codec import pack_transaction
from coordinator.config import Settings
from coordinator.log.base import Incident, Proposal
from coordinator.log.sqlite import SQLiteLog, inspection
from coordinator.log.sqlite.inspection import inspect
from coordinator.model import Branch, BranchId, Decision, LogId, MemberId, Verdict, Xid, id_floor
from coordinator.participant import Finding, Level

MUST, NOTE, OK = Level.MUST_CHANGE, Level.NOTE, Level.OK


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def look(path: Path, settings: Settings | None = None) -> dict[str, Finding]:
    found = inspect(path, settings or Settings()).findings
    assert len({each.subject for each in found}) == len(found)
    assert all(each.fix or each.level is OK for each in found)
    return {each.subject: each for each in found}


def wrong(found: dict[str, Finding]) -> set[str]:
    return {each.subject for each in found.values() if each.level is MUST}


def edit(path: Path, *statements: str) -> None:
    """Change a file behind the log's back; nobody has it open."""
    connection = apsw.Connection(str(path))
    for statement in statements:
        connection.execute(statement)
    connection.close()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but `-shm`, in which SQLite notes who reads."""
    files = (each for each in directory.iterdir() if each.is_file())
    return {each.name: each.read_bytes() for each in files if not each.name.endswith("-shm")}


async def create(path: Path) -> LogId:
    log = SQLiteLog(path)
    identity = await log.open()
    await log.close()
    return identity.id


async def commit(log: SQLiteLog, identity: LogId, born_ms: int) -> None:
    """An unfinished commit."""
    transaction = id_floor(born_ms)
    branch = Branch(Xid(identity, MemberId("0" * 16), transaction, BranchId("0" * 16)), "accounts")
    await log.propose(Proposal(transaction, Decision(Verdict.COMMIT, (branch,))))


async def test_a_log_that_is_not_there_yet_is_not_created(path: Path) -> None:
    found = look(path)
    assert wrong(found) == set() and "not there yet" in found["file"].message
    assert list(path.parent.iterdir()) == []


async def test_a_closed_log_is_read_and_left_as_it_was(path: Path) -> None:
    identity = await create(path)
    before = contents(path.parent)
    checked = inspect(path, Settings())
    assert checked.log == identity
    assert {each.level for each in checked.findings} == {OK}
    assert contents(path.parent) == before
    assert await create(path) == identity


async def test_a_log_in_use_is_read_as_it_is_now(path: Path) -> None:
    log = SQLiteLog(path)
    identity = (await log.open()).id
    for number in (1, 2):
        await commit(log, identity, time.time_ns() // 1_000_000 + number * 1000)
        before = contents(path.parent)
        assert f"{number} decisions" in look(path)["unfinished"].message
        assert contents(path.parent) == before
    await log.close()


async def test_what_is_left_unfinished_for_long(path: Path) -> None:
    identity = await create(path)
    two_hours_ago = time.time_ns() // 1_000_000 - 7_200_000
    horizon = pack_transaction(id_floor(0)).hex()
    edit(path, f"UPDATE log SET horizon = x'{horizon}'")
    log = SQLiteLog(path)
    await log.open()
    await commit(log, identity, two_hours_ago)
    await log.report(Incident("gid", "accounts", None, "prepared", two_hours_ago))
    await log.close()
    found = look(path)
    assert wrong(found) == set()
    assert found["unfinished"].level is found["incidents"].level is NOTE
    assert "1 decisions" in found["unfinished"].message and "2:00:" in found["unfinished"].message
    assert "syncpoint recover" in found["unfinished"].fix
    assert look(path, Settings(timeout_max=8000))["unfinished"].level is OK


async def test_a_clock_behind_the_horizon(path: Path) -> None:
    await create(path)
    log = SQLiteLog(path)
    await log.open()
    await log.raise_horizon(id_floor(time.time_ns() // 1_000_000 + 3_600_000))
    await log.close()
    found = look(path)
    assert wrong(found) == {"clock"} and "behind the log's horizon" in found["clock"].message


def test_a_missing_directory_and_a_directory(path: Path) -> None:
    absent = look(path / "absent" / "log.db")
    assert wrong(absent) == {"place"} and "no directory" in absent["place"].message
    assert wrong(look(path.parent)) == {"place"}


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (("CREATE TABLE mine (a)",), "another application"),
        (("PRAGMA user_version = 99",), "version 99"),
        (("PRAGMA journal_mode = delete",), "journal is no write-ahead log"),
        (("DELETE FROM log",), "damaged"),
    ],
)
async def test_files_that_are_not_as_they_must_be(
    path: Path, statements: tuple[str, ...], said: str
) -> None:
    if "mine" not in statements[0]:
        await create(path)
    edit(path, *statements)
    before = contents(path.parent)
    found = look(path)
    told = found["durability"] if "journal" in said else found["file"]
    assert said in told.message and told.level is (NOTE if "journal" in said else MUST)
    assert contents(path.parent) == before


def test_what_is_no_database(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)
    assert "not an SQLite database" in look(path)["file"].message
    path.write_bytes(b"")
    assert "empty" in look(path)["file"].message and wrong(look(path)) == set()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may do everything: look with another user's rights."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        os.seteuid(user)


async def test_rights_that_are_missing(tmp_path: Path) -> None:
    public = Path("/tmp") / f"syncpoint-check-{os.getpid()}"
    public.mkdir(mode=0o777)
    try:
        path = public / "log.db"
        await create(path)
        os.chmod(path, 0o444)
        os.chmod(public, 0o555)
        with as_nobody():
            found = look(path)
        assert "rights" in wrong(found)
        told = found["rights"].message
        assert f"{path}, " in told and told.endswith(str(public)) and ".lock" in told
        assert look(path)["rights"].level is (OK if os.geteuid() == 0 else MUST)
    finally:
        os.chmod(public, 0o755)
        shutil.rmtree(public)


def test_a_disk_that_is_nearly_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(path)["space"].level is OK
    free = int(look(path)["space"].message.partition(" ")[0])
    monkeypatch.setattr(inspection, "FREE_MEGABYTES_GOOD", free * 2)
    assert look(path)["space"].level is NOTE
    monkeypatch.setattr(inspection, "FREE_MEGABYTES_MIN", free * 2)
    assert wrong(look(path)) == {"space"}


def test_file_systems_that_do_not_keep_a_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "file_system_of", lambda path, mounts: "tmpfs")
    assert look(path)["place"].level is NOTE and "in memory" in look(path)["place"].message
    monkeypatch.setattr(inspection, "network_file_system", lambda path: "nfs4")
    assert wrong(look(path)) == {"place"} and "nfs4" in look(path)["place"].message
