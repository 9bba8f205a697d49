"""What must hold of a whole run. Pure: evidence in, violations out.

The names are those of `docs/design.md` section 3, with a few more for what only a run of real
processes can break. The checker knows properties and no mechanism: who told what to whom, which
rows are there, what the log was seen to hold.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

import msgspec

from coordinator.model import Xid
from tests.torture.values import (
    BALANCE,
    DATABASES,
    SETTINGS,
    Asked,
    Change,
    Ended,
    Evidence,
    Invoked,
    Marker,
    Told,
)

INVARIANTS = {
    "I1": "agreement: of an operation all rows are there or none",
    "I3": "irrevocability: what the log holds under an id never changes",
    "I4": "truthful acknowledgement: what a caller was told holds",
    "I5": "decision before phase two: what needs a record has one that commits it",
    "I6": "completion: when the faults are over everything ends, and work goes on",
    "I7": "no orphan: no branch of ours stays prepared",
    "I8": "a branch of another log, or of nobody we know, is never touched",
    "I9": "a record goes only below the horizon",
    "I11": "a status never goes backwards, but to forgotten",
    "once": "nothing is applied twice, and nothing that nobody asked for",
    "money": "every balance is what its marker rows add up to, and the total never changes",
    "keys": "an idempotency key commits once, and repeats are told of that one",
    "person": "nobody meddled, so no branch needs a person",
    "told": "no caller meets an exception that is a bug, and no process dies by itself",
    "history": "the histories are whole",
}
GAP_SECONDS_MAX = SETTINGS.retention - SETTINGS.timeout_max - 4
"""With longer pauses between its scans, the observer may have missed a record."""
CLOSE_SECONDS_MAX = 25.0


class Violation(msgspec.Struct, frozen=True):
    """`name` is one of `INVARIANTS`."""

    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name} ({INVARIANTS[self.name]}): {self.detail}"


def check(evidence: Evidence) -> list[Violation]:
    """Everything that is wrong, in the order of the checks."""
    run = _Run(evidence)
    checks = (
        run.histories, run.rows, run.told, run.keys, run.statuses, run.records, run.decisions,
        run.left_behind, run.money, run.processes, run.end,
    )  # fmt: skip
    return [violation for each in checks for violation in each()]


class _Run:
    """The evidence, ordered by operation and by transaction."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.found = evidence.found
        self.markers: dict[str, list[Marker]] = defaultdict(list)
        for marker in self.found.markers:
            self.markers[marker.op].append(marker)
        self.invoked: dict[str, Invoked] = {}
        self.answers: dict[str, Told] = {}
        self.asked: list[Asked] = []
        self._wrong: list[Violation] = []
        for history in evidence.histories:
            self._wrong += [Violation("history", damage) for damage in history.damage]
            for line in history.lines:
                self._take(line, history.name)

    def _take(self, line: object, name: str) -> None:
        if isinstance(line, Asked):
            self.asked.append(line)
        elif isinstance(line, Invoked):
            if line.op in self.invoked:
                self._wrong.append(Violation("history", f"{name}: {line.op} began twice"))
            self.invoked[line.op] = line
        elif isinstance(line, Told):
            if line.op in self.invoked and line.op not in self.answers:
                self.answers[line.op] = line
            else:
                why = f"{name}: {line.op} was told without having begun, or twice"
                self._wrong.append(Violation("history", why))

    @cached_property
    def transactions(self) -> dict[str, str]:
        """The operation of each transaction whose id is known: by its rows, or by what was told."""
        known = {
            told.transaction: told.op
            for told in self.answers.values()
            if told.transaction is not None and told.outcome != "repeat"
        }
        return known | {m.transaction: m.op for m in self.found.markers if m.transaction}

    def is_applied(self, op: str) -> bool:
        return op in self.markers

    # The checks.

    def histories(self) -> Iterator[Violation]:
        yield from self._wrong
        for op in self.markers.keys() - self.invoked.keys():
            yield Violation("history", f"rows of {op} are there, which no history mentions")

    def rows(self) -> Iterator[Violation]:
        for op, invoked in self.invoked.items():
            rows = self.markers.get(op)
            if rows:
                yield from _rows_of(op, invoked.changes, rows)

    def told(self) -> Iterator[Violation]:
        for op, told in self.answers.items():
            applied, expected = self.is_applied(op), bool(self.invoked[op].changes)
            if told.outcome == "committed" and expected and not applied:
                yield Violation("I4", f"{op} was told committed, and nothing of it is there")
            if told.outcome == "aborted" and applied:
                yield Violation("I4", f"{op} was told {told.error}, but it is there")
            if told.outcome == "repeat" and applied:
                yield Violation("keys", f"{op} was told to be a repeat, but it is there")
            if told.outcome == "surprise":
                yield Violation("told", f"{op} was told {told.error}")
        for asked in self.asked:
            op = self.transactions.get(asked.transaction)
            if op not in self.invoked or not self.invoked[op].changes:
                continue
            if asked.status == "committed" and not self._has(op, asked.transaction):
                yield Violation("I4", f"{asked.transaction} was said committed: {op} is not there")
            if asked.status == "aborted" and self._has(op, asked.transaction):
                yield Violation("I4", f"{asked.transaction} was said aborted: {op} is there")

    def _has(self, op: str, transaction: str) -> bool:
        """Whether that transaction of the operation is applied; it may have run several times."""
        return any(m.transaction in (None, transaction) for m in self.markers.get(op, ()))

    def keys(self) -> Iterator[Violation]:
        applied: dict[str, set[str]] = defaultdict(set)
        for marker in self.found.markers:
            if marker.key is not None:
                applied[marker.key].add(marker.op)
        for key, ops in applied.items():
            if len(ops) > 1:
                yield Violation("keys", f"key {key} was applied by {', '.join(sorted(ops))}")
        for op, told in self.answers.items():
            if told.outcome != "repeat":
                continue
            key = self.invoked[op].key
            winners = self._winners(key)
            if told.first is not None and told.first not in winners:
                yield Violation("keys", f"{op} got the result of {told.first}, not of {winners}")
            names = [self._names(each) for each in winners]
            known = told.first is None and all(names)
            if known and not any(told.transaction in each for each in names):
                why = f"{op} was told that {told.transaction} has key {key}, but {winners} have"
                yield Violation("keys", why)

    def _winners(self, key: str | None) -> list[str]:
        """The operations that may have taken the key: applied, or with nothing to apply."""
        return [
            op
            for op in self._by_key.get(key, ())
            if self.is_applied(op)
            or (not self.invoked[op].changes and self._may_have_committed(op))
        ]

    @cached_property
    def _by_key(self) -> dict[str | None, list[str]]:
        by_key: dict[str | None, list[str]] = defaultdict(list)
        for op, invoked in self.invoked.items():
            by_key[invoked.key].append(op)
        by_key.pop(None, None)
        return by_key

    def _may_have_committed(self, op: str) -> bool:
        told = self.answers.get(op)
        return told is None or told.outcome in ("committed", "unknown")

    def _names(self, op: str) -> set[str]:
        """The transactions that applied an operation; none if it left no row and told no id."""
        rows = self.markers.get(op, ())
        names = {self.committed.get((m.database, m.writer)) for m in rows}
        names |= {m.transaction for m in rows}
        if op in self.answers and not self.invoked[op].changes:
            names.add(self.answers[op].transaction)
        return {name for name in names if name is not None}

    @cached_property
    def committed(self) -> dict[tuple[str, int], str]:
        """The transaction of each branch that a commit record names."""
        return {
            (branch.database, branch.writer): record.transaction
            for record in self.found.records
            if record.verdict == "commit"
            for branch in record.branches
        }

    def statuses(self) -> Iterator[Violation]:
        """Reads that did not overlap: the later one never says less, nor something else."""
        reads: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for asked in self.asked:
            reads[asked.transaction].append((asked.since, asked.mono, asked.status))
        for record in self.found.records:
            for began, ended in {record.first, record.last}:
                read = (began, ended, _STATUS.get(record.verdict, "undecided"))
                reads[record.transaction].append(read)
        for transaction, seen in reads.items():
            yield from _backwards(transaction, seen)

    def records(self) -> Iterator[Violation]:
        verdicts: dict[str, set[str]] = defaultdict(set)
        for record in self.found.records:
            verdicts[record.transaction].add(record.verdict)
            if record.verdict not in _STATUS:
                yield Violation("I3", f"the log holds {record.verdict} under {record.transaction}")
            gone = record.last[0] < self.found.last_scan
            if gone and record.transaction >= self.found.horizon:
                yield Violation("I9", f"the record of {record.transaction} went above the horizon")
            op = self.transactions.get(record.transaction)
            if op not in self.invoked or not self.invoked[op].changes:
                continue
            if record.verdict == "commit" and not self._has(op, record.transaction):
                yield Violation("I4", f"{record.transaction} commits in the log: {op} is not there")
            if record.verdict == "abort" and self._has_named(op, record.transaction):
                yield Violation("I3", f"{record.transaction} aborts in the log, but {op} is there")
        for transaction, found in verdicts.items():
            if len(found) > 1:
                yield Violation("I3", f"the log held {' and '.join(found)} under {transaction}")

    def _has_named(self, op: str, transaction: str) -> bool:
        return any(m.transaction == transaction for m in self.markers.get(op, ()))

    def decisions(self) -> Iterator[Violation]:
        """Rows and commit records belong together, by the servers' own transaction numbers."""
        writers = {(m.database, m.writer) for m in self.found.markers}
        for branch, transaction in self.committed.items():
            if branch not in writers:
                where, _ = branch
                yield Violation("I1", f"{transaction} commits, but not its rows in {where}")
        if self.found.longest_gap > GAP_SECONDS_MAX:
            return
        for op, rows in self.markers.items():
            published = op in self.invoked and self.invoked[op].publishes
            if len({m.database for m in rows}) < 2 and not published:
                continue  # one phase: the database's own commit was the decision
            by = {self.committed.get((m.database, m.writer)) for m in rows}
            if by == {None}:
                yield Violation("I5", f"{op} is there without a record that commits it")
            elif len(by) > 1:
                yield Violation("I1", f"{op} is there by several decisions: {by}")

    def left_behind(self) -> Iterator[Violation]:
        prepared = Counter(self.found.prepared)
        for gid in self.found.planted:
            if prepared.pop(gid, 0) != 1:
                yield Violation("I8", f"{gid}, which is not ours, is gone")
        for gid in prepared:
            xid = Xid.parse(gid)
            ours = xid is not None and xid.log == self.found.log
            yield Violation("I7" if ours else "I8", f"{gid} is prepared still")

    def money(self) -> Iterator[Violation]:
        moved: Counter[tuple[str, int]] = Counter()
        for marker in self.found.markers:
            moved[marker.database, marker.account] += marker.amount
        total = 0
        for database in DATABASES:
            for account, balance in self.found.balances[database].items():
                total += balance - BALANCE
                expected = BALANCE + moved[database, account]
                if balance != expected:
                    yield Violation(
                        "money", f"account {account} of {database} has {balance}, not {expected}"
                    )
        if total:
            yield Violation("money", f"there is {total:+} in all accounts together")

    def processes(self) -> Iterator[Violation]:
        last = {each.name: each.lines[-1] for each in self.evidence.histories if each.lines}
        for gone in self.evidence.exits:
            if gone.how not in ("killed", "ended", "stopped"):
                yield Violation("told", f"client process {gone.name} {gone.how}")
            begun = gone.how != "stopped" or gone.name in last
            if gone.how != "killed" and begun and not isinstance(last.get(gone.name), Ended):
                yield Violation("history", f"{gone.name} {gone.how}, but its history does not end")

    def end(self) -> Iterator[Violation]:
        found = self.found
        if found.recover_exit:
            yield Violation("I6", f"`syncpoint recover` left with {found.recover_exit}")
        if not found.calm_commits:
            yield Violation("I6", "nothing was committed after the faults had ended")
        if found.close_seconds > CLOSE_SECONDS_MAX:
            yield Violation("I6", f"a process took {found.close_seconds:.0f} s to end")
        for incident in found.incidents:
            yield Violation("person", incident)
        for fault in self.evidence.faults:
            if fault.error:
                yield Violation("history", f"the fault {fault.kind} failed itself: {fault.error}")


