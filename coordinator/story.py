"""What is logged of one transaction: the abnormal always, and every step where somebody listens.

`Story` is made when something abnormal has to be said. `FullStory` stands between a driver and the
protocol core, and is made with the driver where the logger `syncpoint.driver` is at DEBUG, so that
a driver without one pays nothing for it. `docs/logs.md` lists the records and their fields.
"""

from __future__ import annotations

import logging
from typing import Any

from coordinator.errors import OutcomeUnknown
from coordinator.events import (
    Action,
    Answered,
    AskLastResource,
    ClaimStands,
    Commit,
    CommitOnePhase,
    CommitRequested,
    Decide,
    Decided,
    Enlisted,
    Event,
    Finished,
    Prepare,
    Published,
    RecordAnswer,
    Refused,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.logs import kind_of, of, place_of, retry_level, say
from coordinator.model import Branch, BranchId, Claim, Decision, Ending, Outcome, Verdict, Vote
from coordinator.protocol import Phase, Transaction

logger = logging.getLogger("syncpoint.driver")

DEBUG = logging.DEBUG

_CAN_ABORT = (Phase.ACTIVE, Phase.PREPARING, Phase.COMMIT_PROPOSED, Phase.IN_DOUBT)
THE_LOG = "the log"


class Story:
    """Says the abnormal of one transaction, whose id is on every record."""

    def __init__(self, core: Transaction) -> None:
        self._core = core

    def say(self, level: int, what: str, message: str, *arguments: object, **fields: Any) -> None:
        say(logger, level, self._core.id, what, message, *arguments, **fields)

    def abort_requested(self, level: int, reason: str) -> None:
        """To be said before the event; nothing is said where it changes nothing any more."""
        if self._core.phase in _CAN_ABORT:
            self.say(level, "abort-requested", "abort requested: %s", reason, reason=reason)

    def no_answer(self, branch: Branch, error: Exception) -> None:
        """Its text may quote what the server said of the work, so it is not logged."""
        message, kind = "%s did not answer prepare: %s", kind_of(error)
        fields = {**of(branch), "error": kind, "place": place_of(error)}
        self.say(logging.WARNING, "no-answer", message, branch.participant, kind, **fields)

    def failed(self, asked: str, attempt: int, error: Exception) -> None:
        """A participant, or the log, did not answer; it will be asked again."""
        level = retry_level(attempt)
        message = "%s did not answer, attempt %d: %s"
        fields = {"asked": asked, "attempt": attempt, "error": str(error)}
        self.say(level, "retry", message, asked, attempt, error, **fields)

    def heuristic(self, branch: Branch, ending: Ending) -> None:
        message = "%s ended with a %s: %s"
        fields = {**of(branch), "ending": ending.kind, "evidence": ending.evidence}
        arguments = (branch.participant, ending.kind, ending.evidence)
        self.say(logging.ERROR, "heuristic", message, *arguments, **fields)

    def broken(self, error: BaseException) -> None:
        """A bug, ours or a participant's; its text may quote an event, and so a vote's reason."""
        message = "cannot go on, recovery will end it: %s at %s"
        kind, place = kind_of(error), place_of(error)
        self.say(logging.CRITICAL, "broken", message, kind, place, error=kind, place=place)

    def told(self, error: BaseException | None) -> None:
        """The caller gets this exception, or with None the result."""
        if isinstance(error, OutcomeUnknown):
            self._say_told(logging.WARNING, error)

    def _say_told(self, level: int, error: BaseException | None) -> None:
        outcome, phase = self._core.outcome or Outcome.UNKNOWN, self._core.phase
        kind = "the result" if error is None else kind_of(error)
        message = "the caller gets %s; outcome: %s, phase: %s"
        fields = {"outcome": outcome, "phase": phase, "error": kind if error else None}
        self.say(level, "told", message, kind, outcome, phase, **fields)


class FullStory(Story):
    """Tells each event and each action as the core takes and gives them."""

    def __init__(self, core: Transaction, seconds: float, claims: tuple[Claim, ...]) -> None:
        super().__init__(core)
        self.ours = False
        """Whether a proposal of ours was answered with the record that it had just written."""
        self._branches: dict[BranchId, Branch] = {}
        self._know(*core.branches)
        self._proposed: list[Decision] = []
        self._log_failed = False
        if core.phase is Phase.ACTIVE:
            key = claims[0].key if claims else None
            message = "begun, to end within %.3g s"
            self.say(DEBUG, "begun", message, seconds, seconds=seconds, key=key)

    def step(self, event: Event) -> list[Action]:
        """`Transaction.step`, told."""
        before = self._core.phase
        actions = self._core.step(event)
        self._tell_event(event)
        if self._core.phase is Phase.ENDED and before is not Phase.ENDED:
            outcome = self._core.outcome
            self.say(DEBUG, "ended", "every branch has ended: %s", outcome, outcome=outcome)
        for action in actions:
            self._tell_action(action)
        return actions

    def failed(self, asked: str, attempt: int, error: Exception) -> None:
        self._log_failed = self._log_failed or asked == THE_LOG
        super().failed(asked, attempt, error)

    def told(self, error: BaseException | None) -> None:
        self._say_told(logging.WARNING if isinstance(error, OutcomeUnknown) else DEBUG, error)

    def _tell_event(self, event: Event) -> None:
        match event:
            case Enlisted(branch=branch):
                self._know(branch)
                message = "%s takes part as branch %s"
                self.say(DEBUG, "enlisted", message, branch.participant, branch.id, **of(branch))
            case Published():
                self.say(DEBUG, "published", "its id is known outside: a commit will be recorded")
            case CommitRequested():
                self.say(DEBUG, "commit-requested", "commit requested")
            case Voted(branch=branch_id, vote=vote):
                self._tell_vote(branch_id, vote)
            case Decided(decision=decision):
                self._know(*decision.named)
                self._tell_decision(decision)
            case Refused():
                message = "the log has forgotten transactions of that age, and records nothing"
                self.say(DEBUG, "refused", message)
            case ClaimStands(claim=claim, holder=holder):
                message = "not recorded: %s %r is held by transaction %s"
                fields = {"key": claim.key, "holder": holder}
                self.say(DEBUG, "claim-held", message, claim.space, claim.key, holder, **fields)
            case Answered(verdict=verdict):
                message = "what the resource itself did is the decision: %s"
                self.say(DEBUG, "answered", message, verdict, verdict=verdict)
            case Resolved(verdict=verdict):
                message = "that answer stands in the log: %s"
                self.say(DEBUG, "resolved", message, verdict, verdict=verdict)
            case Finished(branch=branch_id, ending=ending):
                fields = {**self._of(branch_id), "ending": ending.kind}
                message = "%(participant)s has ended its branch: %(ending)s"
                self.say(DEBUG, "finished", message, fields, **fields)

    def _tell_vote(self, branch_id: BranchId, vote: Vote) -> None:
        fields = {**self._of(branch_id), "vote": vote.kind, "retryable": vote.retryable}
        message = "%(participant)s votes %(vote)s"
        message += ", and running it again may help" if vote.retryable else ""
        self.say(DEBUG, "voted", message, fields, **fields)

    def _tell_decision(self, decision: Decision) -> None:
        ours: bool | None
        ours, by = True, "by us"
        if not self.ours and (decision.verdict is Verdict.ABORT or decision not in self._proposed):
            # An earlier proposal of ours may have been recorded whose answer was lost. A commit
            # names the branches of its proposer; all aborts are alike.
            may_be_ours = decision.verdict is Verdict.ABORT and self._log_failed
            ours, by = (None, "by us or another") if may_be_ours else (False, "by another")
        message = "%s stands in the log, recorded %s"
        fields = {"verdict": decision.verdict, "ours": ours}
        self.say(DEBUG, "decided", message, decision.verdict, by, **fields)

    def _tell_action(self, action: Action) -> None:
        match action:
            case Decide(decision=decision):
                self._proposed.append(decision)
                message = "%s is proposed to the log"
                fields = {"verdict": decision.verdict}
                self.say(DEBUG, "proposed", message, decision.verdict, **fields)
            case RecordAnswer(verdict=verdict):
                message = "the answer %s is to be recorded"
                self.say(DEBUG, "recording-answer", message, verdict, verdict=verdict)
            case Prepare(branch=branch):
                self._tell_asked(branch, "prepare")
            case CommitOnePhase(branch=branch):
                self._tell_asked(branch, "commit in one phase")
            case AskLastResource(branch=branch, commit=commit):
                self._tell_asked(branch, "commit and decide" if commit else "end and decide")
            case Commit(branch=branch):
                self._tell_asked(branch, "commit")
            case Rollback(branch=branch):
                self._tell_asked(branch, "roll back")

    def _tell_asked(self, branch: Branch, verb: str) -> None:
        message = "%s is asked to %s"
        self.say(DEBUG, "asked", message, branch.participant, verb, verb=verb, **of(branch))

    def _know(self, *branches: Branch) -> None:
        """Events name a branch by its id; it was enlisted, or is named by what was decided."""
        self._branches.update((branch.id, branch) for branch in branches)

    def _of(self, branch_id: BranchId) -> dict[str, str]:
        branch = self._branches.get(branch_id)
        return {"participant": "?", "branch": branch_id} if branch is None else of(branch)
