"""One world of the search as a value, and every way in which it can go on.

Coordinators, sweepers, the log and the branches are the real code's states by number; requests are
on their way between them until they arrive, in any order, or get lost. An original repeats what was
not answered, a sweep gives it up. What a process has sent outlives it: it arrives some time, or
never.

An answer is heard when its request takes effect, or is lost. That leaves out nothing: who hears it
late only acts late, and all that it then sends may be late itself; whatever else it does before it
hears it could have done before the effect; and who crashes before it hears it might as well crash
after, with all lost that it sent. `test_exhaustive` compares the two on small worlds.
"""

from __future__ import annotations

from typing import Any

from coordinator.events import Action, Enlisted, Event, Forget, Published
from coordinator.log.base import Attempt, Mark, Proposal
from coordinator.model import BranchId, Decision, Outcome, Verdict, id_floor
from coordinator.protocol import Phase
from tests.exhaustive.bounds import (
    CREATED_MS,
    IDS,
    KEY,
    OTHER_ID,
    Bounds,
    Parts,
)
from tests.exhaustive.machines import Cores, Logs
from tests.exhaustive.state import (
    ABORTED,
    ABSENT,
    CALLS,
    COMMITTED,
    DONE,
    LEFT,
    NOBODY,
    NOT_TOLD,
    PREPARED,
    QUARANTINED,
    READING,
    STATES,
    TOLD_ABORTED,
    TOLD_COMMITTED,
    WORKING,
    YES,
    Draft,
    Mail,
    State,
)
from tests.simulation.checkers import Violation


