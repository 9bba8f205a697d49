"""`syncpoint log restore`: the log of the backup, never with its old horizon, whoever is killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import msgspec
import pytest

from coordinator import Coordinator
from coordinator.errors import ConfigurationError
from coordinator.log.base import BelowHorizon, Proposal
from coordinator.log.sqlite import SQLiteLog, restore, schema
from coordinator.log.sqlite.backup import back_up
from coordinator.log.sqlite.restore import Restored
from coordinator.model import ABORT, Status, TransactionId, id_floor, id_time_ms
from participants.memory import Memory
from tests.conformance.log_suite import Place, stands
from tests.crash.test_sqlite_crash import Process
from tests.integration.log_files import (
    edit,
    horizon_of,
    identity_of,
    kill_at_every_step,
    make,
    records_of,
    with_log,
)


def silent(done: int, of: int) -> None:
    """Nobody watches."""


class Stage:
    """A log, a backup of it, and what was recorded after the backup."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "service" / "log.db"
        self.backup = folder / "backup.db"
        self.path.parent.mkdir()
        self.known = make(self.path)
        back_up(self.path, self.backup, force=False, progress=silent)
        self.horizon = horizon_of(self.path)
        self.identity = identity_of(self.path)
        self.lost = self.record_more()

    def record_more(self) -> list[TransactionId]:
        async def record(place: Place, log: SQLiteLog) -> list[TransactionId]:
            now_ms = time.time_ns() // 1_000_000
            ids = [id_floor(now_ms + number) for number in range(2)]
            for each in ids:
                await log.propose(Proposal(each, place.commit(each, "orders")))
            await asyncio.sleep(0.005)  # ids of the future would be refused, rightly
            return ids

        return with_log(self.path, record)

    def restore(self, *, force: bool = True) -> Restored:
        return restore.restore(self.path, self.backup, force=force, progress=silent)

    def beside(self) -> list[str]:
        return sorted(each for each in os.listdir(self.path.parent) if not each.endswith(".lock"))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def check_served(stage: Stage, crashed: bool = False) -> str:
    """Tells what a service finds now: the former log with all it had, the backup, or nothing.

    `crashed` tells that some of the former log was in its write-ahead log only.
    """
    if not stage.path.exists():
        return "nothing"

    async def look(place: Place, log: SQLiteLog) -> str:
        assert (await log.open()).id == stage.identity.id
        page = await log.scan(None, 1_000, unfinished_only=False)
        standing = [each.transaction for each in page.records]
        if stage.lost[0] in standing:
            assert crashed and len(standing) >= len(stage.known + stage.lost) + 5
            return "the former"
        assert standing == stage.known, "all of the backup"
        for each in stage.lost:
            answer = await log.propose(Proposal(each, ABORT))
            assert isinstance(answer, BelowHorizon), "it had committed"
            assert (await log.read(each)).record is None
        assert not stands(await log.propose(Proposal(stage.known[0], ABORT))).ours
        return "the backup"

    try:
        return with_log(stage.path, look)
    except ConfigurationError:
        return "refused"


def check_restored(stage: Stage) -> None:
    before_ms = time.time_ns() // 1_000_000
    done = stage.restore()
    assert done.contents.log == stage.identity.id and done.contents.records == len(stage.known)
    assert id_time_ms(horizon_of(stage.path)) > before_ms
    check_served(stage)
    assert done.kept is not None
    kept = [each.transaction for each in records_of(done.kept)]
    assert kept == stage.known + stage.lost, "what was replaced is all there"
    assert horizon_of(done.kept) == stage.horizon
    assert stage.path.stat().st_mode & 0o777 == 0o600


def crash_service(stage: Stage) -> None:
    """A process that is killed leaves records in the write-ahead log only."""
    with Process("endless", stage.path, 0) as process:
        for _ in range(5):
            process.line()


