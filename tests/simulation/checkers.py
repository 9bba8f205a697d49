"""The invariants, by the names of docs/design.md section 3. They know properties, never mechanisms.

The world reports what really happened: a branch ended at its resource, the register took a value,
a record was deleted, a client was told something, a status was read. Nothing here looks at a
coordinator. A broken property raises `Violation` with its name at the moment it is broken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from coordinator.log.base import Answer, Proposal, Record, Stands
from coordinator.model import Decision, Outcome, Status, TransactionId, Verdict

if TYPE_CHECKING:
    from tests.simulation.resources import Slot

WORKING, PREPARED, COMMITTED, ABORTED = range(4)
STATES = ("working", "prepared", "committed", "aborted")

INVARIANTS = {
    "I1": "agreement: no branch commits while another one aborts, and none commits unpromised",
    "I2": "validity: a commit is recorded only when every enlisted branch durably promised it",
    "I3": "irrevocability: the register changes once, from empty to decided",
    "I4": "truthful acknowledgement: what a client was told holds for ever",
    "I5": "decision before phase two: no branch is ended before the decision allows it",
    "I6": "completion: after healing everything ends, and the log empties below the horizon",
    "I7": "no orphan: no branch of ours stays prepared, unless it is shown to a person for cause",
    "I8": "a branch of another log is never touched",
    "I9": "a record goes only when its branches have ended and its id can never be proposed again",
    "I11": "a status never goes backwards, but for forgotten",
    "money": "every transaction moves all of its money or none",
    "keys": "an idempotency key commits once, one attempt at a time",
    "person": "what a person ended against a decision is shown",
    "table": "the protocol table has no hole: every event that can happen is legal",
}


class Violation(Exception):
    """An invariant does not hold. `name` is one of `INVARIANTS`."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name} ({INVARIANTS[name]}): {detail}")
        self.name = name
        self.detail = detail


class Truth:
    """What really happened to one transaction, seen from outside."""

    __slots__ = (
        "aborted",
        "answer",
        "committed",
        "decision",
        "deleted",
        "heuristic_told",
        "id",
        "key",
        "log",
        "lost",
        "money",
        "one_phase",
        "person",
        "quarantined",
        "restored",
        "slots",
        "status",
        "told",
        "undone",
    )

    def __init__(self, transaction: TransactionId, log: object) -> None:
        self.id = transaction
        self.log = log
        self.slots: list[Slot] = []
        self.decision: Decision | None = None
        self.answer: Verdict | None = None
        self.deleted = False
        self.committed = 0
        self.aborted = 0
        self.money = 0
        self.one_phase = False
        self.person = False
        self.undone = False
        self.lost = False
        self.restored = False
        self.quarantined = 0
        self.told: Outcome | None = None
        self.heuristic_told = False
        self.status = Status.UNDECIDED
        self.key: str | None = None

    @property
    def outcome(self) -> Verdict | None:
        """What binds the branches: the decision, or the last resource's recorded answer."""
        if self.decision is None:
            return None
        if self.decision.verdict is Verdict.DELEGATED:
            return self.answer
        return self.decision.verdict

    @property
    def disturbed(self) -> bool:
        """A person ended a branch, or its resource has undone what it had answered."""
        return self.person or self.undone


_RANKS = {Status.UNDECIDED: 0, Status.ABORTED: 1, Status.COMMITTED: 1, Status.FORGOTTEN: 2}


