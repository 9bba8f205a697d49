"""What is special to the log in a file: its places, its errors, its speed, its sharing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import apsw
import pytest

from coordinator.errors import ConfigurationError, LogUnavailable, ProtocolError
from coordinator.log import open_log
from coordinator.log.base import Attempt, KeyState, Proposal, Stands, Unreadable
from coordinator.log.memory import MemoryLog
from coordinator.log.sqlite import SQLiteLog, schema
from coordinator.log.sqlite.mounts import file_system_of
from coordinator.model import ABORT, Claim, Decision, TransactionId, Verdict
from tests.conformance.log_suite import KEY, MEMBER, Place, stands

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def edit(path: Path, *statements: str) -> None:
    """Change a log's file behind its back; no log has it open."""
    connection = apsw.Connection(str(path))
    for statement in statements:
        connection.execute(statement)
    connection.close()


def refused(path: Path, match: str) -> None:
    """Opening fails with an error that names the file; nothing in it is changed."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigurationError, match=match) as caught:
        asyncio.run(SQLiteLog(path).open())
    assert str(path) in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def made(path: Path) -> None:
    """A log with a record in it, closed."""

    async def make() -> None:
        place = Place(lambda: SQLiteLog(path))
        log = await place.open()
        transaction = place.draw()
        await log.propose(Proposal(transaction, place.commit(transaction, "orders")))
        await place.close()

    asyncio.run(make())


async def test_the_file_is_its_owners_alone(path: Path) -> None:
    log = SQLiteLog(path)
    await log.open()
    for suffix in ("", "-wal", "-shm", ".lock"):
        assert os.stat(f"{path}{suffix}").st_mode & 0o777 == 0o600, suffix
    await log.close()
    assert set(os.listdir(path.parent)) == {"log.db", "log.db.lock"}


def test_a_missing_directory(path: Path) -> None:
    refused(path.parent / "absent" / "log.db", "no directory")


def test_a_directory_in_place_of_the_file(path: Path) -> None:
    path.mkdir()
    refused(path, "is a directory")


def test_what_is_no_database(path: Path) -> None:
    path.write_bytes(b"These are a person's notes, and must stay. " * 100)
    refused(path, "not an SQLite database")


def test_another_applications_database(path: Path) -> None:
    edit(path, "CREATE TABLE theirs (x)")
    refused(path, "another application")
    edit(path, "DROP TABLE theirs", "PRAGMA application_id = 7")
    refused(path, "another application")


def test_the_schema_of_another_version(path: Path) -> None:
    made(path)
    edit(path, f"PRAGMA user_version = {schema.VERSION + 1}")
    refused(path, "newer version.*upgrade")
    edit(path, f"PRAGMA user_version = {schema.VERSION}", "DROP TABLE attempt")
    refused(path, "before the first release.*choose another path")


def test_an_empty_file_becomes_a_log(path: Path) -> None:
    path.touch()
    made(path)


def test_a_file_that_was_cut_off(path: Path) -> None:
    made(path)
    os.truncate(path, path.stat().st_size - 4096)
    refused(path, "damaged.*restore a backup")


def test_a_page_that_was_overwritten(path: Path) -> None:
    made(path)
    with path.open("r+b") as opened:
        opened.seek(2 * 4096)
        opened.write(b"\xff" * 4096)
    refused(path, "damaged")


def test_a_log_without_its_identity(path: Path) -> None:
    made(path)
    edit(path, "DELETE FROM log")
    refused(path, "id is missing")


OPEN = """
import asyncio, os, sys
import coordinator.log.sqlite
from coordinator.errors import ConfigurationError
from coordinator.log.sqlite import SQLiteLog
async def main():
    try:
        await SQLiteLog(sys.argv[1]).open()
    except ConfigurationError as error:
        print(error)
if os.geteuid() == 0:  # root may write everything
    os.setgid(65534)
    os.setuid(65534)
