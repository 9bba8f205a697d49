"""What each operation of the port is in SQL. Synchronous, and always inside a log transaction.

The meaning is that of `coordinator.log.register`, which the conformance suite compares with this.
Rows are handed out as they stand; whoever asked decodes them, so that the file is locked no longer
than needed and an unreadable record is its reader's error only.
"""

from __future__ import annotations

from collections.abc import Sequence

import apsw
import msgspec

from coordinator import codec
from coordinator.codec import BRANCH_BYTES, pack_branches, pack_transaction, unpack_transaction
from coordinator.errors import ProtocolError
from coordinator.log.base import (
    Attempt,
    BelowHorizon,
    ClaimHeld,
    Incident,
    KeyState,
    Mark,
    Proposal,
    Resource,
    Word,
)
from coordinator.log.register import another_identity
from coordinator.log.sqlite.rows import AWAITED, Row, is_finished
from coordinator.model import (
    Claim,
    EndingKind,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
    id_floor,
)

LATER_FORMAT = bytes([codec.FORMAT_VERSION + 1])
"""What the records of later programs begin with, or something above."""

_COLUMNS = "id, decision, unmarked, answer"


class Insertion(msgspec.Struct, frozen=True):
    """A proposal made ready to be stored."""

    id: bytes
    decision: bytes
    unmarked: bytes
    answer: str | None
    unfinished: bool
    claims: tuple[Claim, ...]
    attachment: bytes

    @property
    def row(self) -> tuple[bytes, bytes, bytes, str | None, bool]:
        """In the order of the table's columns."""
        return self.id, self.decision, self.unmarked, self.answer, self.unfinished


AT_ONCE_MOST = 64
_INSERTIONS = [
    f"INSERT INTO record SELECT * FROM (VALUES {', '.join(['(?, ?, ?, ?, ?)'] * number)}) "
    "WHERE (SELECT horizon FROM log) <= ?"
    for number in range(AT_ONCE_MOST + 1)
]


def insertion(proposal: Proposal, log: LogId) -> Insertion:
    """Raises `ValueError` for a proposal that cannot be stored."""
    decision = proposal.decision
    commits = decision.verdict is not Verdict.ABORT
    attachment = proposal.attachment if commits else b""
    data = codec.encode(decision, attachment, log=log, transaction=proposal.transaction)
    for claim in proposal.claims:
        check_text(claim)
    unmarked = pack_branches([branch.xid.branch for branch in decision.branches])
    delegated = decision.verdict is Verdict.DELEGATED
    return Insertion(
        pack_transaction(proposal.transaction),
        data,
        unmarked,
        AWAITED if delegated else None,
        delegated or (commits and bool(unmarked)),
        proposal.claims if commits else (),
        attachment,
    )


def check_text(claim: Claim) -> None:
    """Raises `ValueError` if it cannot be stored: before it is in the transaction of others."""
    f"{claim.space}{claim.key}".encode()


