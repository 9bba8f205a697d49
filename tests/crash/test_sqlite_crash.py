"""The log in a file while processes race, die, stop and fork, and while its disk fails."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import apsw
import pytest

from coordinator.errors import ConfigurationError, LogUnavailable
from coordinator.log.base import LogIdentity, Proposal
from coordinator.log.sqlite import SQLiteLog
from coordinator.log.sqlite.lock import FileLock
from coordinator.model import ABORT
from tests.conformance.log_suite import stands
from tests.crash.sqlite_process import commit, decision_of, key, shown, transaction_id

ROOT = Path(__file__).parents[2]


class Process(subprocess.Popen[str]):
    """A process of `sqlite_process`, talked with by lines; killed when its block is left."""

    def __init__(self, mode: str, path: Path, *arguments: object) -> None:
        module = [sys.executable, "-W", "ignore", "-m", "tests.crash.sqlite_process"]
        super().__init__(
            [*module, mode, str(path), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def line(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().rstrip("\n")

    def lines(self) -> list[str]:
        """All that it still says, until it ends."""
        assert self.stdout is not None
        return self.stdout.read().splitlines()

    def go_on(self) -> None:
        assert self.stdin is not None
        self.stdin.write("\n")
        self.stdin.flush()

    def __exit__(self, *reason: object) -> None:
        self.kill()
        super().__exit__(None, None, None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
async def log(path: Path) -> AsyncIterator[SQLiteLog]:
    log = SQLiteLog(path)
    await log.open()
    yield log
    await log.close()


def create(path: Path) -> LogIdentity:
    async def open_and_close() -> LogIdentity:
        log = SQLiteLog(path)
        identity = await log.open()
        await log.close()
        return identity

    return asyncio.run(open_and_close())


def race(mode: str, path: Path, count: int) -> dict[int, str]:
    """What stands under each number after three processes raced for all, with one winner each."""
    with ExitStack() as stack:
        racers = [stack.enter_context(Process(mode, path, name, count)) for name in "abc"]
        for racer in racers:
            assert racer.line() == "ready"
        for racer in racers:
            racer.go_on()
        views: dict[int, list[list[str]]] = {}
        winners = set()
        for name, racer in zip("abc", racers, strict=True):
            for line in racer.lines():
                number, stands_there, ours = line.split()
                views.setdefault(int(number), []).append([stands_there, ours])
                if ours == "True":
                    winners.add(name)
    for seen in views.values():
        assert len(seen) == len(racers)
        assert len({stands_there for stands_there, _ in seen}) == 1, seen
        assert [ours for _, ours in seen].count("True") == 1, seen
    assert len(views) == count
    assert len(winners) > 1, "it was a race"
    return {number: seen[0][0] for number, seen in views.items()}


def test_processes_that_race_for_the_same_ids_agree(path: Path) -> None:
    identity = create(path)
    count = 1_500  # enough for a quarter of a second, so that all are at work together
    decisions = race("race", path, count)
    assert "abort" in decisions.values()

    async def check() -> None:
        log = SQLiteLog(path)
        await log.open()
        for number in range(count):
            record = (await log.read(transaction_id(identity, number))).record
            assert record is not None and shown(record.decision) == decisions[number]
        await log.close()

    asyncio.run(check())


def test_processes_that_race_for_the_same_keys_agree_on_the_attempt(path: Path) -> None:
    create(path)
    names = race("names", path, 1_500)

    async def check() -> None:
        log = SQLiteLog(path)
        await log.open()
        for number, name in names.items():
            attempt = (await log.read_key(key(number))).attempt
            assert attempt is not None and chr(attempt.timeout_ms) == name
        await log.close()

    asyncio.run(check())


def test_what_was_answered_before_a_kill_stands(path: Path) -> None:
    identity = create(path)
    draw = random.Random(7)
    answered: list[int] = []
    for life in range(8):
        first = life * 10_000
        with Process("endless", path, first) as process:
            for _ in range(draw.randrange(1, 60)):
                answered.append(int(process.line().split()[0]))
            process.kill()
            answered += [int(line.split()[0]) for line in process.lines() if line.count(" ") == 1]

    async def check() -> None:
        log = SQLiteLog(path)
        await log.open()
        for number in answered:
            answer = await log.propose(Proposal(transaction_id(identity, number), ABORT))
            assert shown(decision_of(answer)) == "endless", number
        await log.close()

    asyncio.run(check())


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_killed_before_or_after_the_write_but_before_the_answer(
    path: Path, log: SQLiteLog, moment: str
) -> None:
    identity = await log.open()
    for number in range(3):
        with Process("once", path, number, "die", moment) as process:
            assert process.lines() == ["ready"]
        transaction = transaction_id(identity, number)
        again = Proposal(transaction, commit(identity.id, transaction, "once"))
        assert stands(await log.propose(again)).ours == (moment == "before")
        assert shown(decision_of(await log.propose(Proposal(transaction, ABORT)))) == "once"


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when this process has found the lock of a log's file taken."""
    event = threading.Event()
    sleep = time.sleep

    def told(seconds: float) -> None:
        event.set()
        sleep(seconds)

    monkeypatch.setattr("coordinator.log.sqlite.lock.time.sleep", told)
    return event


async def test_locks_that_vanish_do_not_let_two_win(
    path: Path, log: SQLiteLog, waiting: threading.Event
) -> None:
    identity = await log.open()
    with Process("once", path, 0, "drop", "hold") as process:
        assert [process.line(), process.line()] == ["ready", "holding"]
        proposal = Proposal(transaction_id(identity, 0), ABORT)
        proposing = asyncio.ensure_future(log.propose(proposal))
        assert await asyncio.to_thread(waiting.wait, 20)
        assert not proposing.done()
        process.go_on()
        assert process.line() == "once True"
        answer = stands(await proposing)
        assert (shown(answer.record.decision), answer.ours) == ("once", False)