class Checker:
    """Watches one world."""

    def __init__(self) -> None:
        self.truths: dict[TransactionId, Truth] = {}
        self.keys: dict[str, list[Truth]] = {}

    # Branches.

    def enlisted(self, slot: Slot) -> None:
        """The client's transaction now rests on this branch."""
        slot.accepted = True
        if slot.state == ABORTED and slot.writes:
            slot.truth.aborted += 1
            slot.truth.person = slot.truth.person or slot.by_person

    def branch_ended(self, slot: Slot) -> None:
        truth = slot.truth
        if slot.state == ABORTED:
            self._branch_aborted(slot, truth)
        elif slot.writes:
            self._branch_committed(slot, truth)
        else:
            self._read_only_committed(slot, truth)

    def _branch_aborted(self, slot: Slot, truth: Truth) -> None:
        if not slot.accepted or not slot.writes:
            return
        truth.aborted += 1
        if slot.by_person:
            truth.person = True
            return
        if truth.committed and not truth.disturbed:
            raise Violation("I1", f"{slot} aborted, but {truth.committed} of its kind committed")
        if truth.told is Outcome.COMMITTED and not truth.disturbed:
            raise Violation("I4", f"{slot} aborted after the client was told committed")
        delegated = truth.decision is not None and truth.decision.last_resource is not None
        if delegated and truth.answer is None and slot.named_in(truth.decision):
            raise Violation("I5", f"{slot} ended before the last resource's answer was recorded")

    def _branch_committed(self, slot: Slot, truth: Truth) -> None:
        truth.committed += 1
        truth.money += slot.delta
        if not slot.accepted:
            raise Violation("I1", f"{slot} committed, but no client's transaction rests on it")
        if truth.aborted and not truth.disturbed:
            raise Violation("I1", f"{slot} committed, but {truth.aborted} of its kind aborted")
        if truth.told is Outcome.ABORTED:
            raise Violation("I4", f"{slot} committed after the client was told aborted")
        if slot.last:
            if truth.decision is None or truth.decision.last_resource is None:
                raise Violation("I5", f"{slot} committed, but no delegation stands")
        elif slot.one_phase:
            truth.one_phase = True
            if truth.decision is not None:
                raise Violation("I5", f"{slot} committed in one phase beside a record")
        elif truth.outcome is not Verdict.COMMIT:
            raise Violation("I5", f"{slot} committed, but the register holds {truth.decision}")
        if truth.key is not None and not truth.lost:
            self._key_committed(truth)

    def _read_only_committed(self, slot: Slot, truth: Truth) -> None:
        if truth.outcome is Verdict.COMMIT or truth.one_phase:
            return
        if truth.outcome is Verdict.ABORT:
            raise Violation("I1", f"{slot} sent what it had to say, but the transaction aborted")
        if any(each.writes and each.accepted for each in truth.slots):
            raise Violation("I5", f"{slot} sent what it had to say before the decision")

    def _key_committed(self, truth: Truth) -> None:
        for other in self.keys.get(truth.key or "", ()):
            if other is not truth and other.committed:
                raise Violation("keys", f"{truth.key} committed by {other.id} and by {truth.id}")

    def attempt_begins(self, key: str, truth: Truth) -> None:
        """A further attempt under a key is about to prepare: the former ones can never commit."""
        attempts = self.keys.setdefault(key, [])
        truth.key = key
        attempts.append(truth)
        horizon = truth.log.horizon  # type: ignore[attr-defined]
        if truth.outcome is Verdict.ABORT or truth.id < horizon:
            return  # it was held up for so long that it can never commit
        for former in attempts[:-1]:
            if former.outcome is Verdict.ABORT:
                continue
            if former.deleted or former.id < horizon:
                if not former.committed:
                    continue
                raise Violation("keys", f"{truth.id} begins, but {former.id} committed {key}")
            raise Violation("keys", f"{truth.id} begins while {former.id} may still commit {key}")

    def touched(self, slot: Slot, log: object) -> None:
        raise Violation("I8", f"{slot} was touched for another log: {log}")

    # The register.

    def proposed(self, proposal: Proposal, answer: Answer) -> None:
        truth = self.truths.get(proposal.transaction)
        if truth is None or not isinstance(answer, Stands):
            return
        stands = answer.record.decision
        if truth.deleted:
            raise Violation("I9", f"{truth.id} was decided again after its record was deleted")
        if truth.decision is None:
            truth.decision = stands
            self._decided(truth, stands)
        elif truth.decision != stands:
            raise Violation("I3", f"{truth.id} held {truth.decision}, now {stands}")

    def _decided(self, truth: Truth, decision: Decision) -> None:
        if truth.one_phase:
            raise Violation("I1", f"{truth.id} committed in one phase, its register says otherwise")
        if decision.verdict is Verdict.ABORT:
            if truth.told is Outcome.COMMITTED:
                raise Violation("I4", f"{truth.id}: told committed, an abort was recorded")
            return
        if truth.told is Outcome.ABORTED:
            raise Violation("I4", f"{truth.id}: told aborted, {decision.verdict} was recorded")
        named = {branch.id for branch in decision.branches}
        for slot in truth.slots:
            if not slot.accepted or slot.last or slot.by_person or slot.lost:
                continue
            if slot.writes and (slot.state != PREPARED or slot.id not in named):
                raise Violation("I2", f"a commit was recorded while {slot} had not promised it")
            if not slot.writes and slot.refuses:
                raise Violation("I2", f"a commit was recorded although {slot} voted no")
        if truth.key is not None:
            for other in self.keys[truth.key]:
                if other is not truth and other.outcome is Verdict.COMMIT:
                    raise Violation("keys", f"{other.id} and {truth.id} recorded {truth.key}")

    def answered(self, transaction: TransactionId, answer: Verdict | None) -> None:
        truth = self.truths.get(transaction)
        if truth is None or answer is None:
            return
        if truth.answer not in (None, answer):
            raise Violation("I3", f"{truth.id}: the last resource's answer changed to {answer}")
        truth.answer = answer
        last = next((slot for slot in truth.slots if slot.last and slot.accepted), None)
        if last is not None and (last.state == COMMITTED) != (answer is Verdict.COMMIT):
            raise Violation("I1", f"the recorded answer {answer} differs from {last}")

    def deleted(self, records: Iterable[Record], horizon: TransactionId) -> None:
        for record in records:
            truth = self.truths.get(record.transaction)
            if truth is None:
                continue
            truth.deleted = True
            if record.transaction >= horizon:
                raise Violation("I9", f"{truth.id} was deleted above the horizon")
            if truth.decision and truth.decision.last_resource and truth.answer is None:
                raise Violation("I9", f"{truth.id} was deleted before its delegation was answered")
            if truth.outcome is not Verdict.COMMIT or truth.decision is None:
                continue
            named = {branch.id for branch in truth.decision.branches}
            for slot in truth.slots:
                undone = slot.by_person or slot.lost or slot.came_back
                if slot.id in named and slot.state != COMMITTED and not undone:
                    raise Violation("I9", f"{truth.id} was deleted while {slot} had not ended")

    # What people are told.

    def told(self, truth: Truth, outcome: Outcome, *, heuristic: bool = False) -> None:
        truth.heuristic_told = truth.heuristic_told or heuristic
        if outcome is Outcome.UNKNOWN:
            truth.told = truth.told or outcome
            return
        if truth.told not in (None, Outcome.UNKNOWN, outcome):
            raise Violation("I4", f"{truth.id}: told {truth.told}, then {outcome}")
        truth.told = outcome
        if outcome is Outcome.COMMITTED:
            if truth.outcome is Verdict.ABORT or (truth.aborted and not truth.disturbed):
                raise Violation("I4", f"{truth.id}: told committed, but it aborted")
            wrote = any(slot.accepted and slot.writes for slot in truth.slots)
            if wrote and truth.outcome is not Verdict.COMMIT and not truth.one_phase:
                raise Violation("I4", f"{truth.id}: told committed before anything stood")
        elif truth.committed or truth.outcome is Verdict.COMMIT:
            raise Violation("I4", f"{truth.id}: told aborted, but it committed")

    def status_read(self, truth: Truth, status: Status) -> None:
        before, truth.status = truth.status, status
        if _RANKS[status] < _RANKS[before] or (
            _RANKS[status] == _RANKS[before] == 1 and status is not before
        ):
            raise Violation("I11", f"{truth.id} was {before}, now {status}")
        if truth.told is Outcome.COMMITTED and status is Status.ABORTED:
            raise Violation("I4", f"{truth.id}: told committed, its status is aborted")
        if truth.told is Outcome.ABORTED and status is Status.COMMITTED:
            raise Violation("I4", f"{truth.id}: told aborted, its status is committed")

    def shown(self, slot: Slot) -> None:
        """Shown to a person as ended against the decision: somebody must have meddled."""
        slot.shown = True
        promoted = slot.timeline != slot.resource.timeline
        if not slot.truth.disturbed and not promoted:
            raise Violation("person", f"{slot} is shown to a person, but nobody meddled")

    def quarantined(self, slot: Slot, refused_at: float, need: str) -> None:
        """Shown to a person as prepared and forgotten. `need` is why the world made it so."""
        slot.truth.quarantined += 1
        slot.shown = True
        if slot.state != PREPARED and slot.ended_at < refused_at:
            raise Violation("I7", f"{slot} was quarantined although it had ended before")
        excused = slot.came_back or slot.truth.lost
        if slot.accepted and slot.truth.committed and not excused:
            raise Violation("I9", f"{slot} was forgotten although its transaction committed")
        if slot.state == PREPARED and not need:
            raise Violation("I7", f"{slot} was quarantined without need")

    # What servers undo, and what is lost with a log. From then on an outcome may be heuristic, but
    # it is never silent, and what was lost is never decided again.

    def undone(self, slot: Slot) -> None:
        """A resource no longer knows how it ended a branch, or that it had prepared it."""
        truth = slot.truth
        truth.undone = True
        if slot.state == COMMITTED and slot.writes:
            slot.was_committed = True
            truth.committed -= 1
            truth.money -= slot.delta
        elif slot.state == ABORTED and slot.writes and slot.accepted:
            truth.aborted -= 1

    def restored(
        self,
        log: object,
        known: Mapping[TransactionId, Record],
        backup: Mapping[TransactionId, Record],
    ) -> None:
        """A log was replaced by a backup: what was recorded since is lost, and claims with it."""
        for truth in self._of(log):
            truth.restored = True
            if truth.id in known and truth.id not in backup:
                truth.lost = True
            elif known.get(truth.id) != backup.get(truth.id):  # it is as it was
                truth.deleted, truth.status = False, Status.UNDECIDED

    def wiped(self, log: object) -> None:
        for truth in self._of(log):
            truth.lost = True

    def _of(self, log: object) -> list[Truth]:
        self.keys = {
            key: [attempt for attempt in attempts if attempt.log is not log]
            for key, attempts in self.keys.items()
        }
        return [truth for truth in self.truths.values() if truth.log is log]

    # The end of the world.

    def at_the_end(self, parked: Collection[TransactionId] = ()) -> None:
        """After healing: everything but what is parked has ended, and the sums are right."""
        for truth in self.truths.values():
            if truth.id in parked:
                continue
            for slot in truth.slots:
                if slot.state == PREPARED and not slot.shown and not slot.log.lost:
                    raise Violation("I7", f"{slot} is still prepared")
                if slot.state == WORKING and not slot.last and slot.accepted:
                    raise Violation("I6", f"{slot} still works")
            if not truth.lost:
                self._sums(truth)

    def _sums(self, truth: Truth) -> None:
        if truth.disturbed:
            self._nothing_is_silent(truth)
            return
        if truth.money != 0:
            raise Violation("money", f"{truth.id} moved {truth.money}: {truth.slots}")
        if truth.restored and any(slot.state == PREPARED for slot in truth.slots):
            return  # it was undecided, and is quarantined
        writers = [s for s in truth.slots if s.accepted and s.writes]
        if truth.told is Outcome.COMMITTED and any(s.state != COMMITTED for s in writers):
            raise Violation("I4", f"{truth.id}: told committed, but {writers}")
        if truth.outcome is Verdict.COMMIT and any(s.state != COMMITTED for s in writers):
            raise Violation("I6", f"{truth.id} is decided commit, but {writers}")

    def _nothing_is_silent(self, truth: Truth) -> None:
        """What was ended or lost against a commit is shown.

        But for what a resource lost after it had acknowledged the end: nobody asks it again.
        """
        if truth.outcome is not Verdict.COMMIT:
            return
        for slot in truth.slots:
            against = slot.named_in(truth.decision) and slot.state == ABORTED
            if against and not slot.shown and not slot.was_committed:
                raise Violation("person", f"{slot} ended against the decision and is not shown")
