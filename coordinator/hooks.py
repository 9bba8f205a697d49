"""What runs around the end of a transaction where its body ran: in its task, or in its thread.

The counterpart of Jakarta's `Synchronization`: `before_commit` for work that is still to be sent,
`after_end` for whoever has to know the outcome. In a synchronous transaction both are plain calls.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from coordinator.logs import kind_of, note, place_of
from coordinator.model import Outcome, TransactionId

logger = logging.getLogger("syncpoint.transactional")

BeforeCommit = Callable[[], Awaitable[None] | None]
AfterEnd = Callable[[Outcome], Awaitable[None] | None]


class Hooks:
    """The calls that wait for one transaction's end, in the order of their registration."""

    transaction: TransactionId | None = None
    """Whose end is waited for, for the logs."""

    def __init__(self) -> None:
        self.before_commit: list[BeforeCommit] = []
        self.after_end: list[AfterEnd] = []

    async def run_before_commit(self) -> None:
        """Run each once, also those that one of them registers; raises what they raise."""
        while self.before_commit:
            result = self.before_commit.pop(0)()
            if result is not None:
                await result

    def run_before_commit_blocking(self) -> None:
        while self.before_commit:
            self.before_commit.pop(0)()

    async def run_after_end(self, outcome: Outcome) -> None:
        """Run each once. The outcome stands, so that an exception can only be logged."""
        while self.after_end:
            try:
                result = self.after_end.pop(0)(outcome)
                if result is not None:
                    await result
            except Exception as error:
                self._failed(error)

    def run_after_end_blocking(self, outcome: Outcome) -> None:
        while self.after_end:
            try:
                self.after_end.pop(0)(outcome)
            except Exception as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        message = "a call after the end of transaction %s raised %s at %s"
        kind, place = kind_of(error), place_of(error)
        fields: dict[str, Any] = {"transaction": self.transaction, "error": kind, "place": place}
        note(logger, logging.ERROR, "call-failed", message, *fields.values(), **fields)