_STATUS = {"commit": "committed", "abort": "aborted"}
_RANKS = {"undecided": 0, "committed": 1, "aborted": 1, "forgotten": 2}


def _rows_of(op: str, changes: tuple[Change, ...], rows: list[Marker]) -> Iterator[Violation]:
    counts = Counter(row.change for row in rows)
    missing = [number for number in range(len(changes)) if not counts[number]]
    if missing:
        lost = ", ".join(f"{changes[n].database} {changes[n].amount:+}" for n in missing)
        yield Violation("I1", f"of {op} only a part is there: {lost} is not")
    for number, count in counts.items():
        if count > 1:
            yield Violation("once", f"change {number} of {op} is there {count} times")
    if len({row.transaction for row in rows}) > 1:
        yield Violation("once", f"{op} is there by two of its transactions")
    for row in rows:
        intended = changes[row.change] if row.change < len(changes) else None
        if intended != Change(row.database, row.account, row.amount):
            yield Violation("money", f"change {row.change} of {op} is another than intended")


def _backwards(transaction: str, reads: Iterable[tuple[float, float, str]]) -> Iterator[Violation]:
    by_end = sorted(reads, key=lambda read: read[1])
    earlier: set[str] = set()
    position = 0
    for began, _, status in sorted(by_end):
        while by_end[position][1] < began:
            earlier.add(by_end[position][2])
            position += 1
        for former in earlier:
            less = _RANKS[status] < _RANKS[former]
            if less or (_RANKS[status] == _RANKS[former] and status != former):
                yield Violation("I11", f"{transaction} was {former}, and later {status}")
    # What overlapped must agree as well.
    if len({status for _, _, status in by_end} & {"committed", "aborted"}) > 1:
        yield Violation("I11", f"{transaction} was said committed and aborted")
