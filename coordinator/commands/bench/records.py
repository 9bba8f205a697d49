"""Records as transfers leave them in a log: a commit of two branches, each with its token."""

from __future__ import annotations

import random

from coordinator.model import (
    Branch,
    BranchId,
    Decision,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
)
from participants.postgres.statements import Token

PARTICIPANTS = ("accounts", "ledger")


class Commits:
    """Decisions of one member; branch ids are drawn from `seed`."""

    def __init__(self, log: LogId, seed: int = 0) -> None:
        self._log = log
        self._numbers = random.Random(seed)
        self._member = MemberId(self._digits())
        # As large as real ones: an xid8, a system identifier and a timeline.
        self._tokens = [Token(10_000_000 + place, 7 << 60, 1).encode() for place in range(2)]

    def of(self, transaction: TransactionId) -> Decision:
        """To commit it in both databases."""
        branches = [
            Branch(
                Xid(self._log, self._member, transaction, BranchId(self._digits())),
                participant,
                token,
            )
            for participant, token in zip(PARTICIPANTS, self._tokens, strict=True)
        ]
        return Decision(Verdict.COMMIT, tuple(branches))

    def _digits(self) -> str:
        return f"{self._numbers.getrandbits(64):016x}"