asyncio.run(main())
"""


def open_without_rights(path: Path) -> str:
    """What a user who owns nothing here is told, also when the tests are root's."""
    command = [sys.executable, "-c", OPEN, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_or_a_directory_without_the_right_to_write() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        path, lock = directory / "log.db", directory / "log.db.lock"
        made(path)
        path.chmod(0o444)
        lock.chmod(0o666)
        assert "can only be read" in open_without_rights(path)
        path.chmod(0o666)
        directory.chmod(0o555)
        assert "the right to write the file and its directory" in open_without_rights(path)
        lock.chmod(0o444)
        assert "log.db.lock cannot be opened for writing" in open_without_rights(path)
        assert "new.db" in open_without_rights(directory / "new.db")
        directory.chmod(0o755)


MOUNTS = r"""22 28 0:21 / /proc rw,nosuid shared:12 - proc proc rw
28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 28 0:40 / /mnt/share\040of\040us rw shared:3 master:1 - nfs4 server:/export rw
32 28 0:41 / /mnt/hidden rw - nfs server:/old rw
33 28 0:42 / /mnt/hidden rw - ext4 /dev/vdb rw
34 28 0:43 / /mnt/far rw - fuse.sshfs user@host: rw
"""


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("/var/lib/log.db", "ext4"),
        ("/mnt/share of us/log.db", "nfs4"),
        ("/mnt/share of ours/log.db", "ext4"),
        ("/mnt/hidden/log.db", "ext4"),
        ("/mnt/far/log.db", "fuse.sshfs"),
    ],
)
def test_the_file_system_of_a_path(place: str, kind: str) -> None:
    assert file_system_of(place, MOUNTS) == kind


def test_a_network_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = path.with_name("mountinfo")
    mounts.write_text(MOUNTS + f"40 28 0:50 / {path.parent} rw - fuse.sshfs host: rw\n")
    monkeypatch.setattr("coordinator.log.sqlite.mounts._MOUNTS", mounts)
    refused(path, r"network file system \(fuse.sshfs\)")


async def test_one_unreadable_record_parks_only_itself(path: Path) -> None:
    place = Place(lambda: SQLiteLog(path))
    log = await place.open()
    ids = [place.draw() for _ in range(3)]
    for each in ids:
        await log.propose(Proposal(each, place.commit(each, "orders")))
    await place.close()
    edit(path, f"UPDATE record SET decision = x'02ff' WHERE id = x'{ids[1].replace('-', '')}'")
    log = await place.open()
    page = await log.scan(None, 10)
    assert [type(each) is Unreadable for each in page.records] == [False, True, False]
    unreadable = page.records[1]
    assert isinstance(unreadable, Unreadable)
    assert unreadable.transaction == ids[1] and "format 2" in unreadable.why
    for call in (log.propose(Proposal(ids[1], ABORT)), log.read(ids[1])):
        with pytest.raises(LogUnavailable, match=ids[1]):
            await call
    assert not stands(await log.propose(Proposal(ids[0], ABORT))).ours
    await log.register("stock", "old", 0)
    with pytest.raises(ConfigurationError):
        await log.register("stock", "new", 0)
    await log.raise_horizon(place.draw())
    assert await log.forget(10, claims_before_ms=0) == 0, "it is unfinished, whatever it says"
    await place.close()


async def test_what_cannot_be_stored_is_refused_and_harms_nobody(path: Path) -> None:
    place = Place(lambda: SQLiteLog(path))
    log = await place.open()
    transaction, other = place.draw(), place.draw()
    commit = place.commit(transaction, "orders")
    unnamed, attempt = Claim("key", "\ud800"), Attempt(transaction, 1_000, MEMBER)
    *answers, no_text, fine = await asyncio.gather(
        log.propose(Proposal(transaction, commit, attachment=b"x" * 2_000_000)),
        log.propose(Proposal(other, commit)),
        log.swept("unregistered", other, 1),
        log.name_attempt(unnamed, attempt, None),
        log.name_attempt(KEY, Attempt(TransactionId("no id"), 1_000, MEMBER), None),
        log.read_key(unnamed),
        log.register("\ud800", "a name that is no text", 0),
        log.propose(Proposal(other, ABORT)),
        return_exceptions=True,
    )
    for answer in answers:
        assert isinstance(answer, ProtocolError), answer
    assert isinstance(no_text, UnicodeEncodeError)
    assert stands(fine).ours
    assert (await log.read(transaction)).record is None
    assert await log.read_key(KEY) == KeyState()
    await place.close()


async def test_concurrent_decisions_share_a_write(path: Path) -> None:
    place = Place(lambda: SQLiteLog(path))
    logs = [SQLiteLog(path), SQLiteLog(path)]
    for log in logs:
        await log.open()
    await place.open()
    before = logs[0].statistics.write_transactions
    ids = [place.draw() for _ in range(640)]

    async def propose(log: SQLiteLog, number: int) -> None:
        for each in ids[number::64]:
            assert stands(await log.propose(Proposal(each, ABORT))).ours

    await asyncio.gather(*(propose(logs[number % 2], number) for number in range(64)))
    assert logs[0].statistics.proposals == 640
    assert logs[0].statistics.write_transactions - before <= 64
    assert sum(each.name == "decision log log.db" for each in threading.enumerate()) == 1
    for log in logs:
        await log.close()
    await place.close()
    assert not any(each.name == "decision log log.db" for each in threading.enumerate())