async def test_without_our_own_lock_two_would_win(
    path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug that the lock is for, so that the test above is known to test something."""
    identity = await log.open()
    monkeypatch.setattr(FileLock, "acquire", lambda self, timeout_seconds: None)
    monkeypatch.setattr(FileLock, "release", lambda self: None)
    with Process("once", path, 0, "unguarded", "drop", "hold") as process:
        assert [process.line(), process.line()] == ["ready", "holding"]
        proposal = Proposal(transaction_id(identity, 0), ABORT)
        assert stands(await log.propose(proposal)).ours
        process.go_on()
        assert process.line() == "once True", "both won"


async def test_a_process_that_holds_the_lock_and_dies_hangs_nobody(
    path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = await log.open()
    proposal = Proposal(transaction_id(identity, 0), ABORT)
    with Process("once", path, 0, "hold") as process:
        assert [process.line(), process.line()] == ["ready", "holding"]
        monkeypatch.setattr("coordinator.log.sqlite.writer.LOCK_TIMEOUT_SECONDS", 0.05)
        with pytest.raises(LogUnavailable, match=r"another process has held .*\.lock"):
            await log.propose(proposal)
        process.kill()
        process.wait()
        assert stands(await log.propose(proposal)).ours


async def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(
    path: Path, log: SQLiteLog
) -> None:
    identity = await log.open()
    with Process("once", path, 0, "forked", "die", "before") as process:
        assert process.wait(20) < 0
        # The child still runs: it waits for the end of our pipe.
        assert stands(await log.propose(Proposal(transaction_id(identity, 0), ABORT))).ours


def test_a_log_that_came_over_a_fork_says_so(path: Path) -> None:
    create(path)
    with Process("fork", path) as process:
        said = process.lines()
    assert "after the fork" in said[0]
    assert said[1:] == [
        "same log True",
        "child abort",
        "parent abort",
        "child abort",
        "status 0",
        "stand [True, True, True]",
    ]


def test_a_full_disk_is_told_and_recovers(path: Path) -> None:
    with Process("full", path) as process:
        opening, first, *full, standing, recovered = process.lines()
    assert "its disk is full; make space" in opening
    assert first == standing == "full"
    assert len(full) == 2
    assert all("is full: make space" in line for line in full)
    assert recovered == "full True"


class Disk(apsw.VFS):
    """Every file that SQLite opens, with an error that can be switched on."""

    def __init__(self) -> None:
        self.write_error: apsw.Error | None = None
        self.sync_error: apsw.Error | None = None
        super().__init__("failing disk", "unix", makedefault=True)

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:
        return File(self, name, flags)


class File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: apsw.URIFilename | str | None, flags: list[int]) -> None:
        self._disk = disk
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        if self._disk.write_error is not None:
            raise self._disk.write_error
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        if self._disk.sync_error is not None:
            raise self._disk.sync_error
        super().xSync(flags)


@pytest.fixture
def disk() -> Iterator[Disk]:
    default = apsw.vfs_names()[0]
    disk = Disk()
    yield disk
    apsw.set_default_vfs(default)
    disk.unregister()


def error_of_fsync() -> apsw.Error:
    error = apsw.IOError("fsync failed")
    error.extendedresult = apsw.SQLITE_IOERR_FSYNC  # type: ignore[attr-defined]
    return error


async def test_after_an_error_of_fsync_this_process_is_done_with_the_file(
    path: Path, disk: Disk
) -> None:
    log = SQLiteLog(path)
    identity = await log.open()
    proposal = Proposal(transaction_id(identity, 0), ABORT)
    assert stands(await log.propose(proposal)).ours
    disk.sync_error = error_of_fsync()
    lost = Proposal(transaction_id(identity, 1), ABORT)
    with pytest.raises(LogUnavailable, match="restart this process"):
        await log.propose(lost)
    disk.sync_error = None
    for call in (log.propose(lost), log.read(lost.transaction), log.propose(proposal)):
        with pytest.raises(LogUnavailable, match="restart this process"):
            await call
    with pytest.raises(ConfigurationError, match="restart this process"):
        await SQLiteLog(path).open()
    await log.close()
    with pytest.raises(ConfigurationError, match="restart this process"):
        await log.open()
    with Process("once", path, 0) as process:
        assert process.lines() == ["ready", "abort False"], "another process has what stands"


async def test_an_error_of_fsync_while_opening(path: Path, disk: Disk) -> None:
    disk.sync_error = error_of_fsync()
    with pytest.raises(ConfigurationError, match=f"{path} cannot be used"):
        await SQLiteLog(path).open()


async def test_a_write_without_space_loses_its_batch_only(path: Path, disk: Disk) -> None:
    log = SQLiteLog(path)
    identity = await log.open()
    proposals = [Proposal(transaction_id(identity, number), ABORT) for number in range(8)]
    disk.write_error = apsw.FullError("no space")
    answers = await asyncio.gather(
        *(log.propose(proposal) for proposal in proposals), return_exceptions=True
    )
    assert all(isinstance(answer, LogUnavailable) for answer in answers)
    assert len({id(answer) for answer in answers}) == 8, "each caller has an exception of its own"
    disk.write_error = None
    for proposal in proposals:
        assert (await log.read(proposal.transaction)).record is None
        assert stands(await log.propose(proposal)).ours
    await log.close()
