"""Every exception of Syncpoint, named for what the caller may do next.

    TransactionError                also: a lease used after its transaction
    ├── TransactionAborted          definite: nothing happened and nothing will
    ├── OutcomeUnknown              indefinite: it may yet commit; ask again by id
    ├── AlreadyDecided              this idempotency key has its outcome
    ├── HeuristicOutcome            a branch disagrees with the decision: a person is needed
    ├── LogUnavailable              the log did not answer; at begin: nothing was begun
    ├── ConfigurationError          wrong before anything began
    └── ProtocolError               a bug, ours or the participant's

When in doubt, indefinite is always the safe answer. Foreign exceptions are turned into these at one
border for each adapter, always `raise … from`.
"""

from __future__ import annotations

from coordinator.model import Branch, Ending, Outcome, TransactionId


def one_line(text: object) -> str:
    """What `str` makes of it, with every run of blanks and line ends as one blank."""
    return " ".join(str(text).split())


class TransactionError(Exception):
    """The base of all. Raised itself for work on a lease or transaction that is over."""


class TransactionAborted(TransactionError):
    """The transaction is rolled back for good: nothing of it happened and nothing will.

    `retryable` tells whether running the whole function again may help.
    """

    def __init__(
        self, reason: str, *, transaction_id: TransactionId | None = None, retryable: bool = False
    ) -> None:
        super().__init__(reason)
        self.transaction_id = transaction_id
        self.retryable = retryable


class OutcomeUnknown(TransactionError):
    """The transaction may commit or abort, or has; nobody here can say which.

    Do not run it again blindly: ask `await coordinator.status(error.transaction_id)`, or
    `await coordinator.abort(...)` when an end is needed now. Where `recorded` is False that does
    not help: the commit of the only database that was written to was the decision, the log knows
    nothing of it, and only that database can tell.
    """

    def __init__(
        self, reason: str, *, transaction_id: TransactionId, recorded: bool = True
    ) -> None:
        ask = "ask coordinator.status(id)" if recorded else "look into that database"
        super().__init__(
            f"{reason}; the outcome of transaction {transaction_id} is not known here: {ask} "
            "before running it again"
        )
        self.recorded = recorded
        self.transaction_id = transaction_id


class AlreadyDecided(TransactionError):
    """The idempotency key was used before and its transaction has its outcome.

    `attachment` is what was recorded with it: the encoded result, or nothing.
    """

    def __init__(
        self, key: str, *, transaction_id: TransactionId, outcome: Outcome, attachment: bytes = b""
    ) -> None:
        super().__init__(f"idempotency key {key!r} is {outcome} by transaction {transaction_id}")
        self.key = key
        self.attachment = attachment
        self.transaction_id = transaction_id
        self.outcome = outcome


class HeuristicOutcome(TransactionError):
    """A branch ended, or may have ended, against the decision. A person has to mend it.

    `outcome` is what was decided; `endings` are the branches that disagree, with the evidence.
    """

    def __init__(
        self,
        *,
        transaction_id: TransactionId,
        outcome: Outcome,
        endings: tuple[tuple[Branch, Ending], ...],
    ) -> None:
        shown = "; ".join(
            f"{branch.participant}: {ending.kind} ({ending.evidence})" for branch, ending in endings
        )
        super().__init__(
            f"transaction {transaction_id} is {outcome}, but {shown}. Compare the databases, mend "
            "them by hand, then acknowledge it"
        )
        self.transaction_id = transaction_id
        self.outcome = outcome
        self.endings = endings


class LogUnavailable(TransactionError):
    """The decision log did not answer.

    Raised at begin it is definite: nothing was begun. Raised by a proposal it is indefinite:
    propose again and compare.
    """


class ConfigurationError(TransactionError):
    """Something is set up wrong; nothing was begun. The message names what, where and the fix."""


class ProtocolError(TransactionError):
    """A step that the protocol does not allow: a bug in Syncpoint or in a participant.

    The transaction's state is unchanged by the refused step. Please report it.
    """