class Store:
    """The tables of a log, seen through one connection inside its current transaction."""

    def __init__(self, connection: apsw.Connection, log: LogId) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self._log = log
        self._horizon = b""

    def begin(self) -> None:
        """To be called first in every transaction: the horizon is compared in the same one."""
        self._horizon = self._connection.execute("SELECT horizon FROM log").get

    @property
    def horizon(self) -> TransactionId:
        return unpack_transaction(self._horizon)

    def record_at_once(self, proposals: Sequence[Insertion]) -> bool:
        """All of them or nothing in one statement, which is a transaction of its own.

        Each statement hands the interpreter to another thread and gets it back, which on a busy
        one costs more than the statement. False says that nothing was done: a record stands, one
        is below the horizon, or there are claims or too many, so that each is to be looked at.
        """
        if len(proposals) > AT_ONCE_MOST or any(each.claims for each in proposals):
            return False
        oldest = min(each.id for each in proposals)
        values = [value for each in proposals for value in each.row]
        try:
            self._cursor.execute(_INSERTIONS[len(proposals)], (*values, oldest))
        except apsw.ConstraintError:
            return False
        return self._connection.changes() > 0

    def propose(self, new: Insertion) -> Row | BelowHorizon | ClaimHeld | None:
        """None says that the proposal itself was recorded; a row is the record that stands."""
        if new.claims or new.id < self._horizon:
            return self._propose_carefully(new)
        return None if self._insert(new) else self._standing(new.id)

    def _propose_carefully(self, new: Insertion) -> Row | BelowHorizon | ClaimHeld | None:
        standing = self.read(new.id)
        if standing is not None:
            return standing
        if new.id < self._horizon:
            return BelowHorizon(self.horizon)
        for claim in new.claims:
            holder = self._cursor.execute(
                "SELECT holder FROM claim WHERE space = ? AND key = ?", (claim.space, claim.key)
            ).get
            if holder is not None:
                return ClaimHeld(claim, unpack_transaction(holder))
        for claim in dict.fromkeys(new.claims):
            self._cursor.execute(
                "INSERT INTO claim VALUES (?, ?, ?, ?)",
                (claim.space, claim.key, new.id, new.attachment),
            )
        self._insert(new)
        return None

    def _insert(self, new: Insertion) -> bool:
        self._cursor.execute(
            "INSERT INTO record VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", new.row
        )
        return self._connection.changes() == 1

    def _standing(self, key: bytes) -> Row:
        row = self.read(key)
        if row is None:
            raise ProtocolError(f"record {key.hex()} was neither inserted nor does it stand")
        return row

    def record_answer(self, key: bytes, answer: Verdict) -> Verdict | None:
        row = self.read(key)
        if row is None:
            return None
        if row.answer is None:
            raise ProtocolError(f"no delegated decision stands under {unpack_transaction(key)}")
        if row.answer != AWAITED:
            return Verdict(row.answer)
        unfinished = answer is Verdict.COMMIT and bool(row.unmarked)
        self._connection.execute(
            "UPDATE record SET answer = ?, unfinished = ? WHERE id = ?",
            (answer.value, unfinished, key),
        )
        if answer is Verdict.ABORT:
            self._connection.execute("DELETE FROM claim WHERE holder = ?", (key,))
        return answer

    def read(self, key: bytes) -> Row | None:
        found = self._connection.execute(f"SELECT {_COLUMNS} FROM record WHERE id = ?", (key,))
        row = found.fetchone()
        return None if row is None else Row(*row)

    def read_key(self, claim: Claim) -> KeyState:
        key = (claim.space, claim.key)
        named = self._connection.execute(
            "SELECT id, timeout_ms, member FROM attempt WHERE space = ? AND key = ?", key
        ).fetchone()
        attempt = None
        if named is not None:
            attempt = Attempt(unpack_transaction(named[0]), named[1], MemberId(named[2]))
        held = self._connection.execute(
            "SELECT holder, attachment, answer FROM claim LEFT JOIN record ON record.id = holder "
            "WHERE space = ? AND key = ?",
            key,
        ).fetchone()
        if held is None:
            return KeyState(attempt=attempt)
        holder, attachment, answer = held
        if answer == AWAITED:
            return KeyState(unpack_transaction(holder), attempt=attempt)
        return KeyState(unpack_transaction(holder), True, attachment, attempt)

    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        state = self.read_key(claim)
        named = None if state.attempt is None else state.attempt.transaction
        if state.holder is not None or named != expected:
            return state
        self._connection.execute(
            "INSERT OR REPLACE INTO attempt VALUES (?, ?, ?, ?, ?)",
            (
                claim.space,
                claim.key,
                pack_transaction(attempt.transaction),
                attempt.timeout_ms,
                attempt.member,
            ),
        )
        return KeyState(attempt=attempt)

    def scan(self, after: bytes, limit: int, *, unfinished_only: bool) -> list[Row]:
        """Up to `limit` rows after an id, in the order of ids."""
        which = "unfinished = 1 AND" if unfinished_only else ""
        found = self._connection.execute(
            f"SELECT {_COLUMNS} FROM record WHERE {which} id > ? ORDER BY id LIMIT ?",
            (after, limit),
        )
        return [Row(*row) for row in found]

    def finish(self, marks: Sequence[Mark]) -> None:
        branches: dict[bytes, set[bytes]] = {}
        for mark in marks:
            key = pack_transaction(mark.transaction)
            branches.setdefault(key, set()).add(pack_branches([mark.branch]))
        for key, ended in branches.items():
            row = self.read(key)
            if row is None:
                continue
            remaining = _without(row.unmarked, ended)
            if remaining == row.unmarked:
                continue
            self._connection.execute(
                "UPDATE record SET unmarked = ?, unfinished = unfinished AND ? WHERE id = ?",
                (remaining, bool(remaining) or row.answer == AWAITED, key),
            )

    def raise_horizon(self, to: bytes) -> TransactionId:
        if to > self._horizon:
            self._connection.execute("UPDATE log SET horizon = ?", (to,))
            self._horizon = to
        return self.horizon

    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        deleted = self._forget_records(limit)
        before = min(self._horizon, pack_transaction(id_floor(claims_before_ms)))
        no_record = "NOT EXISTS (SELECT 1 FROM record WHERE record.id = claim.holder)"
        for table, taken_by, free in (("claim", "holder", no_record), ("attempt", "id", "TRUE")):
            self._connection.execute(
                f"DELETE FROM {table} WHERE (space, key) IN (SELECT space, key FROM {table} "
                f"WHERE {taken_by} < ? AND {free} ORDER BY {taken_by}, space, key LIMIT ?)",
                (before, limit),
            )
        return deleted

    def _forget_records(self, limit: int) -> int:
        """Delete the oldest finished ones; what cannot be read stays, and holds up no other.

        A damaged one counts as unfinished from then on, so that scans show it. One of a later
        format is left to the program that wrote it.
        """
        which = "unfinished = 0 AND decision < ?"
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM record WHERE id < ? AND {which} ORDER BY id LIMIT ?",
            (self._horizon, LATER_FORMAT, limit),
        )
        found = [Row(*row) for row in rows]
        for row in found:
            if not is_finished(row, self._log):
                self._connection.execute("UPDATE record SET unfinished = 1 WHERE id = ?", (row.id,))
        last = found[-1].id if found else b""
        self._connection.execute(
            f"DELETE FROM record WHERE id <= ? AND {which}", (last, LATER_FORMAT)
        )
        return self._connection.changes()

    def register(self, name: str, identity: str, now_ms: int) -> Resource:
        known = next((each for each in self.resources() if each.name == name), None)
        if known is not None:
            if known.identity == identity:
                return known
            if self._is_named(name):
                raise another_identity(name, known.identity, identity)
        created = Resource(name, identity, self.horizon, now_ms)
        self._connection.execute(
            "INSERT INTO resource VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "identity = excluded.identity, clear = excluded.clear, swept_ms = excluded.swept_ms",
            (name, identity, self._horizon, now_ms),
        )
        return created

    def _is_named(self, participant: str) -> bool:
        """Whether an unfinished record names it; one that cannot be read may name anybody."""
        found = self._connection.execute("SELECT id, decision FROM record WHERE unfinished = 1")
        for key, data in found:
            try:
                decision, _ = codec.decode(data, log=self._log, transaction=unpack_transaction(key))
            except ValueError:
                return True
            if any(branch.participant == participant for branch in decision.named):
                return True
        return False

    def swept(self, name: str, clear: bytes, swept_ms: int) -> None:
        self._connection.execute(
            "UPDATE resource SET clear = iif(swept_ms <= ?1, ?2, clear), "
            "swept_ms = max(swept_ms, ?1) WHERE name = ?3",
            (swept_ms, clear, name),
        )
        if self._connection.changes() == 0:
            raise ProtocolError(f"participant {name!r} was swept before it was registered")

    def resources(self) -> tuple[Resource, ...]:
        found = self._connection.execute(
            "SELECT name, identity, clear, swept_ms FROM resource ORDER BY rowid"
        )
        return tuple(
            Resource(name, identity, unpack_transaction(clear), swept_ms)
            for name, identity, clear, swept_ms in found
        )

    def report(self, incident: Incident) -> None:
        kind = None if incident.kind is None else incident.kind.value
        self._connection.execute(
            "INSERT INTO incident VALUES (?, ?, ?, ?, ?) ON CONFLICT (gid) DO NOTHING",
            (incident.gid, incident.participant, kind, incident.evidence, incident.noticed_ms),
        )

    def incidents(self) -> tuple[Incident, ...]:
        found = self._connection.execute(
            "SELECT gid, participant, kind, evidence, noticed_ms FROM incident "
            "ORDER BY noticed_ms, rowid"
        )
        return tuple(
            Incident(gid, participant, None if kind is None else EndingKind(kind), evidence, ms)
            for gid, participant, kind, evidence, ms in found
        )

    def acknowledge(self, gid: str) -> bool:
        self._connection.execute("DELETE FROM incident WHERE gid = ?", (gid,))
        if self._connection.changes() == 0:
            return False
        xid = Xid.parse(gid)
        if xid is not None:
            self.finish([Mark(xid.transaction, xid.branch)])
        return True

    def give_word(self, word: Word) -> Word:
        verdict = None if word.verdict is None else word.verdict.value
        self._connection.execute(
            "INSERT INTO word VALUES (?, ?, ?, ?, ?) ON CONFLICT (subject) DO NOTHING",
            (word.subject, verdict, word.reason, word.by, word.given_ms),
        )
        return next(each for each in self.words() if each.subject == word.subject)

    def words(self) -> tuple[Word, ...]:
        found = self._connection.execute(
            "SELECT subject, verdict, reason, given_by, given_ms FROM word ORDER BY given_ms, rowid"
        )
        return tuple(
            Word(subject, None if verdict is None else Verdict(verdict), reason, by, ms)
            for subject, verdict, reason, by, ms in found
        )


def _without(unmarked: bytes, ended: set[bytes]) -> bytes:
    parts = (
        unmarked[start : start + BRANCH_BYTES] for start in range(0, len(unmarked), BRANCH_BYTES)
    )
    return b"".join([part for part in parts if part not in ended])
