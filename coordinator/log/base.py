"""PORT: the decision log, a write-once register for each transaction.

One primitive carries the safety of everything: *record unless a record stands; return the one that
stands*. First writer wins, everybody obeys. `propose` is one atomic step of the log: the horizon,
the claims and the register are compared and written together.

What every implementation promises, and `tests/conformance` checks:

* An answer is durable: it survives `kill -9` of everything and a power cut.
* An exception (`LogUnavailable`) is indefinite: the proposal may stand. Propose again and compare.
* Absent is not permission: `read` returning no record never means abort.
* `read` and `read_key` are linearizable: they see every answer given before they were called.

`DecisionLog` is what a transaction needs; `Housekeeping` what the sweep needs to forget safely.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec

from coordinator.errors import LogUnavailable
from coordinator.model import (
    BranchId,
    Claim,
    Decision,
    EndingKind,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
)

PAGE = 1_000
"""How many records are read or forgotten in one step."""


class Proposal(msgspec.Struct, frozen=True):
    """A decision to record. `claims` and `attachment` are written only with a commit.

    The attachment is kept beside each claim too, and outlives the record there.
    """

    transaction: TransactionId
    decision: Decision
    claims: tuple[Claim, ...] = ()
    attachment: bytes = b""


class Record(msgspec.Struct, frozen=True):
    """What stands under an id.

    `ended` are the named branches whose ending was marked, `answer` a last resource's answer.
    """

    transaction: TransactionId
    decision: Decision
    attachment: bytes = b""
    answer: Verdict | None = None
    ended: frozenset[BranchId] = frozenset()

    @property
    def unresolved(self) -> bool:
        """The last resource's answer is not recorded yet."""
        return self.decision.verdict is Verdict.DELEGATED and self.answer is None

    @property
    def finished(self) -> bool:
        """Nothing is left to do for any named branch."""
        if self.unresolved:
            return False
        if self.decision.verdict is Verdict.ABORT or self.answer is Verdict.ABORT:
            return True
        return all(branch.id in self.ended for branch in self.decision.branches)


class Stands(msgspec.Struct, frozen=True):
    """`record` stands, whoever wrote it; `ours` tells that this proposal wrote it."""

    record: Record
    ours: bool


class BelowHorizon(msgspec.Struct, frozen=True):
    """Nothing stands and nothing can be recorded under this id any more."""

    horizon: TransactionId


class ClaimHeld(msgspec.Struct, frozen=True):
    """Nothing was recorded: another transaction holds the claim."""

    claim: Claim
    holder: TransactionId


Answer = Stands | BelowHorizon | ClaimHeld


class Reading(msgspec.Struct, frozen=True):
    """The record under an id, if any, and the horizon at the same moment."""

    record: Record | None
    horizon: TransactionId


class Attempt(msgspec.Struct, frozen=True):
    """The current attempt under a key: who else comes waits for it as long as its owner may take.

    `timeout_ms` is the time that its owner gave it, counted from the time in its id. When `member`,
    its owner, is dead nobody needs to wait.
    """

    transaction: TransactionId
    timeout_ms: int
    member: MemberId


class KeyState(msgspec.Struct, frozen=True):
    """What stands under a key at one moment.

    `holder` holds the claim. It has committed if `committed` says so, and then `attachment` is its
    commit's; otherwise it is delegated and its last resource's answer is not recorded yet.
    `attempt` is the one named last, which may have ended long ago.
    """

    holder: TransactionId | None = None
    committed: bool = False
    attachment: bytes = b""
    attempt: Attempt | None = None


class Unreadable(msgspec.Struct, frozen=True):
    """A record that cannot be decoded. It parks its own transaction and stops no other.

    It is neither absent nor ever deleted: `propose` and `read` of its id raise `RecordUnreadable`.
    """

    transaction: TransactionId
    why: str


class RecordUnreadable(LogUnavailable):
    """What stands under this id cannot be decoded here; of all others the log answers.

    As after any other `LogUnavailable` nothing may be presumed of the transaction.
    """


class Page(msgspec.Struct, frozen=True):
    """Part of a scan in the order of ids; `after` continues it and is None at the end."""

    records: tuple[Record | Unreadable, ...]
    after: TransactionId | None


class LogIdentity(msgspec.Struct, frozen=True):
    """`id` is drawn at the log's first opening and kept for ever, also by its backups.

    The log knows of all that was decided since `created_ms`, where its horizon began: its first
    opening, or the last time that a backup was restored.
    """

    id: LogId
    created_ms: int


class Mark(msgspec.Struct, frozen=True):
    """A named branch of a commit has acknowledged its ending."""

    transaction: TransactionId
    branch: BranchId


class Incident(msgspec.Struct, frozen=True):
    """A branch that needs a person: it is quarantined, or ended against the decision.

    `kind` None is quarantine: prepared below the horizon without a record. `gid` is the text of the
    branch's xid, `noticed_ms` the first sight by the clock of who noticed.
    """

    gid: str
    participant: str
    kind: EndingKind | None
    evidence: str
    noticed_ms: int


class Word(msgspec.Struct, frozen=True):
    """What a person said about a branch or a transaction, write-once.

    `subject` is a branch's gid or a transaction's id. `verdict` None acknowledges and orders
    nothing. `by` is who said it, `given_ms` when, by the clock of who wrote it down.
    """

    subject: str
    verdict: Verdict | None
    reason: str
    by: str
    given_ms: int


