"""The decision log as a plain value: the meaning of every operation, without I/O.

`MemoryLog` serves it, the simulator and the exhaustive search run against it, and the conformance
suite holds every other implementation to it. Each method is one atomic step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from coordinator.errors import ConfigurationError, ProtocolError
from coordinator.log.base import (
    Answer,
    Attempt,
    BelowHorizon,
    ClaimHeld,
    Incident,
    KeyState,
    LogIdentity,
    Mark,
    Page,
    Proposal,
    Reading,
    Record,
    Resource,
    Stands,
    Word,
)
from coordinator.model import Claim, TransactionId, Verdict, Xid, id_floor


class Held(NamedTuple):
    """A claim that is taken, with the attachment of the commit that took it."""

    holder: TransactionId
    attachment: bytes


class Register:
    """The reference: records, keys, the horizon, and what waits for a person."""

    def __init__(self, identity: LogIdentity) -> None:
        self.identity = identity
        self.horizon = id_floor(identity.created_ms)
        self._records: dict[TransactionId, Record] = {}
        self._claims: dict[Claim, Held] = {}
        self._attempts: dict[Claim, Attempt] = {}
        self._resources: dict[str, Resource] = {}
        self._incidents: dict[str, Incident] = {}
        self._words: dict[str, Word] = {}

    def propose(self, proposal: Proposal) -> Answer:
        standing = self._records.get(proposal.transaction)
        if standing is not None:
            return Stands(standing, ours=False)
        if proposal.transaction < self.horizon:
            return BelowHorizon(self.horizon)
        commits = proposal.decision.verdict is not Verdict.ABORT
        claims = proposal.claims if commits else ()
        for claim in claims:
            held = self._claims.get(claim)
            if held is not None:
                return ClaimHeld(claim, held.holder)
        for claim in claims:
            self._claims[claim] = Held(proposal.transaction, proposal.attachment)
        record = Record(
            proposal.transaction, proposal.decision, proposal.attachment if commits else b""
        )
        self._records[proposal.transaction] = record
        return Stands(record, ours=True)

    def record_answer(self, transaction: TransactionId, answer: Verdict) -> Verdict | None:
        record = self._records.get(transaction)
        if record is None:
            return None
        if record.decision.verdict is not Verdict.DELEGATED or answer is Verdict.DELEGATED:
            raise ProtocolError(f"{answer} is no answer to what stands under {transaction}")
        if record.answer is not None:
            return record.answer
        self._records[transaction] = msgspec.structs.replace(record, answer=answer)
        if answer is Verdict.ABORT:
            self._claims = {
                claim: held for claim, held in self._claims.items() if held.holder != transaction
            }
        return answer

    def read(self, transaction: TransactionId) -> Reading:
        return Reading(self._records.get(transaction), self.horizon)

    def read_key(self, claim: Claim) -> KeyState:
        attempt, held = self._attempts.get(claim), self._claims.get(claim)
        if held is None:
            return KeyState(attempt=attempt)
        record = self._records.get(held.holder)  # an unresolved one is never forgotten
        if record is not None and record.unresolved:
            return KeyState(held.holder, attempt=attempt)
        return KeyState(held.holder, True, held.attachment, attempt)

    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        stands = self._attempts.get(claim)
        named = None if stands is None else stands.transaction
        if claim not in self._claims and named == expected:
            self._attempts[claim] = attempt
        return self.read_key(claim)

    def scan(
        self, after: TransactionId | None, limit: int, *, unfinished_only: bool = True
    ) -> Page:
        found = sorted(
            transaction
            for transaction, record in self._records.items()
            if (after is None or transaction > after) and not (unfinished_only and record.finished)
        )
        records = tuple(self._records[transaction] for transaction in found[:limit])
        return Page(records, found[limit - 1] if len(found) > limit else None)

    def finish(self, marks: Sequence[Mark]) -> None:
        for mark in marks:
            record = self._records.get(mark.transaction)
            if record is None:
                continue
            named = {branch.id for branch in record.decision.branches}
            if mark.branch in named - record.ended:
                ended = record.ended | {mark.branch}
                self._records[mark.transaction] = msgspec.structs.replace(record, ended=ended)

    def raise_horizon(self, to: TransactionId) -> TransactionId:
        self.horizon = max(self.horizon, to)
        return self.horizon

    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        gone = [t for t, record in self._records.items() if t < self.horizon and record.finished]
        gone = sorted(gone)[:limit]
        for transaction in gone:
            del self._records[transaction]
        before = min(self.horizon, id_floor(claims_before_ms))
        taken = {
            claim: held.holder
            for claim, held in self._claims.items()
            if held.holder not in self._records
        }
        for claim in _oldest(taken, before, limit):
            del self._claims[claim]
        named = {claim: attempt.transaction for claim, attempt in self._attempts.items()}
        for claim in _oldest(named, before, limit):
            del self._attempts[claim]
        return len(gone)

    def register(self, name: str, identity: str, now_ms: int) -> Resource:
        known = self._resources.get(name)
        if known is not None and known.identity == identity:
            return known
        if known is not None and self._is_named(name):
            raise another_identity(name, known.identity, identity)
        created = Resource(name, identity, clear=self.horizon, swept_ms=now_ms)
        self._resources[name] = created
        return created

    def _is_named(self, participant: str) -> bool:
        return any(
            branch.participant == participant
            for record in self._records.values()
            if not record.finished
            for branch in record.decision.named
        )

    def swept(self, name: str, clear: TransactionId, swept_ms: int) -> None:
        known = self._resources.get(name)
        if known is None:
            raise ProtocolError(f"participant {name!r} was swept before it was registered")
        if swept_ms >= known.swept_ms:
            self._resources[name] = msgspec.structs.replace(known, clear=clear, swept_ms=swept_ms)

    def resources(self) -> Sequence[Resource]:
        return tuple(self._resources.values())

    def report(self, incident: Incident) -> None:
        self._incidents.setdefault(incident.gid, incident)

    def incidents(self) -> Sequence[Incident]:
        return tuple(sorted(self._incidents.values(), key=lambda each: each.noticed_ms))

    def acknowledge(self, gid: str) -> bool:
        incident = self._incidents.pop(gid, None)
        if incident is None:
            return False
        xid = Xid.parse(gid)
        if xid is not None:
            self.finish([Mark(xid.transaction, xid.branch)])
        return True

    def give_word(self, word: Word) -> Word:
        return self._words.setdefault(word.subject, word)

    def words(self) -> Sequence[Word]:
        return tuple(sorted(self._words.values(), key=lambda each: each.given_ms))


def _oldest(taken: dict[Claim, TransactionId], before: TransactionId, limit: int) -> list[Claim]:
    """Up to `limit` of the keys taken by transactions older than `before`, the oldest first."""
    old = sorted((each, claim) for claim, each in taken.items() if each < before)
    return [claim for _, claim in old[:limit]]


def another_identity(name: str, known: str, found: str) -> ConfigurationError:
    """The error of `register` for a name that unfinished commits still need elsewhere."""
    return ConfigurationError(
        f"participant {name!r} is {found} here, but unfinished commits in this log name it as "
        f"{known}: point it at that resource until `syncpoint recover` has finished them, or give "
        "the new one another name"
    )