class World:
    """The rules by which states follow each other. Raises `Violation` where an invariant breaks."""

    def __init__(self, bounds: Bounds, parts: Parts = Parts()) -> None:  # noqa: B008
        self.bounds = bounds
        self.parts = parts
        self.transactions = bounds.transactions
        self.places = bounds.places
        self.branches = tuple(place.branch for place in bounds.places)
        self.place_of = {branch.id: n for n, branch in enumerate(self.branches)}
        self.cores = Cores()
        self.logs = Logs(parts.register, self.transactions)
        self.mails: list[Mail] = []
        self.waiting: list[int] = []
        """For each mail who waits for its answer; NOBODY also where it is a mark."""
        self._mail_numbers: dict[Mail, int] = {}
        self.originals = len(bounds.drives)

    # Beginnings.

    def start(self) -> State:
        bounds = self.bounds
        register = self.logs.new(CREATED_MS)
        for resource in dict.fromkeys(branch.participant for branch in self.branches):
            register.register(resource, resource, CREATED_MS)
        if bounds.keyed:
            register.name_attempt(KEY, self.attempt(0), None)
        if bounds.claimed:
            register.propose(Proposal(OTHER_ID, Decision(Verdict.COMMIT), (KEY,)))
        initial = {"remote": ABSENT, "handed": PREPARED}
        return State(
            originals=tuple(
                CALLS if bounds.keyed and number else self.new_core(transaction)
                for number, transaction in enumerate(bounds.drives)
            ),
            sweepers=(0,) * bounds.sweepers,
            log=self.logs.number(register),
            branches=tuple(
                ABSENT if bounds.keyed and place.transaction else initial.get(place.kind, WORKING)
                for place in self.places
            ),
            mail=(),
            told=(NOT_TOLD,) * len(self.transactions),
            crashes=(
                *(bounds.crashes for _ in bounds.drives),
                *(bounds.sweep_crashes for _ in range(bounds.sweepers)),
            ),
            faults=bounds.faults,
            requests=0,
            answered=-1,
            late=False,
            meddled=False,
        )

    def attempt(self, transaction: int) -> Attempt:
        return Attempt(IDS[transaction], 1000, self.branches[0].xid.member)

    def new_core(self, transaction: int) -> int:
        """A coordinator's core with its branches enlisted, before anything is asked for."""
        handed = any(place.kind == "handed" for place in self.places)
        claims = (KEY,) if self.bounds.keyed or self.bounds.claimed else ()
        number = self.cores.number(
            self.parts.transaction(IDS[transaction], claims=claims, handed=handed)
        )
        if self.bounds.meddles or any(place.kind == "remote" for place in self.places):
            number, _ = self.cores.step(number, Published())
        for place, branch in zip(self.places, self.branches, strict=True):
            if place.transaction == transaction and place.kind != "remote":
                vote = YES if place.kind == "handed" else None
                one_phase, last = place.kind == "one phase", place.kind == "last resource"
                event = Enlisted(branch, vote, one_phase, last)
                number, _ = self.cores.step(number, event)
        return number

    # Mail.

    def mail_number(self, mail: Mail) -> int:
        number = self._mail_numbers.setdefault(mail, len(self.mails))
        if number == len(self.mails):
            self.mails.append(mail)
            self.waiting.append(NOBODY if isinstance(mail.what, Mark) else mail.sender)
        return number

    def send(self, draft: Draft, mail: Mail) -> None:
        number = self.mail_number(mail)
        if number not in draft.mail or not isinstance(mail.what, Mark):
            draft.mail.append(number)  # to mark a branch twice changes nothing

    def feed(self, draft: Draft, original: int, event: Event) -> None:
        """Give an original an event, send what it then asks for, and note what its client hears."""
        core, actions = self.cores.step(draft.originals[original], event)
        draft.originals[original] = core
        transaction = self.bounds.drives[original]
        self.send_all(draft, original, transaction, actions)
        outcome = self.cores.cores[core].outcome
        if outcome is Outcome.COMMITTED:
            self.tell(draft, transaction, TOLD_COMMITTED)
        elif outcome is Outcome.ABORTED:
            self.tell(draft, transaction, TOLD_ABORTED)
        self.rest(draft, original)

    def send_all(
        self, draft: Draft, sender: int, transaction: int, actions: tuple[Action, ...]
    ) -> None:
        for action in actions:
            what: Any = action
            if isinstance(action, Forget):
                what = Mark(IDS[transaction], action.branch)
            self.send(draft, Mail(sender, transaction, what))

    def waits(self, draft: Draft, sender: int) -> bool:
        """Something that it asked for is not answered yet; nobody waits for a mark."""
        waiting = self.waiting
        return any(waiting[number] == sender for number in draft.mail)

    def rest(self, draft: Draft, original: int) -> None:
        """A driver that has nothing left to do is dropped by its engine."""
        phase = self.cores.cores[draft.originals[original]].phase
        if phase in (Phase.ENDED, Phase.UNKNOWN) and not self.waits(draft, original):
            draft.originals[original] = DONE

    # What must hold, whoever does it.

    def tell(self, draft: Draft, transaction: int, told: int) -> None:
        before = draft.told[transaction]
        if before == told:
            return
        if before != NOT_TOLD:
            raise Violation("I4", f"transaction {transaction + 1} is told two outcomes")
        draft.told[transaction] = told
        states = self.writers(draft, transaction)
        status = self.logs.views[draft.log].statuses[transaction]
        if told == TOLD_ABORTED and (COMMITTED in states or status == "commit"):
            raise Violation("I4", "told aborted, but the commit stands")
        if told == TOLD_COMMITTED and status != "commit":
            alone = all(place.kind == "one phase" for place in self.places)
            if any(state not in (COMMITTED, LEFT, READING) for state in states):
                raise Violation("I4", f"told committed, but {status} and {states}")
            if not alone and status == "abort":
                raise Violation("I4", "told committed, but an abort stands")

    def writers(self, draft: Draft, transaction: int) -> list[int]:
        """The states of the branches that the client's transaction rests on."""
        return [
            state
            for number, state in enumerate(draft.branches)
            if self.places[number].transaction == transaction and self.accepted(draft, number)
        ]

    def accepted(self, draft: Draft, place: int) -> bool:
        """The client's transaction rests on this branch: its coordinator has enlisted it."""
        if self.places[place].kind != "remote":
            return True
        return draft.answered == place

    def change_log(self, draft: Draft, name: Any, operation: Any) -> Any:
        """One atomic step of the log, and what must hold of any such step."""
        before = draft.log
        draft.log, answer = self.logs.step(before, name, operation)
        if draft.log != before:
            self._check_log(draft, before)
        return answer

    def _check_log(self, draft: Draft, before: int) -> None:
        old, new = self.logs.views[before], self.logs.views[draft.log]
        for transaction, (was, now) in enumerate(zip(old.statuses, new.statuses, strict=True)):
            former, record = old.records[transaction], new.records[transaction]
            if former is not None and record is None:
                self._check_deletion(draft, transaction, old, new)
            if former is not None and record is not None and former.decision != record.decision:
                raise Violation("I3", f"{former.decision.verdict}, then {record.decision.verdict}")
            if was != now and was == "forgotten":
                raise Violation("I9", f"{now} was recorded although the id was forgotten")
            if was != now and was in ("commit", "abort") and now != "forgotten":
                raise Violation("I11", f"the status was {was}, now it is {now}")
            if former is None and record is not None:
                self._check_decision(draft, transaction)
            if was != now:
                self._check_told(draft, transaction, now)

    def _check_deletion(self, draft: Draft, transaction: int, old: Any, new: Any) -> None:
        if new.statuses[transaction] != "forgotten":
            raise Violation("I9", "a record was deleted above the horizon")
        if old.statuses[transaction] == "undecided":
            raise Violation("I9", "a delegation was deleted before it was answered")
        if old.statuses[transaction] == "commit":
            for branch in old.named[transaction]:
                place = self.place_of[BranchId(branch)]
                if draft.branches[place] != COMMITTED:
                    what = f"{self.places[place].name} is {STATES[draft.branches[place]]}"
                    raise Violation("I9", f"a commit was deleted while {what}")

    def _check_decision(self, draft: Draft, transaction: int) -> None:
        record = self.logs.views[draft.log].records[transaction]
        assert record is not None
        if record.decision.verdict is Verdict.ABORT:
            if COMMITTED in self.writers(draft, transaction):
                raise Violation("I1", "an abort was recorded, but a branch has committed")
            return
        named = {branch.id for branch in record.decision.named}
        for number, state in enumerate(draft.branches):
            place = self.places[number]
            if place.transaction != transaction or not self.accepted(draft, number):
                continue
            if place.kind == "last resource" or state in (READING, LEFT):
                continue
            if state not in (PREPARED, QUARANTINED) or self.branches[number].id not in named:
                raise Violation("I2", f"a commit was recorded, but {place.name} is {STATES[state]}")
        if self.bounds.keyed and all(s == "commit" for s in self.logs.views[draft.log].statuses):
            raise Violation("keys", "both attempts under one key are recorded as committed")

    def _check_told(self, draft: Draft, transaction: int, now: str) -> None:
        told = draft.told[transaction]
        if told == TOLD_ABORTED and now == "commit":
            raise Violation("I4", "told aborted, and then a commit was recorded")
        if told == TOLD_COMMITTED and now == "abort":
            raise Violation("I4", "told committed, and then an abort was recorded")

    def end(self, draft: Draft, place: int, state: int, *, alone: bool = False) -> None:
        """A branch really ends, `alone` in one phase, and what must hold then."""
        draft.branches[place] = state
        transaction, name = self.places[place].transaction, self.places[place].name
        states = self.writers(draft, transaction)
        told = draft.told[transaction]
        if state == ABORTED:
            if not self.accepted(draft, place):
                return
            if COMMITTED in states:
                raise Violation("I1", f"{name} aborts, but another branch has committed")
            if told == TOLD_COMMITTED:
                raise Violation("I4", f"{name} aborts, but committed was told")
            return
        if not alone:
            self.check_commit(draft, place)
        elif self.logs.views[draft.log].records[transaction] is not None:
            raise Violation("I5", f"{name} commits in one phase beside a record")
        if not self.accepted(draft, place):
            raise Violation("I1", f"{name} commits, but no client's transaction rests on it")
        if ABORTED in states:
            raise Violation("I1", f"{name} commits, but another branch has aborted")
        if told == TOLD_ABORTED:
            raise Violation("I4", f"{name} commits, but aborted was told")
        if self.bounds.keyed and list(draft.branches).count(COMMITTED) > 1:
            raise Violation("keys", "both attempts under one key have committed")

    def check_commit(self, draft: Draft, place: int) -> None:
        """I5: the decision stands before a branch commits."""
        transaction, kind = self.places[place].transaction, self.places[place].kind
        view, name = self.logs.views[draft.log], self.places[place].name
        record = view.records[transaction]
        if kind == "last resource":
            if record is None or record.decision.last_resource is None:
                raise Violation("I5", f"{name} commits, but no delegation stands")
        elif view.statuses[transaction] != "commit":
            raise Violation("I5", f"{name} commits, but the log says {view.statuses[transaction]}")

    def leave(self, draft: Draft, place: int, *, commits: bool) -> None:
        """A branch that only read ends; committing, it sends what it had to say."""
        draft.branches[place] = LEFT
        transaction, name = self.places[place].transaction, self.places[place].name
        status = self.logs.views[draft.log].statuses[transaction]
        if not commits or status in ("commit", "forgotten"):
            return
        if status == "abort":
            raise Violation("I1", f"{name} sends what it had to say, but the transaction aborted")
        if any(state not in (READING, LEFT) for state in self.writers(draft, transaction)):
            raise Violation("I5", f"{name} sends what it had to say before the decision")

    def horizon_above(self, transaction: int) -> Any:
        return id_floor(int(IDS[transaction][:8] + IDS[transaction][9:13], 16) + 1)
