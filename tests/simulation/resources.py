"""Resources with the semantics of PostgreSQL, as `docs/` and the live tests have measured them.

A branch is a session's work, then prepared, then ended. A PREPARE may arrive after its rollback, an
unknown name is finished for a rollback, and for a commit the resource itself says what became of
it. A restart loses what only worked and keeps what is prepared. An operation that returns None did
not succeed for now, and is tried again by whoever called it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from coordinator.model import (
    FINISHED,
    Branch,
    BranchId,
    Decision,
    Ending,
    EndingKind,
    Verdict,
    Vote,
    VoteKind,
)
from tests.simulation.checkers import ABORTED, COMMITTED, PREPARED, STATES, WORKING, Truth

if TYPE_CHECKING:
    from tests.simulation.logserver import LogServer
    from tests.simulation.processes import Process
    from tests.simulation.world import World

TOKEN = b"xid8"
VOTED_PREPARED = Vote(VoteKind.PREPARED, TOKEN)
VOTED_READ_ONLY = Vote(VoteKind.READ_ONLY)
VOTED_NO = Vote(VoteKind.ABORTED, reason="a deferred constraint failed")
VOTED_FULL = Vote(VoteKind.ABORTED, reason="no space left on device", retryable=True)
VOTED_NO_SLOT = Vote(VoteKind.ABORTED, reason="maximum number of prepared transactions reached")
VOTED_UNCONFIRMED = Vote(VoteKind.ABORTED, reason="no standby confirmed it", retryable=True)
VOTED_GONE = Vote(VoteKind.ABORTED, reason="the session was gone", retryable=True)
ROLLED_BACK = Ending(EndingKind.HEURISTIC_ROLLBACK, "pg_xact_status says aborted")
HAZARD = Ending(EndingKind.HEURISTIC_HAZARD, "the name is unknown and no xid8 was recorded")
PROMOTED = Ending(EndingKind.HEURISTIC_HAZARD, "the server was promoted since the branch voted")

HANGS = object()
"""The answer of a server that keeps its caller waiting; it calls `answer` when it is released."""

NO_LIMIT = 1_000_000

# How the caller of a rollback stands to the branch.
SESSION, DOUBT, STRANGER = "session", "doubt", "stranger"


class Slot:
    """One branch as it really is, whatever anybody believes of it."""

    __slots__ = (
        "accepted",
        "answer",
        "attended",
        "begun_at",
        "branch",
        "by_person",
        "came_back",
        "delta",
        "doubt",
        "driven",
        "ended_at",
        "full",
        "held",
        "id",
        "last",
        "log",
        "lost",
        "one_phase",
        "prepared_at",
        "process",
        "refuses",
        "resource",
        "rolled_back_at",
        "session_due",
        "shown",
        "state",
        "timeline",
        "truth",
        "was_committed",
        "writes",
    )

    def __init__(
        self, branch: Branch, resource: Resource, process: Process, truth: Truth, now: float
    ) -> None:
        self.branch = branch
        self.full = branch
        self.id: BranchId = branch.xid.branch
        self.resource = resource
        self.process = process
        self.truth = truth
        self.log: LogServer = process.log
        self.delta = 0
        self.state = WORKING
        self.accepted = False
        self.by_person = False
        self.came_back = False
        self.lost = False
        self.held = False
        self.answer: Callable[[Vote], None] | None = None
        self.timeline = 0
        self.was_committed = False
        self.attended = False
        self.doubt = False
        self.driven = False
        self.last = False
        self.one_phase = False
        self.refuses = False
        self.shown = False
        self.writes = True
        self.begun_at = now
        self.prepared_at = -1.0
        self.ended_at = -1.0
        self.rolled_back_at = -1.0
        self.session_due = now

    def named_in(self, decision: Decision | None) -> bool:
        return decision is not None and any(each.id == self.id for each in decision.branches)

    def __repr__(self) -> str:
        kind = "last resource" if self.last else "writing" if self.writes else "reading"
        accepted = "" if self.accepted else ", given up"
        return (
            f"<branch {self.id[-4:]} of {self.truth.id[:13]} at {self.resource.name}: {kind}, "
            f"{STATES[self.state]}{accepted}>"
        )


class Resource:
    """A database: several logs and many processes may have branches in it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.down = False
        self.full = self.locked_out = self.stalled = False
        self.slots_most = NO_LIMIT
        self.timeline = 0
        self.slots: dict[BranchId, Slot] = {}
        self.prepared: dict[BranchId, Slot] = {}

    # The session.

    def begin(self, slot: Slot) -> None:
        slot.timeline = self.timeline
        self.slots[slot.id] = slot

    def prepare(self, slot: Slot) -> Vote | object:
        if slot.state != WORKING:
            return VOTED_GONE
        if slot.refuses:
            return self._refuse(slot, VOTED_NO, "S19 a branch votes no")
        if not slot.writes:
            return VOTED_READ_ONLY
        if self.full:
            return self._refuse(slot, VOTED_FULL, "S25 a PREPARE finds the disk full")
        if len(self.prepared) >= self.slots_most:
            return self._refuse(slot, VOTED_NO_SLOT, "S32 a PREPARE finds no slot")
        slot.state = PREPARED
        slot.prepared_at = self.world.now
        slot.attended = slot.driven and slot.process.was_awake_since(slot.begun_at)
        slot.full = Branch(slot.branch.xid, slot.branch.participant, TOKEN)
        self.prepared[slot.id] = slot
        if slot.rolled_back_at >= 0.0 or slot.truth.outcome is Verdict.ABORT:
            self.world.count("S21 a PREPARE lands after its rollback")
        slot.timeline = self.timeline
        if self.stalled:
            self.world.count("S22 a PREPARE hangs at a synchronous standby that is away")
            slot.held = True
            return HANGS
        return VOTED_PREPARED

    def _refuse(self, slot: Slot, vote: Vote, what: str) -> Vote:
        self._end(slot, ABORTED)
        self.world.count(what)
        return vote

    def release_held(self, *, canceled: bool) -> None:
        """The wait for the standby is over: confirmed, or cancelled by somebody, with a warning."""
        for slot in self.slots.values():
            slot.held = False
            answer, slot.answer = slot.answer, None
            if answer is not None and canceled:
                self.world.count("S23 a PREPARE succeeds with a warning and counts as no")
                answer(VOTED_UNCONFIRMED)
            elif answer is not None:
                answer(VOTED_PREPARED if slot.state == PREPARED else VOTED_GONE)

    def commit_one_phase(self, slot: Slot) -> Verdict | None:
        """COMMIT on the session itself, without preparing."""
        if slot.timeline != self.timeline:
            return None
        if slot.state == WORKING:
            slot.one_phase = True
            self._end(slot, ABORTED if slot.refuses else COMMITTED)
        return Verdict.COMMIT if slot.state == COMMITTED else Verdict.ABORT

    def what_became(self, slot: Slot) -> Verdict | None:
        """The status of a session's transaction; no answer while it is in progress.

        DELEGATED stands for a server that has lost track, since it was promoted.
        """
        if slot.timeline != self.timeline:
            return Verdict.DELEGATED
        if slot.state == WORKING:
            return None
        return Verdict.COMMIT if slot.state == COMMITTED else Verdict.ABORT

    def disconnect(self, slot: Slot) -> None:
        """The server notices that the session's client is gone; what was sent before came first."""
        if slot.state == WORKING:
            self._end(slot, ABORTED)

    # The second phase, by anybody.

    def commit(self, request: tuple[Branch, LogServer, str]) -> Ending | None:
        branch, log, _ = request
        slot = self.slots[branch.xid.branch]
        if slot.log is not log:
            self.world.checker.touched(slot, log)
        if self._is_refused(slot, "COMMIT PREPARED"):
            return None
        if slot.state == PREPARED and self.full:
            self.world.count("S25 a COMMIT PREPARED finds the disk full and is tried again")
            return None
        if slot.state == PREPARED:
            if slot.came_back:
                self.world.count("S29 a branch that came back is committed again")
            self._end(slot, COMMITTED)
            return FINISHED
        if slot.writes and slot.state in (COMMITTED, ABORTED) and slot.timeline != self.timeline:
            return PROMOTED
        if slot.state == COMMITTED:
            if slot.writes:
                self.world.count("S24 COMMIT PREPARED is repeated after it committed")
            return FINISHED if branch.token or not slot.writes else HAZARD
        if slot.state == ABORTED:
            return ROLLED_BACK if slot.writes else FINISHED
        if slot.writes:
            return None
        self._end(slot, COMMITTED)
        return FINISHED

    def rollback(self, request: tuple[Branch, LogServer, str]) -> Ending | None:
        branch, log, manner = request
        slot = self.slots[branch.xid.branch]
        if slot.log is not log:
            self.world.checker.touched(slot, log)
        if manner is not SESSION and self._is_refused(slot, "ROLLBACK PREPARED"):
            return None
        if slot.state == PREPARED and slot.held:
            self.world.count("S22 a rollback finds its branch busy and is tried again")
            return None
        if slot.state == PREPARED or (slot.state == WORKING and manner is SESSION):
            self._end(slot, ABORTED)
        elif slot.state == WORKING and manner is DOUBT:
            # The name is unknown while its PREPARE may still land: its xid8 is in progress.
            self.world.count("a rollback waits for a PREPARE under way")
            return None
        slot.rolled_back_at = self.world.now
        return FINISHED

    def _is_refused(self, slot: Slot, what: str) -> bool:
        if self.locked_out and slot.state == PREPARED:
            self.world.count(f"S33 a {what} is refused to the role and is tried again")
        return self.locked_out

    def recover(self, log: LogServer) -> list[Branch] | None:
        """The prepared branches that carry the log's id."""
        if self.locked_out:
            return None
        found = [slot.full for slot in self.prepared.values() if slot.log is log]
        if len(found) < len(self.prepared):
            self.world.count("S18 a sweep passes over another log's branches")
        return found

    # What happens to it.

    def restart(self) -> None:
        if self.prepared:
            self.world.count("S26 a resource restarts with prepared branches")
        if any(slot.truth.outcome is Verdict.COMMIT for slot in self.prepared.values()):
            self.world.count("S26 a resource restarts in the second phase")
        self.release_held(canceled=True)
        for slot in self.slots.values():
            if slot.state == WORKING and not slot.last:
                self._end(slot, ABORTED)

    def person_rolls_back(self) -> None:
        """Somebody runs ROLLBACK PREPARED by hand on the oldest prepared branch."""
        slot = next((s for s in self.prepared.values() if not s.shown), None)
        if slot is None:
            return
        slot.by_person = True
        self.world.count("S31 a person rolls a branch back by hand")
        self._end(slot, ABORTED)

    def lose(self, slot: Slot) -> None:
        """The branch was prepared, or more, and is not known here any more."""
        self.prepared.pop(slot.id, None)
        promised = slot.state == PREPARED
        self.world.checker.undone(slot)
        slot.state, slot.lost, slot.ended_at = ABORTED, True, self.world.now
        if promised and slot.truth.outcome is Verdict.COMMIT and slot.named_in(slot.truth.decision):
            self.world.count("S28 a promised branch of a commit is lost")
        self.world.note(f"{self.name}: lost {slot}")

    def bring_back(self, slot: Slot) -> None:
        """The branch had ended, and is prepared again."""
        self.world.checker.undone(slot)
        self.world.count("S29 a branch that had ended is prepared again")
        slot.state, slot.came_back = PREPARED, True
        self.prepared[slot.id] = slot
        self.world.note(f"{self.name}: back again {slot}")

    def _end(self, slot: Slot, state: int) -> None:
        self.prepared.pop(slot.id, None)
        slot.held = False
        slot.state = state
        slot.ended_at = self.world.now
        if self.world.trace is not None:
            self.world.note(f"{self.name}: {slot}")
        self.world.checker.branch_ended(slot)


class LastResource(Resource):
    """One that cannot prepare: asked to end, it answers how it ended, for ever the same."""

    def prepare(self, slot: Slot) -> Vote:
        if slot.state != WORKING:
            return VOTED_GONE
        slot.full = Branch(slot.branch.xid, slot.branch.participant, TOKEN)
        return VOTED_PREPARED

    def ask(self, request: tuple[Branch, bool]) -> Verdict:
        branch, commit = request
        slot = self.slots[branch.xid.branch]
        if slot.state == WORKING:
            self._end(slot, COMMITTED if commit else ABORTED)
        return Verdict.COMMIT if slot.state == COMMITTED else Verdict.ABORT

    def disconnect(self, slot: Slot) -> None:
        """An open transaction of a dead producer stays open until somebody asks."""

    def rollback(self, request: tuple[Branch, LogServer, str]) -> Ending | None:
        slot = self.slots[request[0].xid.branch]
        if slot.state == WORKING:
            self._end(slot, ABORTED)
        return FINISHED

    def expire(self) -> None:
        """The transaction timeout of the resource: what was left open is aborted."""
        for slot in self.slots.values():
            if slot.state == WORKING:
                self._end(slot, ABORTED)
