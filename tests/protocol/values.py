"""Short names for the values that the protocol tests are written in."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.events import (
    Action,
    Answered,
    AskLastResource,
    Commit,
    CommitOnePhase,
    CommitRequested,
    Decide,
    Decided,
    Enlisted,
    Event,
    Finished,
    Forget,
    Prepare,
    RecordAnswer,
    Report,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.model import (
    Branch,
    BranchId,
    Decision,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Vote,
    VoteKind,
    Xid,
)
from coordinator.protocol import Transaction

ID = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a11")
OTHER_ID = TransactionId("0199f3c2-7a10-7cc2-98a4-6c1c2f5d8a12")

PREPARED = Vote(VoteKind.PREPARED)
READ_ONLY = Vote(VoteKind.READ_ONLY)
ABORTED = Vote(VoteKind.ABORTED, reason="duplicate key", retryable=False)


def branch(name: str, *, transaction: TransactionId = ID) -> Branch:
    """The branch of that name: a name always stands for the same branch id."""
    digits = name.encode().hex().rjust(16, "0")[-16:]
    return Branch(
        Xid(LogId("10" * 8), MemberId("20" * 8), transaction, BranchId(digits)), participant=name
    )


A, B, K = branch("A"), branch("B"), branch("K")


def commit(*branches: Branch) -> Decision:
    return Decision(Verdict.COMMIT, branches)


def delegated(*branches: Branch, to: Branch = K) -> Decision:
    return Decision(Verdict.DELEGATED, branches, to)


def steps(transaction: Transaction, *events: Event) -> list[Action]:
    """Takes the events in turn and returns the actions of the last one."""
    actions: list[Action] = []
    for event in events:
        actions = transaction.step(event)
    return actions


def preparing(*branches: Branch, handed: bool = False) -> Transaction:
    """A transaction whose branches have been asked to prepare."""
    transaction = Transaction(ID, handed=handed)
    steps(transaction, *(Enlisted(each, last_resource=each == K) for each in branches))
    steps(transaction, CommitRequested())
    return transaction


def proposed(*branches: Branch) -> Transaction:
    """A transaction whose commit, or delegation, has been proposed."""
    transaction = preparing(*branches)
    steps(transaction, *(Voted(each.id, PREPARED) for each in branches))
    return transaction


def state_of(transaction: Transaction) -> dict[str, object]:
    """All that a transaction holds, copied, so that a later change cannot hide in it."""
    held: dict[str, object] = {}
    for slot in Transaction.__slots__:
        value = getattr(transaction, slot)
        held[slot] = dict(value) if isinstance(value, dict) else value
    return held


def describe_decision(decision: Decision) -> str:
    named = " ".join(each.participant for each in decision.branches)
    words = [str(decision.verdict), named]
    if decision.last_resource is not None:
        words.append(f"to {decision.last_resource.participant}")
    return " ".join(word for word in words if word)


def describe(action: Action, names: dict[BranchId, str]) -> str:
    """One action as a reader would say it."""
    match action:
        case Decide(decision, claims, attachment):
            held = f", claiming {' '.join(claim.key for claim in claims)}" if claims else ""
            noted = f", with {attachment.decode()!r}" if attachment else ""
            return f"Decide {describe_decision(decision)}{held}{noted}"
        case AskLastResource(asked, commit):
            return f"AskLastResource {asked.participant} to {'commit' if commit else 'abort'}"
        case RecordAnswer(verdict):
            return f"RecordAnswer {verdict}"
        case Forget(branch_id):
            return f"Forget {names.get(branch_id, branch_id)}"
        case Report(reported, ending):
            return f"Report {reported.participant}: {ending.kind} ({ending.evidence})"
        case Prepare(target) | CommitOnePhase(target) | Commit(target) | Rollback(target):
            return f"{type(action).__name__} {target.participant}"


def tell(event: Event) -> str:
    """One event as a reader would say it."""
    match event:
        case Enlisted(enlisted, vote):
            told = f" {vote.kind}" if vote is not None else ""
            return f"Enlisted {enlisted.participant}{told}"
        case Voted(branch_id, vote):
            return f"Voted {_name(branch_id)} {vote.kind}"
        case Finished(branch_id, ending):
            return f"Finished {_name(branch_id)} {ending.kind}"
        case Decided(decision, _, answer):
            answered = f", answered {answer}" if answer is not None else ""
            return f"Decided {describe_decision(decision)}{answered}"
        case Answered(verdict) | Resolved(verdict):
            return f"{type(event).__name__} {verdict}"
    return type(event).__name__


def _name(branch_id: BranchId) -> str:
    return bytes.fromhex(branch_id).lstrip(b"\0").decode(errors="replace")


def kinds(actions: Sequence[Action]) -> list[str]:
    """The actions as sorted text: their order means nothing."""
    return sorted(describe(action, {}) for action in actions)