def damage_service(stage: Stage) -> None:
    """What is in the write-ahead log makes the file unreadable; without that it looks sound."""
    program = """
import apsw, os, sys
connection = apsw.Connection(sys.argv[1])
connection.execute("PRAGMA writable_schema = ON")
connection.execute("UPDATE sqlite_schema SET sql = 'no table' WHERE name = 'claim'")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program, str(stage.path)], check=True)


def check_killed(stage: Stage, spoil: Callable[[Stage], None], expected: set[str]) -> None:
    """At any step of a restore."""
    folder, outcomes = stage.path.parent, set()
    seen: list[list[bytes]] = []
    spoil(stage)
    former = {each: (folder / each).read_bytes() for each in ("log.db", "log.db-wal")}

    def prepare() -> Callable[[], object]:
        for each in folder.iterdir():
            each.unlink()
        for name, content in former.items():
            (folder / name).write_bytes(content)
        return stage.restore

    def check() -> None:
        found = [each.read_bytes() for each in sorted(folder.glob("log.db*"))]
        if found not in seen:
            seen.append(found)
            outcomes.add(check_served(stage, crashed=spoil is crash_service))

    assert kill_at_every_step(prepare, check) > 12
    assert outcomes == expected
    stage.restore()
    assert check_served(stage) == "the backup"


def check_killed_before_a_crashed_one_is_replaced(stage: Stage) -> None:
    check_killed(stage, crash_service, {"the former", "the backup"})


def check_killed_before_a_damaged_one_is_replaced(stage: Stage) -> None:
    check_killed(stage, damage_service, {"refused", "nothing", "the backup"})


def check_kept(stage: Stage) -> None:
    """The former log is kept as it was, also where its file is damaged, or only half of it left."""
    crash_service(stage)
    done = stage.restore()
    assert done.kept is not None
    assert stage.beside() == ["log.db", done.kept.name]
    kept = {each.transaction for each in records_of(done.kept)}
    assert kept > set(stage.known + stage.lost)
    done.kept.unlink()

    damage_service(stage)
    former = [stage.path.read_bytes(), stage.path.with_name("log.db-wal").read_bytes()]
    done = stage.restore()
    assert done.kept is not None
    beside = done.kept.with_name(f"{done.kept.name}-wal")
    assert [done.kept.read_bytes(), beside.read_bytes()] == former
    assert check_served(stage) == "the backup"

    crash_service(stage)
    beside.unlink()
    done.kept.unlink()
    stage.path.unlink()
    stage.restore(force=False)
    assert check_served(stage) == "the backup"
    assert any(each.endswith("-wal") for each in stage.beside()), "it is kept all the same"


def check_in_use(stage: Stage) -> None:
    with Process("endless", stage.path, 0) as process:
        process.line()
        with pytest.raises(ConfigurationError, match="another process has it open"):
            stage.restore()
    with_log(stage.path, lambda place, log: log.open())
    stranger = apsw.Connection(str(stage.path))
    stranger.execute("BEGIN; SELECT * FROM log").fetchall()
    with pytest.raises(ConfigurationError, match="another process has it open"):
        stage.restore()
    stranger.close()
    assert stage.beside() == ["log.db"]
    assert len(records_of(stage.path)) > len(stage.known + stage.lost)


CHECKS = (
    check_restored,
    check_killed_before_a_crashed_one_is_replaced,
    check_killed_before_a_damaged_one_is_replaced,
    check_kept,
    check_in_use,
)


@pytest.mark.parametrize("check", CHECKS)
def test_a_restore(stage: Stage, check: Callable[[Stage], None]) -> None:
    check(stage)


def keeps_the_old_horizon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore, "id_floor", lambda unix_ms: id_floor(0))


def raises_it_after_the_rename(patch: pytest.MonkeyPatch) -> None:
    replace = restore._replace

    def planted(path: Path, temporary: Path, former: object) -> Path | None:
        late = horizon_of(temporary)
        edit(temporary, f"UPDATE log SET horizon = x'{'0' * 32}'")
        kept = replace(path, temporary, former)  # type: ignore[arg-type]
        edit(path, f"UPDATE log SET horizon = x'{late.replace('-', '')}'")
        return kept

    patch.setattr(restore, "_replace", planted)


def leaves_the_write_ahead_log(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore, "remove", lambda *names: None)


def takes_the_damaged_for_whole(patch: pytest.MonkeyPatch) -> None:
    """Its write-ahead log goes first, and what is left looks sound."""
    close = restore._close_former
    patch.setattr(
        restore,
        "_close_former",
        lambda path: msgspec.structs.replace(close(path), is_whole=True),
    )


def does_not_look_whether_it_is_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore, "_close_former", lambda path: restore._Former())


def writes_into_the_log_itself(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def planted(path: Path) -> Iterator[Path]:
        path.write_bytes(b"")
        yield path

    patch.setattr(restore, "temporary_beside", planted)


def keeps_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("coordinator.log.sqlite.restore.os.link", lambda former, kept: None)


BUGS: dict[Callable[[pytest.MonkeyPatch], None], Callable[[Stage], None]] = {
    keeps_the_old_horizon: check_restored,
    raises_it_after_the_rename: check_killed_before_a_crashed_one_is_replaced,
    leaves_the_write_ahead_log: check_kept,
    takes_the_damaged_for_whole: check_killed_before_a_damaged_one_is_replaced,
    does_not_look_whether_it_is_open: check_in_use,
    writes_into_the_log_itself: check_killed_before_a_crashed_one_is_replaced,
    keeps_nothing: check_kept,
}


@pytest.mark.parametrize("bug", list(BUGS))
def test_the_checks_find_a_restore_that(
    stage: Stage, bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, ConfigurationError, pytest.fail.Exception)):
        BUGS[bug](stage)


def test_services_can_begin_at_once(stage: Stage) -> None:
    async def use() -> None:
        stock = Memory("stock")
        url = f"sqlite:///{stage.path}"
        async with Coordinator(url, cluster="shop", participants=[stock]) as coordinator:
            async with coordinator.transaction() as transaction:
                await stock.put("apples", 3)
                assert transaction.id > horizon_before
            assert stock.committed == {"apples": 3}
            assert await coordinator.status(stage.lost[0]) is Status.FORGOTTEN
            assert await coordinator.status(stage.known[0]) is Status.COMMITTED

    stage.restore()
    horizon_before = horizon_of(stage.path)
    asyncio.run(use())


def test_a_backup_of_the_first_version_is_brought_to_the_present(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(schema, "STEPS", schema.STEPS[:1])
        older.setattr(schema, "VERSION", 1)
        stage = Stage(tmp_path)
    assert stage.restore().contents.version == 2
    check_served(stage)
    assert with_log(stage.path, lambda place, log: log.words()) == ()


def test_a_kept_log_can_be_restored_with_what_is_beside_it(stage: Stage) -> None:
    crash_service(stage)
    moved = stage.path.with_name("moved.db")
    for end in ("", "-wal"):
        os.rename(f"{stage.path}{end}", f"{moved}{end}")
    before = moved.read_bytes()
    restore.restore(stage.path, moved, force=False, progress=silent)
    found = {each.transaction for each in records_of(stage.path)}
    assert found > set(stage.known + stage.lost), "what was in the write-ahead log too"
    assert moved.read_bytes() == before


def test_what_it_refuses(stage: Stage, tmp_path: Path) -> None:
    def refused(why: str, backup: Path, force: bool = True) -> None:
        before = stage.path.read_bytes()
        with pytest.raises(ConfigurationError, match=why) as caught:
            restore.restore(stage.path, backup, force=force, progress=silent)
        assert "\n" not in str(caught.value)
        assert stage.beside() == ["log.db"]
        after = stage.path.read_bytes()
        assert (before[:18], before[100:]) == (after[:18], after[100:])

    refused("a log is there, which knows more.*--force", stage.backup, force=False)
    refused("does not exist", tmp_path / "absent.db")
    refused("is a directory", tmp_path)
    refused("is the log itself", stage.path)
    other = tmp_path / "other.db"
    other.write_bytes(b"no database at all" * 100)
    refused("other.db cannot be read: .*not a database", other)
    other.write_bytes(b"")
    refused("is empty", other)
    edit(other, "CREATE TABLE theirs (x)")
    refused("another application", other)
    content = stage.backup.read_bytes()
    other.write_bytes(content[: 3 * 4096])
    refused("other.db (is damaged|cannot be read)", other)
    other.write_bytes(content[: 3 * 4096] + b"\xff" * 4096 + content[4 * 4096 :])
    refused("other.db (is damaged|cannot be read)", other)
    for statement, why in (
        ("PRAGMA user_version = 3", "version 3.*reads up to version 2"),
        ("UPDATE log SET id = 'ffffffffffffffff'", "of the log ffffffffffffffff, and the one"),
        (f"UPDATE log SET created_ms = {1 << 45}", "clock is behind the log"),
        ("DELETE FROM log", "id is missing"),
    ):
        other.write_bytes(content)
        edit(other, statement)
        refused(why, other)
    assert [each.transaction for each in records_of(stage.path)] == stage.known + stage.lost


def test_another_applications_file_is_not_replaced(stage: Stage) -> None:
    stage.path.unlink()
    edit(stage.path, "CREATE TABLE theirs (x)")
    with pytest.raises(ConfigurationError, match="another application"):
        stage.restore()
    assert stage.beside() == ["log.db"]


def test_the_owner_stays(stage: Stage) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    os.chown(stage.path, 65534, 65534)
    stage.restore()
    assert (stage.path.stat().st_uid, stage.path.stat().st_gid) == (65534, 65534)
