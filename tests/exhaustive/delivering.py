"""What servers do with a request, what its sender makes of the answer, or of its silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coordinator.events import (
    Answered,
    AskLastResource,
    ClaimStands,
    Commit,
    CommitOnePhase,
    Decide,
    Decided,
    Enlisted,
    Event,
    Finished,
    Prepare,
    RecordAnswer,
    Refused,
    Report,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.log.base import BelowHorizon, ClaimHeld, KeyState, Mark, Proposal, Stands
from coordinator.model import ABORT, Branch, TransactionId, Verdict, Vote, VoteKind
from coordinator.protocol import Phase
from tests.exhaustive.bounds import IDS, KEY
from tests.exhaustive.state import (
    ABORTED,
    ABSENT,
    COMMITTED,
    CUT,
    DONE,
    NOBODY,
    PREPARED,
    QUARANTINED,
    READING,
    TOLD_COMMITTED,
    WORKING,
    YES,
    Became,
    Draft,
    Mail,
    Name,
    ReadKey,
    Serve,
    Settle,
    Slow,
    State,
)
from tests.exhaustive.world import World
from tests.simulation.checkers import Violation

READ = Vote(VoteKind.READ_ONLY)
NO = Vote(VoteKind.ABORTED, reason="a constraint failed")
SILENT = Vote(VoteKind.ABORTED, reason="did not answer prepare", retryable=True)
COMMIT_ANSWER, ABORT_ANSWER = Answered(Verdict.COMMIT), Answered(Verdict.ABORT, "no", True)
UNENDED = (WORKING, CUT)


ON_SESSION = (Prepare, CommitOnePhase)
"""What travels on a session of its own, so that it is never sent again and never doubled."""

ONCE = (*ON_SESSION, Became, Settle, Name, ReadKey, Slow)

Served = Iterator[tuple[Draft, Any]]
"""What a server did, and its answer."""


_SERVE = {
    Prepare: "prepare",
    Commit: "commit",
    Rollback: "roll_back",
    Decide: "decide",
    RecordAnswer: "record_answer",
    AskLastResource: "ask",
    CommitOnePhase: "commit_one_phase",
    Became: "what_became",
    Mark: "mark",
    Report: "report",
    Serve: "serve",
    Settle: "settle",
    Name: "name",
    ReadKey: "read_key",
}


class Deliveries(World):
    """The servers' side of the world, and the senders' ears."""

    def arrives(self, state: State, number: int) -> Iterator[tuple[bool, Draft]]:
        """Every way in which a request may take effect; True with each whose answer is lost.

        There is none while the server cannot tell: the request is then sent again.
        """
        mail = self.mails[number]
        draft = Draft(state)
        draft.mail.remove(number)
        if isinstance(mail.what, Slow):
            self.hear(draft, mail._replace(what=mail.what.request), mail.what.answer)
            yield False, draft
            return
        for served, answer in getattr(self, _SERVE[type(mail.what)])(draft, mail):
            if mail.sender == NOBODY or answer is None:
                yield False, served
                continue
            if self.bounds.slow_answers:
                self.send(served, mail._replace(what=Slow(mail.what, answer)))
                yield False, served
                continue
            if state.faults:
                unheard = served.twin()
                unheard.faults -= 1
                self.miss(unheard, mail)
                yield True, unheard
            self.hear(served, mail, answer)
            yield False, served

    # Requests. Each takes effect in one step.

    def place(self, draft: Draft, branch: Branch) -> int:
        """Where the branch of that name is."""
        return self.place_of[branch.id]

    def prepare(self, draft: Draft, mail: Mail) -> Served:
        place = self.place(draft, mail.what.branch)
        branch = mail.what.branch.id
        state = draft.branches[place]
        if self.places[place].kind == "last resource" and state == WORKING:
            yield draft, Voted(branch, YES)
            return
        if state not in UNENDED:
            yield draft, Voted(branch, NO)
            return
        if state == WORKING:
            refusing = draft.twin()
            self.end(refusing, place, ABORTED)
            yield refusing, Voted(branch, NO)
            if self.bounds.reads:
                reading = draft.twin()
                reading.branches[place] = READING
                yield reading, Voted(branch, READ)
        draft.branches[place] = PREPARED
        yield draft, Voted(branch, YES)

    def commit(self, draft: Draft, mail: Mail) -> Served:
        place = self.place(draft, mail.what.branch)
        state = draft.branches[place]
        if state == READING:
            self.leave(draft, place, commits=True)
        elif state in (PREPARED, QUARANTINED):
            self.end(draft, place, COMMITTED)
        elif state == COMMITTED and not mail.what.branch.token:
            raise Violation("person", "a stranger cannot tell what became of a branch: no token")
        elif state == ABORTED:
            raise Violation("I1", f"{self.places[place].name} was to commit, but it has aborted")
        elif state in UNENDED:
            self.check_commit(draft, place)
            return
        yield draft, Finished(mail.what.branch.id)

    def roll_back(self, draft: Draft, mail: Mail) -> Served:
        place = self.place(draft, mail.what.branch)
        if mail.what.branch.xid.log != self.branches[place].xid.log:
            raise Violation("I8", f"{self.places[place].name} of another log is rolled back")
        if mail.sender != NOBODY and self.is_own(mail.sender, place):
            self._cancel_prepare(draft, mail, place)
            if draft.branches[place] == CUT and not self.unknown_is_done():
                # The name is unknown while its PREPARE may still land: its xid8 is in progress.
                draft.mail.append(self.mail_number(mail))
                yield draft, None
                return
            if draft.branches[place] == WORKING:
                self.end(draft, place, ABORTED)
        if draft.branches[place] == READING:
            self.leave(draft, place, commits=False)
        elif draft.branches[place] in (PREPARED, QUARANTINED) or self._is_open_last(draft, place):
            self.end(draft, place, ABORTED)
        yield draft, Finished(mail.what.branch.id)

    def unknown_is_done(self) -> bool:
        return False

    def _is_open_last(self, draft: Draft, place: int) -> bool:
        return draft.branches[place] == WORKING and self.places[place].kind == "last resource"

    def is_own(self, sender: int, place: int) -> bool:
        """The sender has the session on which the branch works."""
        if sender >= self.originals or self.places[place].kind not in ("local", "one phase"):
            return False
        return self.bounds.drives[sender] == self.places[place].transaction

    def _cancel_prepare(self, draft: Draft, rollback: Mail, place: int) -> None:
        """Nobody waits for the PREPARE any more; what is still on its way is on a cut session."""
        for number in draft.mail:
            mail = self.mails[number]
            what = mail.what.request if isinstance(mail.what, Slow) else mail.what
            same = mail.sender == rollback.sender and isinstance(what, Prepare)
            if not same or what.branch.id != rollback.what.branch.id:
                continue
            draft.mail.remove(number)
            if what is mail.what:
                self.send(draft, mail._replace(sender=NOBODY))
                draft.branches[place] = CUT
            return

    def decide(self, draft: Draft, mail: Mail) -> Served:
        action: Decide = mail.what
        proposal = Proposal(
            IDS[mail.transaction], action.decision, action.claims, action.attachment
        )
        answer = self.change_log(draft, mail, lambda log: log.propose(proposal))
        yield draft, self.read_answer(answer)

    def read_answer(self, answer: Any) -> Event:
        if isinstance(answer, BelowHorizon):
            return Refused()
        if isinstance(answer, ClaimHeld):
            return ClaimStands(answer.claim, answer.holder)
        assert isinstance(answer, Stands)
        return Decided(answer.record.decision, answer.record.ended, answer.record.answer)

    def record_answer(self, draft: Draft, mail: Mail) -> Served:
        transaction, verdict = IDS[mail.transaction], mail.what.verdict
        stands = self.change_log(draft, mail, lambda log: log.record_answer(transaction, verdict))
        yield draft, Refused() if stands is None else Resolved(stands)

    def ask(self, draft: Draft, mail: Mail) -> Served:
        place = self.place(draft, mail.what.branch)
        if draft.branches[place] == WORKING:
            self.end(draft, place, COMMITTED if mail.what.commit else ABORTED)
        yield draft, COMMIT_ANSWER if draft.branches[place] == COMMITTED else ABORT_ANSWER

    def commit_one_phase(self, draft: Draft, mail: Mail) -> Served:
        place = self.place(draft, mail.what.branch)
        if draft.branches[place] in UNENDED:
            refusing = draft.twin()
            self.end(refusing, place, ABORTED)
            yield refusing, ABORT_ANSWER
            self.end(draft, place, COMMITTED, alone=True)
        yield draft, COMMIT_ANSWER if draft.branches[place] == COMMITTED else ABORT_ANSWER

    def what_became(self, draft: Draft, mail: Mail) -> Served:
        place = self.place(draft, mail.what.action.branch)
        if draft.branches[place] not in UNENDED:
            yield draft, COMMIT_ANSWER if draft.branches[place] == COMMITTED else ABORT_ANSWER

    def mark(self, draft: Draft, mail: Mail) -> Served:
        self.change_log(draft, mail.what, lambda log: log.finish([mail.what]))
        yield draft, None

    def report(self, draft: Draft, mail: Mail) -> Served:
        raise Violation("person", f"{mail.what} is shown to a person, but nobody meddled")

    # Called services, and callers under a key.

    def serve(self, draft: Draft, mail: Mail) -> Served:
        """A service draws a branch for every request that reaches it, and prepares it."""
        place = next((n for n, s in enumerate(draft.branches) if s == ABSENT), None)
        if place is None:
            yield draft, None
            return
        draft.branches[place] = PREPARED
        yield draft, Voted(self.branches[place].id, YES)

    def settle(self, draft: Draft, mail: Mail) -> Served:
        proposal = Proposal(mail.what.former, ABORT)
        yield draft, self.change_log(draft, mail.what, lambda log: log.propose(proposal))

    def name(self, draft: Draft, mail: Mail) -> Served:
        own, former = self.attempt(mail.transaction), mail.what.former
        yield (
            draft,
            self.change_log(draft, mail.what, lambda log: log.name_attempt(KEY, own, former)),
        )

    def read_key(self, draft: Draft, mail: Mail) -> Served:
        yield draft, self.change_log(draft, mail.what, lambda log: log.read_key(KEY))

    # Answers.

    def hear(self, draft: Draft, mail: Mail, answer: Any) -> None:
        if mail.sender >= self.originals:
            self.sweep_hears(draft, mail.sender - self.originals, answer)
        elif isinstance(mail.what, Serve):
            self.enlist_remote(draft, mail, answer)
        elif isinstance(mail.what, Settle | Name | ReadKey):
            self.caller_hears(draft, mail, answer)
        else:
            self.feed(draft, mail.sender, answer)

    def sweep_hears(self, draft: Draft, sweeper: int, event: Event) -> None:
        raise NotImplementedError

    def enlist_remote(self, draft: Draft, mail: Mail, answer: Voted) -> None:
        """Exactly one answer of a request is enlisted, and none of one that was given up."""
        core = draft.originals[mail.sender]
        active = core >= 0 and self.cores.cores[core].phase is Phase.ACTIVE
        if active and draft.answered < 0 and mail.what.request == draft.requests:
            draft.answered = self.place_of[answer.branch]
            self.feed(draft, mail.sender, Enlisted(self.branches[draft.answered], answer.vote))
        elif core >= 0:
            self.rest(draft, mail.sender)

    def caller_hears(self, draft: Draft, mail: Mail, answer: Any) -> None:
        former = mail.what.former
        if isinstance(mail.what, Name):
            self._named(draft, mail, answer)
        elif isinstance(answer, BelowHorizon):
            self.refused_caller(draft, mail)
        elif isinstance(answer, KeyState) and answer.holder is not None:
            self._key_has_committed(draft, mail, answer.holder)
        elif isinstance(answer, Stands) and answer.record.decision.verdict is not Verdict.ABORT:
            self._key_has_committed(draft, mail, answer.record.transaction)
        else:
            self.send(draft, mail._replace(what=Name(former)))

    def refused_caller(self, draft: Draft, mail: Mail) -> None:
        self.send(draft, mail._replace(what=ReadKey(mail.what.former)))

    def _named(self, draft: Draft, mail: Mail, answer: KeyState) -> None:
        if answer.holder is not None or answer.attempt != self.attempt(mail.transaction):
            draft.originals[mail.sender] = DONE
            return
        status = self.logs.views[draft.log].statuses[0]
        if status not in ("abort", "forgotten") or COMMITTED in self.writers(draft, 0):
            raise Violation("keys", "the next attempt begins while the former may still commit")
        draft.originals[mail.sender] = self.new_core(mail.transaction)
        for number, place in enumerate(self.places):
            if place.transaction == mail.transaction:
                draft.branches[number] = WORKING

    def _key_has_committed(self, draft: Draft, mail: Mail, holder: TransactionId) -> None:
        draft.originals[mail.sender] = DONE
        self.tell(draft, IDS.index(holder), TOLD_COMMITTED)

    # Silence.

    def lost(self, state: State, number: int) -> Draft | None:
        """A request is lost; None where that only means that it comes later."""
        mail = self.mails[number]
        original = 0 <= mail.sender < self.originals
        if original and not isinstance(mail.what, (*ON_SESSION, Mark, Serve, Slow)):
            return None  # it is sent again
        draft = Draft(state)
        draft.mail.remove(number)
        if isinstance(mail.what, Slow):
            self.miss(draft, mail._replace(what=mail.what.request))
            return draft
        if original and isinstance(mail.what, ON_SESSION):
            place = self.place(draft, mail.what.branch)
            self.send(draft, mail._replace(sender=NOBODY))  # it may still arrive
            if draft.branches[place] == WORKING and self.places[place].kind != "last resource":
                draft.branches[place] = CUT
        self.miss(draft, mail)
        return draft

    def miss(self, draft: Draft, mail: Mail) -> None:
        """The sender got no answer to what is not on its way any more."""
        if isinstance(mail.what, Mark):
            return
        if isinstance(mail.what, Serve):
            self.rest(draft, mail.sender)
        elif mail.sender >= self.originals:
            self.sweep_misses(draft, mail.sender - self.originals)
        elif isinstance(mail.what, Prepare):
            self.feed(draft, mail.sender, Voted(mail.what.branch.id, SILENT))
        elif isinstance(mail.what, CommitOnePhase):
            self.send(draft, mail._replace(what=Became(mail.what)))
        else:
            self.send(draft, mail)

    def sweep_misses(self, draft: Draft, sweeper: int) -> None:
        raise NotImplementedError

    def doubled(self, state: State, number: int) -> Draft | None:
        mail = self.mails[number]
        if isinstance(mail.what, ONCE) or mail.sender == NOBODY:
            return None
        draft = Draft(state)
        self.send(draft, mail._replace(sender=NOBODY))
        return draft
