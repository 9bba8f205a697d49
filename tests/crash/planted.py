"""Planted bugs: each breaks one rule in the processes of a case, and the counting must find it.

A bug is planted in the forked processes of a batch, the service, its repeat and the recovery alike.
`python -m tests.crash --bugs` prints what found each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from coordinator.events import AbortRequested, Decide
from coordinator.log.base import Answer, Proposal, Record, Stands
from coordinator.log.sqlite import SQLiteLog
from coordinator.log.sqlite.store import Store
from coordinator.model import FINISHED, Branch, Ending, Vote, VoteKind, Xid
from coordinator.protocol import RULES, Phase, Transaction
from coordinator.transactional import GlobalTransaction
from participants.postgres import PostgreSQL, work
from participants.postgres.finishing import Finisher
from participants.postgres.replies import Meaning, read_prepare
from tests.crash.matrix import Case, Fault, Way


class Bug(msgspec.Struct, frozen=True):
    """What is planted, the case that meets it, and the invariant that must be named."""

    plant: Callable[[], None]
    case: Case
    found_by: str


def _killed_at(point: str, way: Way = Way.COMMIT, occurrence: int = 1) -> Case:
    return Case(way, point, occurrence, Fault.KILLED)


def _presume_abort() -> None:
    RULES[Phase.IN_DOUBT, AbortRequested] = lambda core, event: core._roll_back()


def _commit_with_the_vote() -> None:
    prepare = PostgreSQL.prepare

    async def eager(self: PostgreSQL, xid: Xid) -> Vote:
        vote = await prepare(self, xid)
        if vote.kind is VoteKind.PREPARED:
            await self.commit(Branch(xid, self.name, vote.token))
        return vote

    PostgreSQL.prepare = eager  # type: ignore[method-assign]
    PostgreSQL.prepare_at_once = lambda self, xid: None  # type: ignore[method-assign]


def _answer_without_writing() -> None:
    async def lying(self: SQLiteLog, proposal: Proposal) -> Answer:
        return Stands(Record(proposal.transaction, proposal.decision), ours=True)

    SQLiteLog.propose = lying  # type: ignore[method-assign]


def _take_silence_for_yes() -> None:
    def hopeful(reply: Any) -> Meaning:
        meaning = read_prepare(reply)
        return Meaning.DONE if meaning is Meaning.IN_DOUBT else meaning

    vars(work)["read_prepare"] = hopeful


def _always_say_committed() -> None:
    GlobalTransaction._raise_unless_committed = (  # type: ignore[method-assign]
        lambda self: None
    )


def _leave_what_is_committed() -> None:
    async def idle(self: Finisher, branch: Branch) -> Ending:
        return FINISHED

    Finisher.commit = idle  # type: ignore[method-assign]
    Finisher.commit_at_once = lambda self, branch: None  # type: ignore[method-assign]


def _leave_what_is_aborted() -> None:
    async def idle(self: Finisher, branch: Branch, in_doubt: object) -> Ending:
        return FINISHED

    Finisher.roll_back = idle  # type: ignore[method-assign]


def _take_no_claims() -> None:
    propose = SQLiteLog.propose

    async def unclaimed(self: SQLiteLog, proposal: Proposal) -> Answer:
        return await propose(self, msgspec.structs.replace(proposal, claims=()))

    SQLiteLog.propose = unclaimed  # type: ignore[method-assign]


def _name_one_branch() -> None:
    all_voted = Transaction._all_voted

    def forgetful(self: Transaction) -> list[Any]:
        (decide,) = all_voted(self)
        assert isinstance(decide, Decide)
        decision = msgspec.structs.replace(decide.decision, branches=decide.decision.branches[:1])
        return [Decide(decision, decide.claims, decide.attachment)]

    Transaction._all_voted = forgetful  # type: ignore[method-assign]


def _sweep_every_log() -> None:
    async def greedy(self: Finisher, log: Any) -> list[Branch]:
        async with self._connection() as connection:
            reply = await connection.ask(b"SELECT gid FROM pg_prepared_xacts")
        xids = [Xid.parse(gid or "") for (gid,) in reply.rows]
        return [Branch(xid, self._name) for xid in xids if xid is not None]

    Finisher.recover = greedy  # type: ignore[method-assign]


def _delete_with_the_mark() -> None:
    def careless(self: Store, marks: Any) -> None:
        self._connection.execute("DELETE FROM record")

    Store.finish = careless  # type: ignore[method-assign]


PLANTED = {
    "recovery presumes abort": Bug(_presume_abort, _killed_at("decide:after"), "I1"),
    "COMMIT PREPARED with the vote": Bug(_commit_with_the_vote, _killed_at("decide:before"), "I5"),
    "the log answers and has not written": Bug(
        _answer_without_writing, _killed_at("commit:after", occurrence=2), "I5"
    ),
    "a lost answer to PREPARE is a yes": Bug(
        _take_silence_for_yes, Case(Way.EXAMINED, "accounts PREPARE", 1, Fault.CUT), "I2"
    ),
    "every caller is told committed": Bug(
        _always_say_committed, Case(Way.VOTE_NO, "ledger PREPARE", 1, Fault.CUT), "I4"
    ),
    "recovery leaves what is committed": Bug(
        _leave_what_is_committed, _killed_at("decide:after"), "I6"
    ),
    "recovery leaves what is aborted": Bug(
        _leave_what_is_aborted, _killed_at("prepare:after", occurrence=2), "I6"
    ),
    "a commit takes no claim": Bug(_take_no_claims, _killed_at("decide:after", Way.KEYED), "I1"),
    "a commit names one branch only": Bug(_name_one_branch, _killed_at("decide:after"), "I2"),
    "the sweep takes every log's branches": Bug(_sweep_every_log, _killed_at("decide:after"), "I8"),
    "a record goes with its mark": Bug(_delete_with_the_mark, _killed_at("decide:after"), "I11"),
}
"""Bugs by what they do."""
