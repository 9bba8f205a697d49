"""What can be wrong with a run, planted in the evidence of one that went right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from tests.torture.story import OURS, SCANS, transaction
from tests.torture.values import (
    BALANCE,
    DATABASES,
    Asked,
    Ended,
    Evidence,
    Exit,
    Fault,
    Invoked,
    Line,
    Marker,
    Recorded,
    Told,
)

T = TypeVar("T")

# Damage.

DAMAGE: dict[str, tuple[str, Callable[[Evidence], Evidence]]] = {}
"""What was done to the evidence, by the invariant that must tell of it."""

Damage = Callable[[Evidence], Evidence]


def damage(invariant: str) -> Callable[[Damage], Damage]:
    def add(do: Damage) -> Damage:
        DAMAGE[do.__name__.replace("_", " ")] = (invariant, do)
        return do

    return add


def change(value: T, **fields: Any) -> T:
    return msgspec.structs.replace(value, **fields)  # type: ignore[type-var]


def found(evidence: Evidence, **fields: Any) -> Evidence:
    return change(evidence, found=change(evidence.found, **fields))


def markers(evidence: Evidence, edit: Callable[[Marker], Iterator[Marker]]) -> Evidence:
    """The rows edited, and the balances as if that had really happened."""
    rows = tuple(new for row in evidence.found.markers for new in edit(row))
    balances = {name: dict.fromkeys(range(8), BALANCE) for name in DATABASES}
    for row in rows:
        balances[row.database][row.account] += row.amount
    return found(evidence, markers=rows, balances=balances)


def lines(evidence: Evidence, edit: Callable[[Line], Line | None]) -> Evidence:
    (history,) = evidence.histories
    kept = tuple(new for line in history.lines if (new := edit(line)) is not None)
    return change(evidence, histories=(change(history, lines=kept),))


def told(evidence: Evidence, op: str, **fields: Any) -> Evidence:
    def edit(line: Line) -> Line:
        return change(line, **fields) if isinstance(line, Told) and line.op == op else line

    return lines(evidence, edit)


def records(evidence: Evidence, edit: Callable[[Recorded], Iterator[Recorded]]) -> Evidence:
    return found(evidence, records=tuple(n for r in evidence.found.records for n in edit(r)))


def without(op: str, *numbers: int) -> Callable[[Marker], Iterator[Marker]]:
    def edit(row: Marker) -> Iterator[Marker]:
        if row.op != op or (numbers and row.change not in numbers):
            yield row

    return edit


@damage("I1")
def a_branch_is_lost(evidence: Evidence) -> Evidence:
    return markers(evidence, without("wide", 1))


@damage("I1")
def a_branch_of_who_was_cut_off_is_lost(evidence: Evidence) -> Evidence:
    return markers(evidence, without("silent", 0))


@damage("I1")
def two_branches_follow_two_decisions(evidence: Evidence) -> Evidence:
    def edit(record: Recorded) -> Iterator[Recorded]:
        for number, branch in enumerate(record.branches):
            name = record.transaction if number == 0 else transaction(50)
            yield change(record, transaction=name, branches=(branch,))
        if not record.branches:
            yield record

    return records(evidence, edit)


@damage("once")
def a_branch_is_applied_twice(evidence: Evidence) -> Evidence:
    def edit(row: Marker) -> Iterator[Marker]:
        yield row
        if row.op == "silent" and row.change == 0:
            yield row

    return markers(evidence, edit)


@damage("once")
def an_operation_is_applied_twice(evidence: Evidence) -> Evidence:
    def edit(row: Marker) -> Iterator[Marker]:
        yield row
        if row.op == "lone":
            yield change(row, writer=row.writer + 1)

    return markers(evidence, edit)


@damage("once")
def two_attempts_are_applied(evidence: Evidence) -> Evidence:
    def edit(row: Marker) -> Iterator[Marker]:
        yield row
        if row.op == "wide":
            yield change(row, transaction=transaction(9), writer=900 + row.change)

    return markers(evidence, edit)


@damage("I4")
def an_acknowledged_commit_is_missing(evidence: Evidence) -> Evidence:
    return markers(evidence, without("lone"))


@damage("I4")
def an_aborted_one_is_applied(evidence: Evidence) -> Evidence:
    return told(evidence, "lone", outcome="aborted")


@damage("I4")
def a_status_said_committed_of_what_is_not_there(evidence: Evidence) -> Evidence:
    def edit(line: Line) -> Line:
        if isinstance(line, Asked) and line.verb == "abort":
            return change(line, status="committed")
        return line

    evidence = records(evidence, lambda r: iter([r] if r.verdict == "commit" else []))
    return lines(evidence, edit)


@damage("I4")
def a_commit_stands_in_the_log_and_nothing_is_there(evidence: Evidence) -> Evidence:
    evidence = told(evidence, "wide", outcome="unknown")
    return markers(evidence, without("wide"))


@damage("I3")
def the_log_says_abort_of_what_is_there(evidence: Evidence) -> Evidence:
    def edit(record: Recorded) -> Iterator[Recorded]:
        is_wide = record.transaction == transaction(1)
        yield change(record, verdict="abort", branches=()) if is_wide else record

    return records(evidence, edit)


@damage("I3")
def a_record_changes(evidence: Evidence) -> Evidence:
    def edit(record: Recorded) -> Iterator[Recorded]:
        yield change(record, last=SCANS[0])
        other = "commit" if record.verdict == "abort" else "abort"
        yield change(record, verdict=other, first=SCANS[1], last=SCANS[1])

    return records(evidence, edit)


@damage("I3")
def a_record_cannot_be_read(evidence: Evidence) -> Evidence:
    other = Recorded(transaction(60), "unreadable", (), *SCANS)
    return found(evidence, records=(*evidence.found.records, other))


@damage("I5")
def two_databases_without_a_record(evidence: Evidence) -> Evidence:
    return records(evidence, lambda r: iter([] if r.transaction == transaction(4) else [r]))


@damage("I5")
def a_published_one_without_a_record(evidence: Evidence) -> Evidence:
    def edit(line: Line) -> Line:
        is_lone = isinstance(line, Invoked) and line.op == "lone"
        return change(line, publishes=True) if is_lone else line

    return lines(evidence, edit)


@damage("I6")
def recovery_could_not_end_everything(evidence: Evidence) -> Evidence:
    return found(evidence, recover_exit=3)


@damage("I6")
def nothing_commits_after_the_faults(evidence: Evidence) -> Evidence:
    return found(evidence, calm_commits=0)


@damage("I6")
def a_process_does_not_end(evidence: Evidence) -> Evidence:
    return found(evidence, close_seconds=30.0)


@damage("I7")
def a_branch_is_left_prepared(evidence: Evidence) -> Evidence:
    return found(evidence, prepared=(*evidence.found.prepared, OURS))


@damage("I8")
def a_foreign_branch_is_gone(evidence: Evidence) -> Evidence:
    return found(evidence, prepared=("somebody else",))


@damage("I9")
def a_record_goes_above_the_horizon(evidence: Evidence) -> Evidence:
    return records(evidence, lambda record: iter([change(record, last=SCANS[0])]))


@damage("I11")
def a_status_goes_backwards(evidence: Evidence) -> Evidence:
    def edit(line: Line) -> Line:
        if isinstance(line, Asked) and line.status == "forgotten":
            return change(line, status="undecided")
        return line

    return lines(evidence, edit)


@damage("I11")
def the_log_forgets_what_it_holds(evidence: Evidence) -> Evidence:
    def edit(line: Line) -> Line:
        if isinstance(line, Asked) and line.status == "aborted":
            return change(line, status="forgotten", since=11.0, mono=11.5)
        return line

    return lines(evidence, edit)


@damage("money")
def money_is_created(evidence: Evidence) -> Evidence:
    balances = dict(evidence.found.balances)
    balances["ledger"] = balances["ledger"] | {7: BALANCE + 1}
    return found(evidence, balances=balances)


@damage("money")
def the_wrong_account_is_changed(evidence: Evidence) -> Evidence:
    def edit(row: Marker) -> Iterator[Marker]:
        yield change(row, account=6) if row.op == "lone" and row.change == 0 else row

    return markers(evidence, edit)


@damage("keys")
def a_key_is_applied_twice(evidence: Evidence) -> Evidence:
    def edit(row: Marker) -> Iterator[Marker]:
        yield row
        if row.op == "wide":
            yield change(row, op="again", transaction=transaction(5))

    return markers(told(evidence, "again", outcome="unknown", transaction=None), edit)


@damage("keys")
def a_repeat_is_told_another_transaction(evidence: Evidence) -> Evidence:
    return told(evidence, "again", transaction=transaction(4))


@damage("keys")
def a_repeat_gets_the_result_of_another(evidence: Evidence) -> Evidence:
    return told(evidence, "again", first="silent")


@damage("keys")
def a_repeat_is_applied_all_the_same(evidence: Evidence) -> Evidence:
    return told(evidence, "wide", outcome="repeat")


@damage("person")
def a_branch_ended_against_its_decision(evidence: Evidence) -> Evidence:
    return found(evidence, incidents=(OURS,))


@damage("told")
def a_caller_met_a_bug(evidence: Evidence) -> Evidence:
    return told(evidence, "failed", outcome="surprise", error="KeyError: 1")


@damage("told")
def a_process_died_by_itself(evidence: Evidence) -> Evidence:
    return change(evidence, exits=(*evidence.exits, Exit("client-3-0", "died with 1")))


@damage("history")
def rows_that_no_history_mentions(evidence: Evidence) -> Evidence:
    def edit(line: Line) -> Line | None:
        is_silent = isinstance(line, Invoked) and line.op == "silent"
        return None if is_silent else line

    return lines(evidence, edit)


@damage("history")
def the_end_of_a_history_is_missing(evidence: Evidence) -> Evidence:
    return lines(evidence, lambda line: None if isinstance(line, Ended) else line)


@damage("history")
def somebody_was_told_twice(evidence: Evidence) -> Evidence:
    (history,) = evidence.histories
    again = next(line for line in history.lines if isinstance(line, Told))
    *some, end = history.lines
    return change(evidence, histories=(change(history, lines=(*some, again, end)),))


@damage("history")
def a_fault_was_not_undone(evidence: Evidence) -> Evidence:
    return change(evidence, faults=(Fault("pause server", "", 1.0, 1.0, 2.0, "Traceback ..."),))
