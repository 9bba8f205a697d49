"""Readers of answers with one mistake each, and the row of the reply table that has to find it.

Every class of row has some: yes, a definite no, in doubt, gone, again soon, slowly, a bug; and what
is told beside the class: whether running again helps, and that replication was not confirmed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from participants.postgres import replies
from participants.postgres.replies import Fate, Meaning, Reply

PREPARE = "participants.postgres.work.read_prepare"
FINISH = "participants.postgres.finishing.read_finish"
COMMIT = "participants.postgres.work.read_commit"
FATE = "participants.postgres.finishing.read_fate"


class Misreading(msgspec.Struct, frozen=True):
    """What replaces the function of that name, and the row that must fail then."""

    function: str
    wrong: Callable[..., Any]
    row: str


def _prepare_as(meaning: Meaning, when: Callable[[Reply], bool]) -> Callable[[Reply], Meaning]:
    return lambda reply: meaning if when(reply) else replies.read_prepare(reply)


def _finish_as(meaning: Meaning, when: Callable[[Reply], bool]) -> Callable[[Reply, str], Meaning]:
    return lambda reply, tag: meaning if when(reply) else replies.read_finish(reply, tag)


def _fate_as(fate: Fate, when: Fate) -> Callable[[Reply], Fate]:
    return lambda reply: fate if replies.read_fate(reply) is when else replies.read_fate(reply)


def _is(sqlstate: str) -> Callable[[Reply], bool]:
    return lambda reply: reply.sqlstate == sqlstate


def _lost(reply: Reply) -> bool:
    return not reply.connected


MISREADINGS = {
    "yes: the tag PREPARE TRANSACTION is a no": Misreading(
        PREPARE,
        _prepare_as(Meaning.NO, lambda reply: reply.tag == replies.PREPARED_TAG),
        "success tag: yes",
    ),
    "yes: whatever is no error is a yes": Misreading(
        PREPARE,
        _prepare_as(Meaning.DONE, lambda reply: reply.succeeded),
        "tag ROLLBACK in a failed transaction: no",
    ),
    "yes: the tag ROLLBACK of PREPARE is a bug": Misreading(
        PREPARE,
        _prepare_as(Meaning.BUG, lambda reply: reply.tag == "ROLLBACK"),
        "tag ROLLBACK outside a transaction: no",
    ),
    "yes: the warning is overlooked": Misreading(
        "participants.postgres.connection.is_replication_warning",
        lambda sqlstate, source: False,
        "success tag with warning 01000: no",
    ),
    "yes: the warning is a no of the second phase as well": Misreading(
        FINISH,
        _finish_as(Meaning.SOON, lambda reply: reply.replication_unconfirmed),
        "COMMIT: success tag with warning 01000: done, the decision is kept and it is said",
    ),
    "yes: every warning is one about replication": Misreading(
        "participants.postgres.connection.is_replication_warning",
        lambda sqlstate, source: sqlstate == "01000",
        "success tag with a warning 01000 of the user's own: yes",
    ),
    "no: an error on a living connection is in doubt": Misreading(
        PREPARE,
        _prepare_as(Meaning.IN_DOUBT, lambda reply: bool(reply.sqlstate)),
        "23xxx deferred constraint: no, with the reason",
    ),
    "no: an error is a yes": Misreading(
        PREPARE,
        _prepare_as(Meaning.DONE, lambda reply: bool(reply.sqlstate)),
        "53200 no slot left: no",
    ),
    "no: a full disk is in doubt": Misreading(
        PREPARE,
        _prepare_as(Meaning.IN_DOUBT, _is("53100")),
        "53100 disk full, connection alive: no",
    ),
    "no: only a conflict may be tried again": Misreading(
        "participants.postgres.votes.is_retryable",
        lambda sqlstate: sqlstate in ("40001", "40P01"),
        "53200 no slot left: no",
    ),
    "no: a conflict may not be tried again": Misreading(
        "participants.postgres.votes.is_retryable",
        lambda sqlstate: sqlstate != "40001" and replies.is_retryable(sqlstate),
        "40001 at PREPARE: no",
    ),
    "no: a constraint may be tried again": Misreading(
        "participants.postgres.votes.is_retryable",
        lambda sqlstate: True,
        "23xxx deferred constraint: no, with the reason",
    ),
    "in doubt: a lost connection is a no": Misreading(
        PREPARE,
        _prepare_as(Meaning.NO, _lost),
        "57P01 during PREPARE: in doubt, the branch is prepared",
    ),
    "in doubt: a shutdown is a no": Misreading(
        PREPARE,
        _prepare_as(Meaning.NO, _is("57P01")),
        "57P01 raised on a connection that lives: in doubt all the same",
    ),
    "in doubt: a COMMIT that was lost is a no": Misreading(
        COMMIT,
        lambda reply: Meaning.NO if _lost(reply) else replies.read_commit(reply),
        "one phase, 57P01 during COMMIT: the server is asked how it ended",
    ),
    "gone: to COMMIT PREPARED it is done": Misreading(
        FINISH,
        _finish_as(Meaning.DONE, _is("42704")),
        "COMMIT: 42704, pg_xact_status aborted: heuristic rollback",
    ),
    "gone: to ROLLBACK PREPARED it is done": Misreading(
        FINISH,
        _finish_as(Meaning.DONE, _is("42704")),
        "ROLLBACK: 42704, pg_xact_status committed: heuristic commit",
    ),
    "gone: it is tried again for ever": Misreading(
        FINISH,
        _finish_as(Meaning.SOON, _is("42704")),
        "COMMIT: 42704, pg_xact_status committed: finished",
    ),
    "gone: null is aborted": Misreading(
        FATE,
        _fate_as(Fate.ABORTED, Fate.UNKNOWN),
        "COMMIT: 42704, null, in the future, no number, or another timeline: hazard",
    ),
    "gone: null is committed": Misreading(
        FATE,
        _fate_as(Fate.COMMITTED, Fate.UNKNOWN),
        "COMMIT: 42704, null, in the future, no number, or another timeline: hazard",
    ),
    "gone: in progress is aborted": Misreading(
        FATE,
        _fate_as(Fate.ABORTED, Fate.IN_PROGRESS),
        "ROLLBACK: 42704, in progress: not ended yet",
    ),
    "gone: in progress is committed": Misreading(
        FATE,
        _fate_as(Fate.COMMITTED, Fate.IN_PROGRESS),
        "COMMIT: 42704, in progress: not ended yet",
    ),
    "soon: busy is for a person": Misreading(
        FINISH,
        _finish_as(Meaning.SLOWLY, _is("55000")),
        "COMMIT: 55000 busy with another session: again soon",
    ),
    "soon: busy is done, since another session does it": Misreading(
        FINISH,
        _finish_as(Meaning.DONE, _is("55000")),
        "ROLLBACK: 55000 busy with another session: again soon",
    ),
    "soon: a lost answer is done": Misreading(
        FINISH,
        _finish_as(Meaning.DONE, _lost),
        "COMMIT: 57P01 during it, and the answer lost: again soon, and then it is done",
    ),
    "soon: no connection left is for a person": Misreading(
        "participants.postgres.finishing.is_refusal",
        lambda message: "FATAL" in message,
        "COMMIT: 53300 no connection left: again, for ever",
    ),
    "slowly: a privilege is tried again soon": Misreading(
        FINISH,
        _finish_as(Meaning.SOON, _is("42501")),
        "COMMIT: 42501 not the owner: slowly, and the fix is named",
    ),
    "slowly: the wrong database is tried again soon": Misreading(
        FINISH,
        _finish_as(Meaning.SOON, _is("0A000")),
        "ROLLBACK: 0A000 wrong database: slowly, and the fix is named",
    ),
    "slowly: a refused login is an outage": Misreading(
        "participants.postgres.finishing.is_refusal",
        lambda message: False,
        "COMMIT: 28P01 password authentication failed: slowly, and the fix is named",
    ),
    "bug: a gid that is taken is a no": Misreading(
        PREPARE, _prepare_as(Meaning.NO, _is("42710")), "42710 duplicate gid: a bug"
    ),
}
