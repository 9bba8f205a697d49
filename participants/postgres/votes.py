"""Votes and the words in which a branch votes no: those for its caller, and those for the logs.

The server's words may quote rows, so the logs have its SQLSTATE only.
"""

from __future__ import annotations

import logging

from coordinator.logs import say_of
from coordinator.model import Vote, VoteKind, Xid
from participants.postgres.replies import Reply, is_retryable
from participants.postgres.statements import Greeting, Token

logger = logging.getLogger("syncpoint.postgres")

FAILED = "a statement failed, or the connection was lost"
RAW_COMMIT = "a COMMIT or ROLLBACK was sent as text"


class Refused(Exception):
    """The branch is rolled back; `vote` is its definite no. Never leaves this package.

    `logged` is what may be logged of the reason.
    """

    def __init__(self, reason: str, logged: str = FAILED, *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.logged = logged
        self.vote = Vote(VoteKind.ABORTED, reason=reason, retryable=retryable)


def raw_commit(name: str) -> str:
    """Why a branch cannot commit whose session was told to end its transaction."""
    return (
        f"a COMMIT or ROLLBACK was sent as text to {name}, so that part of the work is no longer "
        "in the transaction: leave the end to the transactional function, and use "
        "`async with connection.transaction()` for a savepoint"
    )


def refused(name: str, xid: Xid, why: str) -> None:
    """Log why a branch cannot commit."""
    say_of(logger, logging.DEBUG, name, xid, "refused", "%s cannot commit: %s", reason=why)


def no(name: str, xid: Xid, reply: Reply) -> Vote:
    """The vote behind an answer to PREPARE or COMMIT that is no success."""
    if reply.replication_unconfirmed:
        reason = f"no synchronous standby of {name} confirmed the branch"
        refused(name, xid, reason)
        return Vote(VoteKind.ABORTED, reason=reason, retryable=True)
    if reply.tag == "ROLLBACK":
        reason = f"{name} had rolled the transaction back already"
        refused(name, xid, reason)
    else:
        reason = f"{name}: {reply}"
        refused(name, xid, f"SQLSTATE {reply.sqlstate}")
    return Vote(VoteKind.ABORTED, reason=reason, retryable=is_retryable(reply.sqlstate))


def token(xid8: int, greeting: Greeting) -> bytes:
    """What a stranger needs to end the branch; xid8 0 is one that wrote nothing."""
    return Token(xid8, greeting.system_identifier, greeting.timeline).encode()
