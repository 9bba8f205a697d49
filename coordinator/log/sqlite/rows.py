"""A record as a row of its table, and what it says."""

from __future__ import annotations

import msgspec

from coordinator import codec
from coordinator.codec import unpack_transaction
from coordinator.log.base import Record
from coordinator.model import LogId, Verdict

AWAITED = "awaited"
"""The answer beside a delegated decision before the last resource's answer is recorded."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """A record as it is stored."""

    id: bytes
    decision: bytes
    unmarked: bytes
    answer: str | None


def decoded(row: Row, log: LogId) -> Record:
    """Raises `ValueError` for what cannot be read, or contradicts itself."""
    transaction = unpack_transaction(row.id)
    decision, attachment = codec.decode(row.decision, log=log, transaction=transaction)
    if (row.answer is not None) is not (decision.verdict is Verdict.DELEGATED):
        raise ValueError(f"the record of transaction {transaction} has the answer {row.answer!r}")
    answer = None if row.answer is None or row.answer == AWAITED else Verdict(row.answer)
    size = codec.BRANCH_BYTES
    unmarked = {row.unmarked[start : start + size] for start in range(0, len(row.unmarked), size)}
    named = {codec.pack_branches([branch.id]): branch.id for branch in decision.branches}
    if not unmarked <= named.keys():
        raise ValueError(f"the record of transaction {transaction} has marks of other branches")
    ended = frozenset(each for packed, each in named.items() if packed not in unmarked)
    return Record(transaction, decision, attachment, answer, ended)


def is_finished(row: Row, log: LogId) -> bool:
    """By the record itself and not by its flag; False too for what cannot be read."""
    try:
        verdict = codec.verdict_of(row.decision, transaction=unpack_transaction(row.id))
        if verdict is not Verdict.DELEGATED and not row.unmarked and row.answer is None:
            return True  # nearly all of them, for less
        return decoded(row, log).finished
    except ValueError:
        return False