async def test_the_write_ahead_log_stays_short(path: Path) -> None:
    place = Place(lambda: SQLiteLog(path))
    log = await place.open()
    attachment = b"x" * 20_000
    for _ in range(30):
        ids = [place.draw() for _ in range(50)]
        await asyncio.gather(
            *(log.propose(Proposal(each, place.commit(each), (), attachment)) for each in ids)
        )
    assert os.stat(f"{path}-wal").st_size < 12 * 1024 * 1024, "of 30 MB that were written"
    await place.close()


def test_event_loops_of_several_threads_share_the_writer(path: Path) -> None:
    place = Place(lambda: SQLiteLog(path))
    asyncio.run(place.open())
    ids = [place.draw() for _ in range(50)]
    won: list[int] = []

    async def race() -> None:
        log = SQLiteLog(path)
        await log.open()
        answers = await asyncio.gather(*(log.propose(Proposal(each, ABORT)) for each in ids))
        won.append(sum(isinstance(each, Stands) and each.ours for each in answers))
        await log.close()

    threads = [threading.Thread(target=lambda: asyncio.run(race())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 4 and sum(won) == 50
    asyncio.run(place.close())


async def test_a_file_that_was_replaced_while_open(path: Path) -> None:
    place = Place(lambda: SQLiteLog(path))
    log = await place.open()
    os.rename(path, path.with_name("moved.db"))
    for _ in range(2):
        with pytest.raises(LogUnavailable, match="moved, deleted or replaced"):
            await log.propose(Proposal(place.draw(), ABORT))
    await log.close()


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("log.db", "no scheme"),
        ("sqlite://log.db", r"2 slashes .* write sqlite:///log.db"),
        ("sqlite:log.db", "0 slashes"),
        ("sqlite:/var/log.db", r"1 slashes .* sqlite:////var/log.db for an absolute"),
        ("sqlite:///", "empty path"),
        ("sqlite:////", "empty path"),
        ("sqlite:///logs/", "names a directory"),
        ("sqlite:///:memory:", "write memory:"),
        ("sqlite:///log.db?mode=ro", r"'\?mode=ro' after its path"),
        ("sqlite:///log.db#one", "'#one' after its path"),
        ("memory://name", "has a path"),
        ("etcd://one,two,three/prefix", "etcd: is not built into this version"),
        ("mysql://user:secret@host/db", "no log of the kind mysql:"),
        ("", "no scheme"),
    ],
)
def test_a_wrong_url_says_what_is_wrong(url: str, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match) as caught:
        open_log(url)
    assert "secret" not in str(caught.value)


async def test_urls_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative, _ = open_log("sqlite:///log.db")
    absolute, members = open_log(f"sqlite:///{tmp_path}/log.db")
    assert os.listdir(tmp_path) == []
    assert await relative.open() == await absolute.open()
    assert "log.db.members" in repr(members)
    await relative.close()
    await absolute.close()


async def test_urls_of_memory() -> None:
    logs = [open_log(url)[0] for url in ("memory:", "memory:", "memory:a", "memory:a", "memory:b")]
    assert all(isinstance(log, MemoryLog) for log in logs)
    identities = [await log.open() for log in logs]
    assert identities[2] == identities[3]
    assert len({identity.id for identity in identities}) == 4


def test_importing_the_port_does_not_load_sqlite() -> None:
    script = "import sys, coordinator.log, coordinator.log.base; assert 'apsw' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_program_that_forgets_to_close_ends_all_the_same(path: Path) -> None:
    script = """
import asyncio, sys
from coordinator.log.sqlite import SQLiteLog
asyncio.run(SQLiteLog(sys.argv[1]).open())
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(path)], check=True, timeout=20, cwd=ROOT
    )
    assert not Path(f"{path}-wal").exists(), "it was closed in order"


async def test_a_delegated_decision_awaits_its_answer_whatever_is_marked(path: Path) -> None:
    place = Place(lambda: SQLiteLog(path))
    log = await place.open()
    transaction = place.draw()
    await log.propose(Proposal(transaction, place.delegated(transaction)))
    await log.raise_horizon(place.draw())
    assert await log.forget(10, claims_before_ms=0) == 0
    assert await log.record_answer(transaction, Verdict.COMMIT) is Verdict.COMMIT
    assert await log.forget(10, claims_before_ms=0) == 1
    await place.close()


async def test_a_commit_of_no_branches_is_finished(path: Path) -> None:
    place = Place(lambda: SQLiteLog(path))
    log = await place.open()
    transaction = place.draw()
    record = stands(await log.propose(Proposal(transaction, Decision(Verdict.COMMIT)))).record
    assert record.finished
    assert (await log.scan(None, 10)).records == ()
    await place.close()
