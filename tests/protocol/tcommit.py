"""Transaction commit as its specification says it, without a protocol: the naive twin.

This is TCommit of Gray & Lamport, "Consensus on Transaction Commit", in plain Python. It knows
resource managers and nothing else: no coordinator, no log, no messages. A walk through the real
core reports to it what each resource did, and it raises `Violation` where the specification does
not allow that step. It was written from the paper, not from `coordinator.protocol`.

Simplifications: a read-only resource has no state worth an agreement and is left out as soon as it
says so; a branch that no commit names is no resource manager of the transaction, and may only
abort.
"""

from __future__ import annotations

from enum import Enum, auto


class Violation(AssertionError):
    """The core let something happen that the specification forbids."""


class Manager(Enum):
    WORKING = auto()
    PREPARED = auto()
    COMMITTED = auto()
    ABORTED = auto()


class TCommit:
    """The states of the resource managers, changed only by steps of the specification."""

    def __init__(self, managers: set[str]) -> None:
        self.states = dict.fromkeys(managers, Manager.WORKING)

    def prepare(self, manager: str) -> None:
        """[Prepare] working -> prepared."""
        if manager in self.states and self.states[manager] is Manager.WORKING:
            self.states[manager] = Manager.PREPARED

    def leave(self, manager: str) -> None:
        """A resource that wrote nothing has no part in the agreement."""
        self.states.pop(manager, None)

    def commit(self, manager: str, *, alone: bool = False) -> None:
        """[Decide, first half] prepared -> committed, if all are prepared or committed.

        `alone`: the only resource manager there is may go from working to committed at once.
        """
        if manager not in self.states:
            raise Violation(f"{manager} commits and was never part of the transaction")
        if alone and len(self.states) == 1:
            self.states[manager] = Manager.COMMITTED
            return
        ready = (Manager.PREPARED, Manager.COMMITTED)
        if any(state not in ready for state in self.states.values()):
            raise Violation(f"{manager} commits while not all have promised: {self}")
        self.states[manager] = Manager.COMMITTED

    def abort(self, manager: str) -> None:
        """[Decide, second half] working or prepared -> aborted, if none has committed."""
        if manager not in self.states:
            return
        if Manager.COMMITTED in self.states.values():
            raise Violation(f"{manager} aborts while another has committed: {self}")
        self.states[manager] = Manager.ABORTED

    @property
    def consistent(self) -> bool:
        """[TCConsistent] Not one resource manager has aborted while another has committed."""
        found = set(self.states.values())
        return not {Manager.ABORTED, Manager.COMMITTED} <= found

    def __str__(self) -> str:
        return ", ".join(f"{name} {state.name.lower()}" for name, state in self.states.items())
