"""What a transaction is told and what it asks for: the vocabulary of `coordinator.protocol`.

An event says what happened, an action what to do next. Both are values; the ordering rules between
them stand in the table of `coordinator.protocol`, and in the docstrings here where they bind.
"""

from __future__ import annotations

import msgspec

from coordinator.model import (
    FINISHED,
    Branch,
    BranchId,
    Claim,
    Decision,
    Ending,
    TransactionId,
    Verdict,
    Vote,
)

# Events: what happened.


class Enlisted(msgspec.Struct, frozen=True, gc=False):
    """A branch joined. `vote` is set when it voted unasked (a called service prepares by itself).

    `one_phase`: the participant can commit it without preparing and later say whether it did.
    `last_resource`: it cannot prepare; its own commit is the decision. At most one.
    """

    branch: Branch
    vote: Vote | None = None
    one_phase: bool = False
    last_resource: bool = False


class Published(msgspec.Struct, frozen=True, gc=False):
    """The id is about to leave this process: from here on every commit is recorded."""


class CommitRequested(msgspec.Struct, frozen=True, gc=False):
    """The work is done and enlistment is closed. `attachment` is recorded with a commit."""

    attachment: bytes = b""


class AbortRequested(msgspec.Struct, frozen=True, gc=False):
    """Somebody wants an end: the user's exception, the deadline, a person, recovery."""

    reason: str = ""
    retryable: bool = False


class Voted(msgspec.Struct, frozen=True, gc=False):
    """A branch answered `Prepare`. An exception of the participant is the vote ABORTED."""

    branch: BranchId
    vote: Vote


class Decided(msgspec.Struct, frozen=True, gc=False):
    """The log answered: `decision` stands, whoever proposed it.

    `ended` are the named branches already known to have ended; `answer` is a last resource's
    answer that stands beside a delegated decision.
    """

    decision: Decision
    ended: frozenset[BranchId] = frozenset()
    answer: Verdict | None = None


class Refused(msgspec.Struct, frozen=True, gc=False):
    """The log holds nothing under this id and takes nothing: it is below the horizon."""


class ClaimStands(msgspec.Struct, frozen=True, gc=False):
    """The log refused a commit because another transaction holds one of its claims."""

    claim: Claim
    holder: TransactionId


class Answered(msgspec.Struct, frozen=True, gc=False):
    """The resource whose own commit is the decision said which: COMMIT or ABORT."""

    verdict: Verdict
    reason: str = ""
    retryable: bool = False


class Resolved(msgspec.Struct, frozen=True, gc=False):
    """The last resource's answer stands in the log beside the delegated decision."""

    verdict: Verdict


class Finished(msgspec.Struct, frozen=True, gc=False):
    """A branch ended. A heuristic ending is reported and never counts as acknowledged."""

    branch: BranchId
    ending: Ending = FINISHED


Event = (
    Enlisted
    | Published
    | CommitRequested
    | AbortRequested
    | Voted
    | Decided
    | Refused
    | ClaimStands
    | Answered
    | Resolved
    | Finished
)

# Actions: what to do next.


class Prepare(msgspec.Struct, frozen=True, gc=False):
    branch: Branch


class Decide(msgspec.Struct, frozen=True, gc=False):
    """Propose to the log, until it answers. It binds once the log holds it, and not before."""

    decision: Decision
    claims: tuple[Claim, ...] = ()
    attachment: bytes = b""


class CommitOnePhase(msgspec.Struct, frozen=True, gc=False):
    """Let the branch's own commit be the decision; answer `Answered`, never a guess."""

    branch: Branch


class AskLastResource(msgspec.Struct, frozen=True, gc=False):
    """Make the last resource end, and answer how it ended.

    `commit` is set only for who proposed the delegation: it asks for commit, all others for abort;
    whoever comes first decides and everybody learns the same answer.
    """

    branch: Branch
    commit: bool


class RecordAnswer(msgspec.Struct, frozen=True, gc=False):
    """Write the last resource's answer beside the decision, before another branch is touched."""

    verdict: Verdict


class Commit(msgspec.Struct, frozen=True, gc=False):
    branch: Branch


class Rollback(msgspec.Struct, frozen=True, gc=False):
    branch: Branch


class Forget(msgspec.Struct, frozen=True, gc=False):
    """The named branch has acknowledged: mark it in the log, lazily. Not on the critical path."""

    branch: BranchId


class Report(msgspec.Struct, frozen=True, gc=False):
    """The branch ended against the decision, or may have: show it to a person, with evidence."""

    branch: Branch
    ending: Ending


Action = (
    Prepare
    | Decide
    | CommitOnePhase
    | AskLastResource
    | RecordAnswer
    | Commit
    | Rollback
    | Forget
    | Report
)
