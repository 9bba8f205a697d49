"""`syncpoint log backup`: beside services, of one moment, whole or not there."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.errors import ConfigurationError
from coordinator.log.sqlite import backup, copying, schema
from coordinator.log.sqlite.backup import back_up
from tests.crash.sqlite_process import transaction_id
from tests.crash.test_sqlite_crash import Process
from tests.integration.log_files import (
    ask,
    edit,
    end_of,
    identity_of,
    kill_at_every_step,
    make,
    records_of,
    start_child,
)


def silent(done: int, of: int) -> None:
    """Nobody watches."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "service").mkdir()
    (tmp_path / "kept").mkdir()
    return tmp_path / "service" / "log.db"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "backup.db"


@pytest.fixture
def config(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that names the log, in the working directory."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "syncpoint.toml"
    config.write_text(f'cluster = "shop"\nlog = "sqlite:///{path}"\n')
    return config


def test_it_is_one_file_with_all_that_the_log_holds(path: Path, target: Path) -> None:
    ids = make(path, commits=3, aborts=1)
    before = path.read_bytes()
    found = back_up(path, target, force=False, progress=silent)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == ["log.db", "log.db.lock"]
    assert os.listdir(target.parent) == ["backup.db"]
    assert target.stat().st_mode & 0o777 == 0o600
    identity = identity_of(path)
    assert (found.log, found.version, found.records) == (identity.id, schema.VERSION, 4)
    assert found.unfinished == 3 and found.newest_ms >= identity.created_ms + 4
    assert [each.transaction for each in records_of(target)] == ids
    assert records_of(target) == records_of(path)
    assert identity_of(target) == identity


def check_holds_what_stands_only_in_the_write_ahead_log(path: Path, target: Path) -> None:
    make(path)
    with Process("endless", path, 0) as process:
        answered = [int(process.line().split()[0]) for _ in range(20)]
    assert path.with_name("log.db-wal").stat().st_size > 0, "it was killed"
    back_up(path, target, force=False, progress=silent)
    standing = {each.transaction for each in records_of(target)}
    identity = identity_of(target)
    assert standing >= {transaction_id(identity, number) for number in answered}


def check_killed_at_any_step_it_is_whole_or_not_there(path: Path, target: Path) -> None:
    make(path)
    expected = records_of(path)
    seen = set()

    def prepare() -> Callable[[], object]:
        for each in target.parent.iterdir():
            each.unlink()
        return lambda: back_up(path, target, force=False, progress=silent)

    def check() -> None:
        seen.add(target.exists())
        assert not target.exists() or records_of(target) == expected

    assert kill_at_every_step(prepare, check) > 6
    assert seen == {False, True}
    assert records_of(path) == expected


CHECKS = (
    check_holds_what_stands_only_in_the_write_ahead_log,
    check_killed_at_any_step_it_is_whole_or_not_there,
)


@pytest.mark.parametrize("check", CHECKS)
def test_a_backup(check: Callable[[Path, Path], None], path: Path, target: Path) -> None:
    check(path, target)


def copied_without_sqlite(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backup, "copy", lambda source, copied, progress: shutil.copyfile(path, copied))


def written_under_its_name(path: Path, patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def planted(target: Path) -> Iterator[Path]:
        target.touch()
        yield target

    patch.setattr(backup, "temporary_beside", planted)
    patch.setattr(backup.os, "link", lambda temporary, target: None)


@pytest.mark.parametrize(
    ("bug", "check"),
    list(zip((copied_without_sqlite, written_under_its_name), CHECKS, strict=True)),
)
def test_the_checks_find_a_backup_that_is(
    bug: Callable[[Path, pytest.MonkeyPatch], None],
    check: Callable[[Path, Path], None],
    path: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bug(path, monkeypatch)
    with pytest.raises((AssertionError, ConfigurationError)):
        check(path, target)


def test_services_go_on_while_it_is_made_and_it_is_of_one_moment(
    path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(path, commits=600)
    identity = identity_of(path)
    monkeypatch.setattr(copying, "PAGES_AT_ONCE", 1)
    with Process("endless", path, 0) as process:
        before = {int(process.line().split()[0]) for _ in range(30)}
        meanwhile: set[int] = set()

        def progress(done: int, of: int) -> None:
            assert 0 < done <= of
            if len(meanwhile) < 200:
                meanwhile.add(int(process.line().split()[0]))

        back_up(path, target, force=False, progress=progress)
    assert len(meanwhile) > 10, "it did not wait for the backup"
    standing = {each.transaction for each in records_of(target)}
    held = [number for number in range(10_000) if transaction_id(identity, number) in standing]
    assert set(held) >= before, "what was answered before it began"
    assert held == list(range(len(held))), "and nothing without what was before"
    assert max(meanwhile) not in held, "it ended long before the last one"
    assert ask(target, "PRAGMA integrity_check") == "ok"


def test_an_older_log_is_copied_as_it_is(
    path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(schema, "STEPS", schema.STEPS[:1])
        older.setattr(schema, "VERSION", 1)
        make(path)
    assert back_up(path, target, force=False, progress=silent).version == 1
    assert ask(path, "PRAGMA user_version") == ask(target, "PRAGMA user_version") == 1


def interrupted(done: int, of: int) -> None:
    raise KeyboardInterrupt


def terminated(done: int, of: int) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("progress", [interrupted, terminated])
@pytest.mark.parametrize("force", [False, True])
def test_ctrl_c_leaves_nothing(
    path: Path,
    target: Path,
    progress: Callable[[int, int], None],
    force: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(path)
    monkeypatch.setattr(copying, "PAGES_AT_ONCE", 2)
    if force:
        target.write_bytes(b"the former backup")
    with pytest.raises(KeyboardInterrupt):
        back_up(path, target, force=force, progress=progress)
    assert os.listdir(target.parent) == (["backup.db"] if force else [])
    assert not force or target.read_bytes() == b"the former backup"
    assert sorted(os.listdir(path.parent)) == ["log.db", "log.db.lock"]
    assert len(records_of(path)) == 4


def test_a_full_disk_leaves_nothing_and_is_told(path: Path, target: Path) -> None:
    make(path, commits=300)

    def work() -> None:
        # The limit is on the size of each file; reaching it is what a full disk looks like.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(ConfigurationError, match=r"backup.db cannot be written: .*full; "):
            back_up(path, target, force=False, progress=silent)

    assert end_of(start_child(work)) == 0
    assert os.listdir(target.parent) == []


def test_a_damaged_log_is_not_backed_up(path: Path, target: Path) -> None:
    make(path, commits=100)
    with path.open("r+b") as opened:
        opened.seek(3 * 4096)
        opened.write(b"\xff" * 4096)
    with pytest.raises(ConfigurationError, match=r"log.db .*damaged.*syncpoint log restore"):
        back_up(path, target, force=False, progress=silent)
    assert os.listdir(target.parent) == []


def test_what_it_refuses(path: Path, target: Path, tmp_path: Path) -> None:
    def refused(why: str, source: Path, file: Path, force: bool = False) -> None:
        with pytest.raises(ConfigurationError, match=why):
            back_up(source, file, force=force, progress=silent)

    refused("no decision log at", path, target)
    assert os.listdir(path.parent) == [], "none was made"
    make(path)
    refused("is no directory|there is no directory", path, tmp_path / "absent" / "backup.db")
    refused("is a directory", path, target.parent)
    for beside in ("log.db", "log.db-wal", "log.db-shm", "log.db.lock", "log.db.members"):
        refused("belongs to the log itself", path, path.with_name(beside), force=True)
    link = tmp_path / "link.db"
    link.symlink_to(path)
    refused("belongs to the log itself", path, link, force=True)
    target.write_bytes(b"mine")
    refused("exists: name another file, or replace it with --force", path, target)
    assert target.read_bytes() == b"mine"
    back_up(path, target, force=True, progress=silent)
    assert len(records_of(target)) == 4
    edit(path, "PRAGMA user_version = 77")
    refused("version 77", path, target, force=True)
    other = tmp_path / "other.db"
    edit(other, "CREATE TABLE theirs (x)")
    refused("another application", other, target, force=True)
    assert len(records_of(target)) == 4


def test_another_file_that_appears_meanwhile_is_not_replaced(path: Path, target: Path) -> None:
    make(path)

    def progress(done: int, of: int) -> None:
        target.write_bytes(b"another backup")

    copying_at_once, copying.PAGES_AT_ONCE = copying.PAGES_AT_ONCE, 2
    try:
        with pytest.raises(ConfigurationError, match=os.strerror(errno.EEXIST)):
            back_up(path, target, force=False, progress=progress)
    finally:
        copying.PAGES_AT_ONCE = copying_at_once
    assert target.read_bytes() == b"another backup"


def test_the_command(
    config: Path, path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["log", "backup", str(target)]) == 2
    assert "nothing to back up" in capsys.readouterr().err
    make(path)
    assert main(["log", "backup", str(target)]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "4 records" in told.out and "Of its commits 3 are unfinished" in told.out
    assert "quarantined for a person" in told.out and "keys used since" in told.out
    assert main(["log", "backup", str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["log", "backup", str(target), "--force", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["file"], plain["records"], plain["unfinished"]) == (str(target), 4, 3)
    assert plain["log"] == identity_of(path).id


def test_a_log_in_memory_is_refused(
    config: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text('cluster = "shop"\nlog = "memory:"\n')
    for command in ("backup", "restore"):
        assert main(["log", command, str(target)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "memory" in told and "sqlite:///" in told
