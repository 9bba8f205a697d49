"""Who is alive: every implementation, and what only files can show, the death of a process."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.errors import LogUnavailable, ProtocolError
from coordinator.members.base import Beat, InFlight, Members
from coordinator.members.files import FileMembers
from coordinator.members.local import LocalMembers
from coordinator.model import MemberId, TransactionId

ONE, OTHER = MemberId("00000000000000a1"), MemberId("00000000000000a2")
TRANSACTION = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")
FIRST = Beat(clock_ms=1_000, count=1)
SECOND = Beat(1_500, 2, (InFlight(TRANSACTION, 28.5, "preparing", ("orders", "stock")),))


def beaten(beat: Beat) -> tuple[int, int, tuple[InFlight, ...]]:
    return beat.clock_ms, beat.count, tuple(beat.in_flight)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def clean(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "log.db.members"


@pytest.fixture(params=["local", "files"])
def make(request: pytest.FixtureRequest, directory: Path) -> Callable[[], Members]:
    if request.param == "files":
        return lambda: FileMembers(directory)
    table: dict[MemberId, Beat] = {}
    return lambda: LocalMembers(table)


async def test_members_see_each_other_and_the_last_beat(make: Callable[[], Members]) -> None:
    one, other = make(), make()
    assert await one.alive() == {}
    await one.join(ONE, FIRST)
    await other.join(OTHER, FIRST)
    await one.beat(SECOND)
    for members in (one, other):
        alive = await members.alive()
        assert {name: beaten(beat) for name, beat in alive.items()} == {
            ONE: beaten(SECOND),
            OTHER: beaten(FIRST),
        }
    await one.beat(FIRST)
    assert beaten((await other.alive())[ONE]) == beaten(FIRST), "a shorter beat leaves no rest"


async def test_who_leaves_is_absent_and_may_join_again(make: Callable[[], Members]) -> None:
    one, other = make(), make()
    await one.leave()
    await one.join(ONE, FIRST)
    await other.join(OTHER, FIRST)
    await one.leave()
    await one.leave()
    assert set(await other.alive()) == {OTHER}
    await one.join(MemberId("00000000000000a3"), FIRST)
    assert set(await other.alive()) == {OTHER, "00000000000000a3"}


async def test_only_who_has_joined_beats_and_joins_once(make: Callable[[], Members]) -> None:
    one = make()
    with pytest.raises(ProtocolError):
        await one.beat(FIRST)
    await one.join(ONE, FIRST)
    with pytest.raises(ProtocolError):
        await one.join(OTHER, FIRST)
    assert set(await one.alive()) == {ONE}


JOIN_AND_WAIT = """
import asyncio, sys
from coordinator.members.base import Beat
from coordinator.members.files import FileMembers
async def main():
    members = FileMembers(sys.argv[1])
    await members.join(sys.argv[2], Beat(1, 1))
    print("joined", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""

FORK = """
import asyncio, os, sys
from coordinator.errors import ConfigurationError
from coordinator.members.base import Beat
from coordinator.members.files import FileMembers
members = FileMembers(sys.argv[1])
asyncio.run(members.join(sys.argv[2], Beat(1, 1)))
if os.fork() == 0:
    try:
        asyncio.run(members.beat(Beat(2, 2)))
    except ConfigurationError as error:
        print(error, flush=True)
    asyncio.run(members.leave())
    sys.stdin.read()
    os._exit(0)
sys.stdin.readline()
os._exit(0)
"""


def start(script: str, directory: Path, member: MemberId) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, str(directory), member],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


async def test_a_killed_process_is_absent_at_once_and_its_file_goes(directory: Path) -> None:
    watcher = FileMembers(directory)
    with start(JOIN_AND_WAIT, directory, ONE) as process:
        assert line_of(process) == "joined\n"
        assert set(await watcher.alive()) == {ONE}
        process.kill()
        process.wait()
        assert await watcher.alive() == {}
        assert names_in(directory) == set()


