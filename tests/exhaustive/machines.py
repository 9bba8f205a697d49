"""The real core and the real log's value as numbered states, each step of theirs taken once.

A world of the search holds only numbers. Which core or register a number stands for is kept here,
and so is what every event or operation makes of it: the real code runs once for each pair of state
and input, however many worlds that pair is met in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from msgspec import structs

from coordinator.errors import ProtocolError
from coordinator.events import Action, Decide, Event
from coordinator.log.base import LogIdentity, Record
from coordinator.log.register import Register
from coordinator.model import LogId, TransactionId, Verdict
from coordinator.protocol import Transaction
from tests.simulation.checkers import Violation

_TOLD_ONLY = ("reason", "retryable", "_heuristic", "_attachment")
_WITHOUT_ORDER = ("_votes", "_out", "_unended")


class Cores:
    """All states of `Transaction` that were met, by number."""

    def __init__(self) -> None:
        self.cores: list[Transaction] = []
        self._numbers: dict[Hashable, int] = {}
        self._steps: dict[tuple[int, Event], tuple[int, tuple[Action, ...]]] = {}

    def number(self, core: Transaction) -> int:
        held: list[Hashable] = [type(core), core.id]
        for slot in Transaction.__slots__:
            if slot in _TOLD_ONLY:
                continue
            value = getattr(core, slot)
            if isinstance(value, dict):
                items = value.items()
                value = frozenset(items) if slot in _WITHOUT_ORDER else tuple(items)
            held.append(value)
        number = self._numbers.setdefault(tuple(held), len(self.cores))
        if number == len(self.cores):
            self.cores.append(core)
        return number

    def step(self, number: int, event: Event) -> tuple[int, tuple[Action, ...]]:
        """What an event makes of a core, and the actions that it calls for."""
        known = self._steps.get((number, event))
        if known is not None:
            return known
        core = copied(self.cores[number])
        try:
            actions = tuple(_in_order(action) for action in core.step(event))
        except ProtocolError as error:
            raise Violation("table", str(error)) from error
        done = self.number(core), actions
        self._steps[number, event] = done
        return done


def _in_order(action: Action) -> Action:
    """The order of the branches that a decision names means nothing."""
    if not isinstance(action, Decide):
        return action
    branches = tuple(sorted(action.decision.branches, key=lambda branch: branch.id))
    decision = structs.replace(action.decision, branches=branches)
    return structs.replace(action, decision=decision)


def copied(core: Transaction) -> Transaction:
    twin: Transaction = type(core).__new__(type(core))
    for slot in Transaction.__slots__:
        value = getattr(core, slot)
        setattr(twin, slot, dict(value) if isinstance(value, dict) else value)
    return twin


class View(NamedTuple):
    """What a register says of each transaction of the world, in their order."""

    records: tuple[Record | None, ...]
    statuses: tuple[str, ...]
    """undecided, commit, abort, forgotten."""
    named: tuple[frozenset[str], ...]
    """The branches that a standing record names, without a last resource."""


class Logs:
    """All states of `Register` that were met, by number."""

    def __init__(
        self, register: Callable[[LogIdentity], Register], transactions: tuple[TransactionId, ...]
    ) -> None:
        self.registers: list[Register] = []
        self.views: list[View] = []
        self._register = register
        self._transactions = transactions
        self._numbers: dict[Hashable, int] = {}
        self._steps: dict[tuple[int, Hashable], tuple[int, Any]] = {}

    def new(self, created_ms: int) -> Register:
        return self._register(LogIdentity(LogId("10" * 8), created_ms))

    def number(self, register: Register) -> int:
        held = (
            frozenset(register._records.items()),
            register.horizon,
            frozenset(register._claims.items()),
            frozenset(register._attempts.items()),
            frozenset(register._resources.items()),
        )
        number = self._numbers.setdefault(held, len(self.registers))
        if number == len(self.registers):
            self.registers.append(register)
            self.views.append(self._view(register))
        return number

    def _view(self, register: Register) -> View:
        readings = [register.read(transaction) for transaction in self._transactions]
        records = tuple(reading.record for reading in readings)
        return View(
            records,
            tuple(
                _status(record, transaction < register.horizon)
                for record, transaction in zip(records, self._transactions, strict=True)
            ),
            tuple(
                frozenset() if record is None else frozenset(b.id for b in record.decision.branches)
                for record in records
            ),
        )

    def step(
        self, number: int, name: Hashable, operation: Callable[[Register], Any]
    ) -> tuple[int, Any]:
        """What an operation makes of a register, and its answer. `name` says which one it is."""
        known = self._steps.get((number, name))
        if known is not None:
            return known
        register = _copied(self.registers[number])
        answer = operation(register)
        done = self.number(register), answer
        self._steps[number, name] = done
        return done


def _copied(register: Register) -> Register:
    twin = copy.copy(register)
    for name, held in vars(register).items():
        if isinstance(held, dict):
            setattr(twin, name, dict(held))
    return twin


def _status(record: Record | None, below: bool) -> str:
    if record is None:
        return "forgotten" if below else "undecided"
    verdict = record.answer or record.decision.verdict
    return "undecided" if verdict is Verdict.DELEGATED else str(verdict)
