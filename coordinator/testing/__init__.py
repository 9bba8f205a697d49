"""For a service's own tests: coordinators in memory, faults, crashes, rollback, `assert_atomic`.

    lose_answer, refuse, unreachable   switches: a participant or the log fails at a named call
    crash_at                           the coordinator stops dead at a named point
    assert_atomic                      everything has ended, all of it or nothing of it
    rolled_back                        a transaction around a whole test that is never committed

`docs/testing.md` shows when to use which. The fixtures are in `coordinator.testing.fixtures`, which
is the only part that needs pytest.
"""

from __future__ import annotations

import secrets

from coordinator.config import Settings
from coordinator.coordinator import Coordinator
from coordinator.participant import Participant
from coordinator.testing.atomic import assert_atomic, assert_atomic_blocking
from coordinator.testing.crash import POINTS, Crash, Crashed, crash_at
from coordinator.testing.faults import AnswerLost, Fault, lose_answer, refuse, unreachable
from coordinator.testing.rollback import rolled_back, rolled_back_blocking
from participants.memory import Memory, MemoryStore

__all__ = [
    "POINTS",
    "QUICK",
    "AnswerLost",
    "Crash",
    "Crashed",
    "Fault",
    "Memory",
    "MemoryStore",
    "assert_atomic",
    "assert_atomic_blocking",
    "coordinator",
    "crash_at",
    "lose_answer",
    "refuse",
    "rolled_back",
    "rolled_back_blocking",
    "unreachable",
]

QUICK = Settings(
    timeout=10.0,
    timeout_max=30.0,
    retention=120.0,
    sweep_interval=0.05,
    beat_interval=0.4,
    drain_timeout=2.0,
    retry_first=0.005,
    retry_most=0.05,
)
"""Settings for tests: what failed is tried again at once, and the sweep comes every 50 ms."""


def coordinator(*participants: Participant, settings: Settings = QUICK) -> Coordinator:
    """A closed coordinator on a new log in memory, which outlives its closing and its crashes.

    The participants may be in memory (`Memory`) or real databases.
    """
    log = f"memory:testing-{secrets.token_hex(8)}"
    return Coordinator(log, cluster="testing", participants=participants, settings=settings)
