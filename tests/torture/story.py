"""A short run in which everything went right, told as the evidence that it would leave."""

from __future__ import annotations

from typing import Any

from coordinator.model import id_floor
from tests.torture.values import (
    BALANCE,
    DATABASES,
    Asked,
    Change,
    Ended,
    Evidence,
    Exit,
    Fault,
    Found,
    History,
    Invoked,
    Line,
    Marker,
    Named,
    Options,
    Recorded,
    Told,
)

LOG = "1111111111111111"
STRANGER = f"sp:2222222222222222:aaaaaaaaaaaaaaaa:{id_floor(1)}:bbbbbbbbbbbbbbbb"
OURS = f"sp:{LOG}:aaaaaaaaaaaaaaaa:{id_floor(5000)}:bbbbbbbbbbbbbbbb"
HORIZON = id_floor(1000)
SCANS = ((10.0, 10.1), (20.0, 20.1))


def transaction(number: int) -> str:
    return id_floor(5000 + number)


class Story:
    """A run in which everything went right, told as evidence.

    Five operations: `wide` committed in two databases, `lone` in one phase, `failed` aborted,
    `silent` was cut off and did commit, `again` met the key of `wide`.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.markers: list[Marker] = []
        self.records: list[Recorded] = []
        self.clock = 1.0
        pair = (Change("accounts", 1, -3), Change("ledger", 2, 3))
        self._invoke("wide", pair, key="k", publishes=True)
        self._ask("status", 1, "undecided")
        self._commit("wide", pair, 1, key="k")
        self._told("wide", "committed", 1)
        lone = (Change("ledger", 4, -1), Change("ledger", 5, 1))
        self._invoke("lone", lone)
        self.markers += [Marker("ledger", "lone", n, *_where(lone[n]), 77) for n in range(2)]
        self._told("lone", "committed")
        self._invoke("failed", pair, publishes=True)
        self._told("failed", "aborted", 3, error="TransactionAborted: deadline")
        self._record(3, "abort")
        self._invoke("silent", pair)
        self._commit("silent", pair, 4, publishes=False)
        self._invoke("again", pair, key="k", publishes=True)
        self._told("again", "repeat", 1)
        self._ask("status", 1, "committed")
        self._ask("abort", 3, "aborted")
        self.clock = SCANS[1][1] + 1
        self._ask("status", 1, "forgotten")
        self._write(Ended)

    def evidence(self) -> Evidence:
        balances = {name: dict.fromkeys(range(8), BALANCE) for name in DATABASES}
        for marker in self.markers:
            balances[marker.database][marker.account] += marker.amount
        found = Found(
            log=LOG,
            planted=(STRANGER, "somebody else"),
            balances=balances,
            markers=tuple(self.markers),
            prepared=(STRANGER, "somebody else"),
            records=tuple(self.records),
            last_scan=SCANS[1][0],
            horizon=HORIZON,
            longest_gap=2.0,
        )
        return Evidence(
            options=Options(seed=1),
            histories=(History("client-0-0", tuple(self.lines)),),
            exits=(Exit("client-0-0", "ended"),),
            faults=(Fault("kill client", "client-1-0", 1.0, 1.0, 0.0),),
            found=found,
        )

    def _write(self, kind: type[Line], **fields: Any) -> None:
        self.clock += 1.0
        self.lines.append(kind(n=len(self.lines), at=self.clock, mono=self.clock, **fields))

    def _invoke(self, op: str, changes: tuple[Change, ...], **fields: Any) -> None:
        self._write(Invoked, op=op, how="connection", changes=changes, **fields)

    def _told(self, op: str, outcome: str, number: int | None = None, error: str = "") -> None:
        name = None if number is None else transaction(number)
        self._write(Told, op=op, outcome=outcome, transaction=name, error=error)

    def _ask(self, verb: str, number: int, status: str) -> None:
        began = self.clock + 0.5
        self._write(Asked, since=began, transaction=transaction(number), verb=verb, status=status)

    def _commit(
        self, op: str, changes: tuple[Change, ...], number: int, *, key: str | None = None,
        publishes: bool = True,
    ) -> None:  # fmt: skip
        name = transaction(number) if publishes else None
        for n, change in enumerate(changes):
            writer = 100 * number + n
            self.markers.append(Marker(change.database, op, n, *_where(change), writer, name, key))
        self._record(number, "commit", *(Named(c.database, 100 * number + n)
                                         for n, c in enumerate(changes)))  # fmt: skip

    def _record(self, number: int, verdict: str, *branches: Named) -> None:
        self.records.append(Recorded(transaction(number), verdict, branches, *SCANS))


def _where(change: Change) -> tuple[int, int]:
    return change.account, change.amount
