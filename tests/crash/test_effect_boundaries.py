"""Processes and servers are killed, and answers lost, at every effect boundary of the protocol.

Each case: a real service process on two real servers, a fate at one point, recovery by another
process, then money, branches and locks are counted, and what the caller was told is compared.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from participants.postgres.embedded import EmbeddedServer
from tests.crash.child import Plan
from tests.crash.harness import Child, check_ended, recover

BEFORE_DECISION = [
    ("prepare:before", 1),
    ("prepare:before", 2),
    ("prepare:after", 1),
    ("prepare:after", 2),
    ("decide:before", 1),
]
AFTER_DECISION = [
    ("decide:after", 1),
    ("commit:before", 1),
    ("commit:before", 2),
    ("commit:after", 1),
    ("commit:after", 2),
    ("forget:before", 1),
    ("forget:after", 1),
]
ROLLING_BACK = [
    ("rollback:before", 1),
    ("rollback:before", 2),
    ("rollback:after", 1),
    ("rollback:after", 2),
]
CASES = [
    *(("commit", point, n, "aborted") for point, n in BEFORE_DECISION),
    *(("commit", point, n, "committed") for point, n in AFTER_DECISION),
    *(("abort", point, n, "aborted") for point, n in ROLLING_BACK),
    *(("vote no", point, n, "aborted") for point, n in ROLLING_BACK),
    ("one phase", "one-phase:before", 1, "aborted"),
    ("one phase", "one-phase:after", 1, "committed"),
    ("read only", "decide:before", 1, "aborted"),
    ("read only", "decide:after", 1, "committed"),
    ("read only", "commit:after", 1, "committed"),
]


@pytest.fixture
def plan(tmp_path: Path, database: str, second_database: str) -> Plan:
    return Plan(f"sqlite:///{tmp_path / 'log.db'}", database, second_database)


def aim(plan: Plan, mode: str, point: str, occurrence: int, fate: str) -> Plan:
    return msgspec.structs.replace(plan, mode=mode, point=point, occurrence=occurrence, fate=fate)


@pytest.mark.parametrize(("mode", "point", "occurrence", "expected"), CASES)
async def test_the_process_is_killed(
    plan: Plan, mode: str, point: str, occurrence: int, expected: str
) -> None:
    plan = aim(plan, mode, point, occurrence, "kill")
    with Child(plan) as child:
        told, _ = await asyncio.to_thread(child.process.communicate)
        assert child.process.returncode == -signal.SIGKILL, told
    # The second phase may end, and the caller be told, before the lazy mark is written.
    assert told.strip() in ("", expected)
    await recover(plan)
    check_ended(plan, expected)


@pytest.mark.parametrize(
    ("point", "occurrence", "expected"),
    [
        ("prepare:before", 1, "aborted"),
        ("prepare:after", 2, "aborted"),
        ("decide:before", 1, "aborted"),
        ("decide:after", 1, "committed"),
        ("commit:after", 1, "committed"),
    ],
)
@pytest.mark.parametrize("blocking", [False, True], ids=["asyncio", "thread"])
async def test_a_repeat_under_the_key_of_a_killed_process(
    plan: Plan, point: str, occurrence: int, expected: str, blocking: bool
) -> None:
    """The repeat comes at once, before any recovery; the transfer happens exactly once."""
    plan = msgspec.structs.replace(
        aim(plan, "commit", point, occurrence, "kill"), key="order 7", blocking=blocking
    )
    with Child(plan) as child:
        await asyncio.to_thread(child.process.communicate)
        assert child.process.returncode == -signal.SIGKILL
    with Child(msgspec.structs.replace(plan, point="")) as repeat:
        waiting = asyncio.to_thread(repeat.process.communicate)
        recovering = recover(plan)  # the repeat needs the rows that the dead process has locked
        (told, _), _ = await asyncio.gather(waiting, recovering)
        assert told.strip() == ("committed" if expected == "aborted" else "committed before")
    await recover(plan)
    check_ended(plan, "committed")


@pytest.mark.parametrize(("point", "occurrence"), BEFORE_DECISION + AFTER_DECISION)
@pytest.mark.parametrize("which", [0, 1], ids=["accounts", "ledger"])
async def test_a_server_is_killed(
    plan: Plan,
    postgres_servers: tuple[EmbeddedServer, EmbeddedServer],
    which: int,
    point: str,
    occurrence: int,
) -> None:
    plan = aim(plan, "commit", point, occurrence, "wait")
    told = []
    with Child(plan) as child:
        while (line := await asyncio.to_thread(child.read_line)) and line != "reached":
            told.append(line)
        assert line == "reached"
        await asyncio.to_thread(postgres_servers[which].kill)
        child.go_on()
        await asyncio.to_thread(postgres_servers[which].start)
        while line := await asyncio.to_thread(child.read_line):
            told.append(line)
        assert child.process.wait(timeout=30) == 0
    assert len(told) == 1
    if (point, occurrence) in AFTER_DECISION:
        assert told == ["committed"]
    elif point != "decide:before":
        assert told[0] in ("committed", "aborted")
    await recover(plan)
    check_ended(plan, told[0])


@pytest.mark.parametrize("point", ["prepare:after", "decide:before"])
async def test_a_process_sleeps_with_all_votes_in_hand_and_loses_politely(
    plan: Plan, point: str
) -> None:
    plan = msgspec.structs.replace(
        aim(plan, "commit", point, 2 if point == "prepare:after" else 1, "wait"),
        timeout=1.0,
        timeout_max=1.0,
    )
    with Child(plan) as child:
        assert await asyncio.to_thread(child.read_line) == "reached"
        os.kill(child.process.pid, signal.SIGSTOP)
        await recover(plan)
        check_ended(plan, "aborted")
        os.kill(child.process.pid, signal.SIGCONT)
        child.go_on()
        assert await asyncio.to_thread(child.read_line) == "aborted"
        assert child.process.wait(timeout=30) == 0
    await recover(plan)
    check_ended(plan, "aborted")


async def test_a_process_sleeps_after_the_decision_and_another_finishes(plan: Plan) -> None:
    plan = aim(plan, "commit", "decide:after", 1, "wait")
    with Child(plan) as child:
        assert await asyncio.to_thread(child.read_line) == "reached"
        os.kill(child.process.pid, signal.SIGSTOP)
        await recover(plan)
        check_ended(plan, "committed")
        os.kill(child.process.pid, signal.SIGCONT)
        child.go_on()
        assert await asyncio.to_thread(child.read_line) == "committed"
        assert child.process.wait(timeout=30) == 0
    check_ended(plan, "committed")
