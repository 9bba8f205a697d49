"""What `syncpoint show` says will happen next, for each kind of transaction; nothing is asked."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.commands.list_transactions import BranchView, Picture, State, View
from coordinator.commands.next_step import Actor, Next, next_step
from coordinator.config import Settings
from coordinator.log.base import Incident, Record, Word
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Decision,
    EndingKind,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
)

ID = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")
XID = Xid(LogId("a" * 16), MemberId("d" * 16), ID, BranchId("b" * 16))
HELD = Branch(XID, "ledger")
SETTINGS = Settings(sweep_interval=2.0, beat_interval=0.5, retry_most=5.0)
RESOLVE = f"syncpoint resolve {ID} --branch {XID.branch}"
ABORT_NOW = f"syncpoint resolve {ID} abort --reason TEXT"
FORGET = f"syncpoint forget {ID} --reason TEXT"


def picture(**changed: Any) -> Picture:
    """One participant has answered and holds the branch; a service lives."""
    plain: dict[str, Any] = {
        "views": [],
        "records": {},
        "held": {ID: [HELD]},
        "incidents": {},
        "words": {},
        "configured": {"ledger"},
        "unreachable": {},
        "services": 1,
    }
    return Picture(**plain | changed)


def view(state: State, branch: str = "prepared", **changed: Any) -> View:
    branches = [BranchView("ledger", branch, XID.branch)]
    shown = View(ID, 3.0, state, "", branches, XID.member, state is State.IN_FLIGHT)
    return msgspec.structs.replace(shown, **changed)


def record(verdict: Verdict) -> Record:
    if verdict is Verdict.ABORT:
        return Record(ID, ABORT)
    return Record(ID, Decision(verdict, (HELD,), HELD if verdict is Verdict.DELEGATED else None))


def step(seen: View, verdict: Verdict | None = None, around: Picture | None = None) -> Next:
    standing = None if verdict is None else record(verdict)
    return next_step(seen, standing, around or picture(), SETTINGS)


def test_a_live_one_with_its_seconds_left() -> None:
    found = step(view(State.IN_FLIGHT, seconds_left=12.4))
    assert "its owner goes on with it for at most 12 s; then it is rolled back" in found.text
    assert (found.actor, found.within_seconds) == (Actor.OWNER, 12.4)
    assert list(found.commands) == [ABORT_NOW]


def test_one_that_its_owner_does_not_list() -> None:
    found = step(view(State.IN_FLIGHT))
    assert "if it was left behind, it is rolled back" in found.text
    assert found.within_seconds == 3 * 0.5 + 2 * 2.0 and list(found.commands) == [ABORT_NOW]


def test_one_that_its_owner_tries_again() -> None:
    found = step(view(State.IN_FLIGHT), Verdict.COMMIT)
    assert "tries again with pauses of up to 5 s" in found.text and "is committed" in found.text
    assert (found.actor, list(found.commands)) == (Actor.OWNER, [])


@pytest.mark.parametrize(
    ("verdict", "end"),
    [
        (None, "is rolled back, unless a commit is recorded first"),
        (Verdict.ABORT, "is rolled back"),
        (Verdict.COMMIT, "is committed"),
        (Verdict.DELEGATED, "ends as its last resource answers"),
    ],
)
def test_one_for_the_next_sweep(verdict: Verdict | None, end: str) -> None:
    found = step(view(State.IN_DOUBT), verdict)
    assert found.text == f"with a sweep of a service, every 2 s, it {end}"
    assert (found.actor, found.within_seconds) == (Actor.SWEEP, 2.0)


def test_one_that_is_retried_until_a_server_is_back() -> None:
    away = picture(unreachable={"ledger": "down"}, held={})
    found = step(view(State.IN_DOUBT, "unreachable"), Verdict.COMMIT, away)
    assert found.text.startswith("it is tried again by the sweep of a service, every 2 s: ")
    assert found.text.endswith(", once ledger can be reached") and found.within_seconds is None
    alone = picture(unreachable={"ledger": "down"}, held={}, services=0)
    found = step(view(State.IN_DOUBT, "unreachable"), Verdict.COMMIT, alone)
    assert found.actor is Actor.PERSON and list(found.commands) == ["syncpoint recover --wait 60"]


def test_one_whose_participant_is_not_configured() -> None:
    removed = picture(configured=set(), held={})
    found = step(view(State.IN_DOUBT, "not configured"), Verdict.COMMIT, removed)
    assert "by a process that has ledger, which is not configured here" in found.text
    assert list(found.commands) == ["syncpoint recover"]


def test_one_that_cannot_be_read() -> None:
    found = step(view(State.NEEDS_PERSON, why_unreadable="version 9"))
    assert "cannot be read (version 9)" in found.text and found.actor is Actor.PERSON
    assert found.commands == ()


@pytest.mark.parametrize(
    ("kind", "around", "said", "commands"),
    [
        (None, {}, "then end branch bbbbbbbbbbbbbbbb of ledger as the others have ended",
         [f"{RESOLVE} commit --reason TEXT", f"{RESOLVE} rollback --reason TEXT"]),
        (None, {"words": {ID: [Word(str(XID), Verdict.ABORT, "why", "ann@host", 0)]}},
         "waits for what ann@host ordered: type it again", [f"{RESOLVE} rollback --reason TEXT"]),
        (None, {"held": {}}, "is not prepared any more", [FORGET]),
        (None, {"held": {}, "unreachable": {"ledger": "down"}}, "then end branch",
         [f"{RESOLVE} commit --reason TEXT", f"{RESOLVE} rollback --reason TEXT"]),
        (None, {"held": {}, "configured": set()}, "then end branch",
         [f"{RESOLVE} commit --reason TEXT", f"{RESOLVE} rollback --reason TEXT"]),
        (EndingKind.HEURISTIC_COMMIT, {"held": {}}, "mend them by hand, then ack", [FORGET]),
    ],
)  # fmt: skip
def test_one_that_needs_a_person(
    kind: EndingKind | None, around: dict[str, Any], said: str, commands: list[str]
) -> None:
    incident = Incident(str(XID), "ledger", kind, "seen", 0)
    found = step(view(State.NEEDS_PERSON), None, picture(incidents={ID: [incident]}, **around))
    assert found.text.startswith("nothing by itself: ") and said in found.text
    assert (found.actor, list(found.commands)) == (Actor.PERSON, commands)
    assert "its other branches" not in found.text


def test_the_other_branches_of_one_that_needs_a_person_are_ended() -> None:
    incident = Incident(f"{XID}"[:-1] + "c", "ledger", EndingKind.HEURISTIC_COMMIT, "seen", 0)
    found = step(view(State.NEEDS_PERSON), None, picture(incidents={ID: [incident]}))
    assert found.text.endswith("; its other branches are ended by the sweep")


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict.COMMIT, "it has committed everywhere"),
        (Verdict.ABORT, "it has rolled back everywhere"),
        (None, "only what a person said is kept"),
    ],
)
def test_one_that_has_ended(verdict: Verdict | None, said: str) -> None:
    found = step(view(State.FINISHED), verdict)
    assert said in found.text and found.actor is Actor.NOBODY and found.commands == ()
