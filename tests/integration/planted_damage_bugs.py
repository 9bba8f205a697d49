"""Mistakes in how an SQLite log treats records that it cannot read, each found by a named check.

Each is a function that plants it, given pytest's `monkeypatch`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator import codec
from coordinator.log.base import Page, Reading, Record
from coordinator.log.sqlite import log, store
from coordinator.log.sqlite.rows import Row
from coordinator.log.sqlite.store import Insertion, Store
from coordinator.model import ABORT, LogId, TransactionId

Bug = Callable[[pytest.MonkeyPatch], None]


def _is_readable(row: Row | None) -> bool:
    if row is None:
        return True
    try:
        codec.verdict_of(row.decision, transaction=codec.unpack_transaction(row.id))
    except ValueError:
        return False
    return True


def proposes_anew(patch: pytest.MonkeyPatch) -> None:
    """An unreadable record is presumed absent, and replaced by the next proposal."""
    propose = Store.propose

    def planted(self: Store, new: Insertion) -> object:
        if not _is_readable(self.read(new.id)):
            self._connection.execute("DELETE FROM record WHERE id = ?", (new.id,))
        return propose(self, new)

    patch.setattr(Store, "propose", planted)


def refuses_below_the_horizon(patch: pytest.MonkeyPatch) -> None:
    """It is presumed absent only where the horizon decides."""
    read = Store.read

    def planted(self: Store, key: bytes) -> Row | None:
        row = read(self, key)
        return row if _is_readable(row) or key >= self._horizon else None

    patch.setattr(Store, "read", planted)


def reads_absence(patch: pytest.MonkeyPatch) -> None:
    read = log.SQLiteLog.read

    async def planted(self: log.SQLiteLog, transaction: TransactionId) -> Reading:
        try:
            return await read(self, transaction)
        except log.LogUnavailable:
            return Reading(None, TransactionId(""))

    patch.setattr(log.SQLiteLog, "read", planted)


def reads_an_abort(patch: pytest.MonkeyPatch) -> None:
    decoded = log.decoded

    def planted(row: Row, log_id: LogId) -> Record:
        try:
            return decoded(row, log_id)
        except ValueError:
            return Record(codec.unpack_transaction(row.id), ABORT)

    patch.setattr(log, "decoded", planted)


def stops_the_scan(patch: pytest.MonkeyPatch) -> None:
    async def planted(
        self: log.SQLiteLog,
        after: TransactionId | None,
        limit: int,
        *,
        unfinished_only: bool = True,
    ) -> Page:
        _, identity = self._ready()
        start = b"" if after is None else codec.pack_transaction(after)
        rows = await self._read(
            lambda store: store.scan(start, limit, unfinished_only=unfinished_only)
        )
        return Page(tuple(self._record(row, identity) for row in rows), None)

    patch.setattr(log.SQLiteLog, "scan", planted)


def is_passed_over_by_scans(patch: pytest.MonkeyPatch) -> None:
    scan = Store.scan

    def planted(self: Store, after: bytes, limit: int, *, unfinished_only: bool) -> list[Row]:
        rows = scan(self, after, limit, unfinished_only=unfinished_only)
        return [row for row in rows if _is_readable(row)]

    patch.setattr(Store, "scan", planted)


def is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store, "is_finished", lambda row, log: True)


def holds_up_forgetting(patch: pytest.MonkeyPatch) -> None:
    def planted(self: Store, limit: int) -> int:
        rows = self._connection.execute(
            "SELECT id, decision, unmarked, answer FROM record "
            "WHERE id < ? AND unfinished = 0 ORDER BY id LIMIT ?",
            (self._horizon, limit),
        )
        gone = [row for row in (Row(*each) for each in rows) if _is_readable(row)]
        for row in gone:
            self._connection.execute("DELETE FROM record WHERE id = ?", (row.id,))
        return len(gone)

    patch.setattr(Store, "_forget_records", planted)


def checksum_is_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(codec, "_is_changed", lambda data, transaction: False)


def marks_of_strangers_count(patch: pytest.MonkeyPatch) -> None:
    """A changed list of open branches makes a branch count as ended."""
    decoded = log.decoded

    def planted(row: Row, log_id: LogId) -> Record:
        try:
            return decoded(row, log_id)
        except ValueError as error:
            if "marks of other" not in str(error):
                raise
            return decoded(Row(row.id, row.decision, b"", row.answer), log_id)

    patch.setattr(log, "decoded", planted)


BUGS: dict[Bug, str] = {
    proposes_anew: "it_is_never_decided_again",
    refuses_below_the_horizon: "it_is_never_decided_again",
    reads_absence: "reading_it_is_an_error_and_not_absence",
    reads_an_abort: "reading_it_is_an_error_and_not_absence",
    stops_the_scan: "scans_show_it_and_all_others",
    is_passed_over_by_scans: "scans_show_it_and_all_others",
    is_forgotten: "it_is_never_deleted_and_holds_up_no_other",
    holds_up_forgetting: "it_is_never_deleted_and_holds_up_no_other",
    checksum_is_not_compared: "reading_it_is_an_error_and_not_absence",
    marks_of_strangers_count: "reading_it_is_an_error_and_not_absence",
}
