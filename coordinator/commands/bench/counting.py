"""What a measurement used: processor time, memory, log writes and fsyncs.

Processor time of the servers and memory are read from /proc, and None where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from coordinator.log.sqlite import SQLiteLog

FSYNCS_OF_CHECKPOINT = 3
"""Of the write-ahead log before it is copied, of the file after that, and of the first header of
the write-ahead log that begins anew."""

_LAZY = ("finish", "swept", "raise_horizon", "forget")
_PROC = Path("/proc")


class LogUse(msgspec.Struct, frozen=True):
    """What was asked of a log and done with its file, from one moment to another."""

    decisions: int
    writes: int
    """Write transactions, each with one fsync."""
    lazy_calls: int
    """Finished marks and housekeeping, which no caller waits for, and how many have ended."""
    lazy_ended: int
    checkpoints: int

    def since(self, former: LogUse) -> LogUse:
        """Between two moments; a lazy call counts if any part of it may fall between them."""
        return LogUse(
            self.decisions - former.decisions,
            self.writes - former.writes,
            self.lazy_calls - former.lazy_ended,
            self.lazy_ended - former.lazy_ended,
            self.checkpoints - former.checkpoints,
        )

    @property
    def decision_writes(self) -> int:
        """Write transactions that callers waited for.

        Exact where decisions are proposed one at a time. Where several share a write it is the most
        there can have been, since a lazy call may have shared it too. A write that is neither a
        decision's nor a lazy call's counts here, so that it cannot hide.
        """
        return max(min(self.decisions, self.writes), self.writes - self.lazy_calls)

    @property
    def fsyncs(self) -> int:
        """Of the log's files, to within those of one checkpoint."""
        return self.writes + FSYNCS_OF_CHECKPOINT * self.checkpoints


class LogWatch:
    """Counts the use of an open log from now on. A log is watched by one at most."""

    def __init__(self, log: SQLiteLog) -> None:
        self._log = log
        self._lazy_calls = self._lazy_ended = 0
        for name in _LAZY:
            setattr(log, name, self._counted(getattr(log, name)))

    def use(self) -> LogUse:
        """Since the log was opened."""
        statistics = self._log.statistics
        return LogUse(
            statistics.proposals,
            statistics.write_transactions,
            self._lazy_calls,
            self._lazy_ended,
            _checkpoints(self._log.path),
        )

    def _counted(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(method)
        async def call(*arguments: Any, **options: Any) -> Any:
            self._lazy_calls += 1
            try:
                return await method(*arguments, **options)
            finally:
                self._lazy_ended += 1

        return call


def _checkpoints(log: Path) -> int:
    """How often the write-ahead log has begun anew: bytes 12 to 15 of its header.

    Reading the file harms nothing: SQLite holds no lock on it, unlike on the two others.
    """
    try:
        with open(f"{log}-wal", "rb") as file:
            return int.from_bytes(file.read(16)[12:16], "big")
    except FileNotFoundError:
        return 0


def servers_cpu_seconds(processes: Iterable[int]) -> float | None:
    """Processor time until now of the servers with these first processes: of those themselves and
    of their children that run."""
    first = set(processes)
    if not first or not (_PROC / "self" / "schedstat").exists():
        return None
    nanoseconds = 0
    for folder in _PROC.glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
            # The name, in parentheses, may hold anything; the state and the parent come after it.
            parent = int(text[text.rindex(")") + 2 :].split()[1])
            if parent in first or int(folder.name) in first:
                # The times in `stat` are too coarse: a session may use less than a tick.
                nanoseconds += int((folder / "schedstat").read_text().split()[0])
        except OSError:
            continue  # it has ended meanwhile
    return nanoseconds / 1e9


def resident_peak_mb() -> float | None:
    """The most memory of this process that was resident at any time, in MB."""
    try:
        status = (_PROC / "self" / "status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None