class Resource(msgspec.Struct, frozen=True):
    """A participant known to the log: the horizon waits for what its sweep has seen.

    The latest completed scan, begun at `swept_ms`, saw no branch of ours older than `clear` but
    named branches of unfinished commits, and quarantined ones.
    """

    name: str
    identity: str
    clear: TransactionId
    swept_ms: int


class DecisionLog(Protocol):
    """The register. Every method raises `LogUnavailable` when the log does not answer."""

    async def open(self) -> LogIdentity:
        """Open or create. Raises `ConfigurationError` naming what is wrong and the fix."""

    async def close(self) -> None:
        """Finish what was accepted, then release everything. Closing twice is harmless."""

    async def propose(self, proposal: Proposal) -> Answer:
        """Record unless a record stands; the answer is durable when it is returned.

        A standing record is returned even below the horizon and whoever holds the claims. Only then
        come the horizon's refusal and the claims'.
        """

    async def record_answer(self, transaction: TransactionId, answer: Verdict) -> Verdict | None:
        """Write a last resource's answer beside its delegated decision; the first one stands.

        Returns what stands; None when no record stands any more, because others resolved it and it
        was forgotten. ABORT also frees the transaction's claims, in the same step. Raises
        `ProtocolError` if another decision stands, or for an answer that is none.
        """

    async def read(self, transaction: TransactionId) -> Reading:
        """What stands under an id; above the horizon absence means that nothing is recorded yet."""

    async def read_key(self, claim: Claim) -> KeyState:
        """Who holds the claim, with what result, and the attempt named last."""

    async def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        """Name the current attempt under a key, if nobody holds it and `expected` is named now.

        `expected` None stands for no name. One atomic step, durable when it returns what stands
        afterwards: the attempt may prepare only if that is itself, with no holder. Otherwise
        nothing was written; the name may also be gone, by its retention. Asking again after
        `LogUnavailable` is safe.

        `expected` must be unable to commit: its abort stands recorded, or it was refused below the
        horizon. The log does not look.
        """


class Housekeeping(Protocol):
    """Marks, retention and the horizon. None of it decides anything.

    The rules that make forgetting safe are enforced in here, each in one log transaction: the
    horizon only rises; a record is deleted only when it is finished and below the horizon; claims
    have a retention of their own.
    """

    async def scan(
        self, after: TransactionId | None, limit: int, *, unfinished_only: bool = True
    ) -> Page:
        """The next `limit` records after an id, in the order of ids."""

    async def finish(self, marks: Sequence[Mark]) -> None:
        """Mark branches as ended; a mark of what the record does not name is passed over.

        Lazy: losing a mark costs a repeated commit, nothing else.
        """

    async def raise_horizon(self, to: TransactionId) -> TransactionId:
        """Raise the horizon unless it is higher already; durable when it returns what stands."""

    async def forget(self, limit: int, *, claims_before_ms: int) -> int:
        """Delete up to `limit` finished records below the horizon; returns how many.

        Claims with their attachments, and names of attempts, go when their transaction began before
        `claims_before_ms` and below the horizon: up to `limit` of each. The oldest go first. A
        claim stays as long as the record of its holder, which may still be unresolved. A record
        that cannot be read is passed over: it stays for good.
        """

    async def register(self, name: str, identity: str, now_ms: int) -> Resource:
        """Make the horizon wait for a resource; keeps what is known of it.

        A new one counts as swept at `now_ms` with nothing seen clear, so that the horizon waits for
        its first sweep as long as it would for a later one.

        Raises `ConfigurationError` if the name stands for another identity and an unfinished commit
        still names it; otherwise the name is given to the new identity.
        """

    async def swept(self, name: str, clear: TransactionId, swept_ms: int) -> None:
        """Publish what a sweep of a resource saw whose scan began at `swept_ms`.

        The latest scan stands, also where it saw more left to do than the one before. Raises
        `ProtocolError` for a resource that is not registered.
        """

    async def resources(self) -> Sequence[Resource]:
        """All registered resources."""

    async def report(self, incident: Incident) -> None:
        """Keep an incident; the first report of a gid stands."""

    async def incidents(self) -> Sequence[Incident]:
        """All incidents that nobody has acknowledged, oldest first."""

    async def acknowledge(self, gid: str) -> bool:
        """A person has dealt with it: drop the incident and mark its branch ended, if named."""

    async def give_word(self, word: Word) -> Word:
        """Record a person's word unless one stands for its subject; returns the one that stands.

        Durable when it returns. Words are never forgotten: people give few of them, and each is
        the evidence of why a branch ended as it did. It decides nothing by itself, and neither
        drops an incident nor marks a branch.
        """

    async def words(self) -> Sequence[Word]:
        """All words ever given, oldest first."""


class Log(DecisionLog, Housekeeping, Protocol):
    """A whole decision log."""


async def every_record(
    log: Housekeeping, *, unfinished_only: bool = True
) -> AsyncIterator[Record | Unreadable]:
    """A whole scan, in the order of ids, a page at a time."""
    after: TransactionId | None = None
    while True:
        page = await log.scan(after, PAGE, unfinished_only=unfinished_only)
        for record in page.records:
            yield record
        after = page.after
        if after is None:
            return