async def test_a_forked_copy_says_so_and_does_not_keep_its_parent_alive(directory: Path) -> None:
    watcher = FileMembers(directory)
    with start(FORK, directory, ONE) as process:
        assert "after the fork" in line_of(process)
        assert set(await watcher.alive()) == {ONE}, "the child's copy did not leave for its parent"
        process.kill()
        process.wait()
        # The child lives on: it holds its end of our pipe until it is told to end.
        assert await watcher.alive() == {}
        assert process.stdin is not None
        process.stdin.close()


async def test_those_who_look_do_not_take_each_other_for_the_dead_member(directory: Path) -> None:
    member = FileMembers(directory)
    await member.join(ONE, FIRST)
    (directory / OTHER).write_bytes(b"the rest of a dead one")
    watchers = [FileMembers(directory) for _ in range(8)]
    for _ in range(20):
        views = await asyncio.gather(*(watcher.alive() for watcher in watchers))
        assert [set(view) for view in views] == [{ONE}] * 8
    assert names_in(directory) == {ONE}


async def test_many_members_join_while_others_look(directory: Path) -> None:
    names = [MemberId(f"{number:016x}") for number in range(40)]
    members = [FileMembers(directory) for _ in names]
    watcher = FileMembers(directory)

    async def look() -> None:
        while set(await watcher.alive()) != set(names):
            await asyncio.sleep(0)

    looking = asyncio.ensure_future(look())
    for each, name in zip(members, names, strict=True):
        await each.join(name, FIRST)
        await asyncio.sleep(0)
    await asyncio.wait_for(looking, 20)
    assert names_in(directory) == set(names)


async def test_what_a_dead_process_left_while_joining_goes(directory: Path) -> None:
    member = FileMembers(directory)
    await member.join(ONE, FIRST)
    (directory / ".joining-0000").touch()
    (directory / "notes.txt").touch()
    assert set(await member.alive()) == {ONE}
    assert names_in(directory) == {ONE, "notes.txt"}


async def test_a_beat_in_the_middle_of_its_write_is_never_shown(directory: Path) -> None:
    member, watcher = FileMembers(directory), FileMembers(directory)
    await member.join(ONE, SECOND)
    assert beaten((await watcher.alive())[ONE]) == beaten(SECOND)
    content = (directory / ONE).read_bytes()
    for cut in range(len(content)):
        (directory / ONE).write_bytes(content[:cut] + b"\0" * (len(content) - cut))
        assert beaten((await watcher.alive())[ONE]) == beaten(SECOND), "the last one seen is kept"
        stranger = await FileMembers(directory).alive()
        assert set(stranger) == {ONE}, "its lock shows that it lives"
    await member.beat(FIRST)
    assert beaten((await watcher.alive())[ONE]) == beaten(FIRST)


async def test_a_beat_may_be_long(directory: Path) -> None:
    member = FileMembers(directory)
    many = Beat(1, 1, tuple(InFlight(TRANSACTION, 1.0, "preparing") for _ in range(4_000)))
    await member.join(ONE, many)
    assert beaten((await FileMembers(directory).alive())[ONE]) == beaten(many)


async def test_a_member_whose_file_was_removed_comes_back_with_its_next_beat(
    directory: Path,
) -> None:
    member, watcher = FileMembers(directory), FileMembers(directory)
    await member.join(ONE, FIRST)
    clean(directory)
    assert await watcher.alive() == {}
    await member.beat(SECOND)
    assert beaten((await watcher.alive())[ONE]) == beaten(SECOND)
    await member.leave()
    assert names_in(directory) == set()


async def test_the_files_are_their_owners_alone(directory: Path) -> None:
    member = FileMembers(directory)
    await member.join(ONE, FIRST)
    assert os.stat(directory).st_mode & 0o777 == 0o700
    assert os.stat(directory / ONE).st_mode & 0o777 == 0o600
    descriptor = os.open(directory / ONE, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


async def test_a_place_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LogUnavailable, match="cannot be reached"):
        await FileMembers(tmp_path / "file").join(ONE, FIRST)
    with pytest.raises(LogUnavailable):
        await FileMembers(tmp_path / "absent" / "members").join(ONE, FIRST)
    with pytest.raises(ProtocolError, match="sixteen"):
        await FileMembers(tmp_path / "members").join(MemberId("../escape"), FIRST)
