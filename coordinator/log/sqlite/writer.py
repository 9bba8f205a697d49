"""The one thread of a process that uses a log's file, and its queue.

Everything queued while the former transaction was being fsynced goes into the next one: many
decisions share a write. Answers are handed out after the commit, in one call for each event loop.
The queue is first in, first out; reads go through it too, so they see every answer given before.

An error of the file fails the whole batch, each caller with a `LogUnavailable` of its own; an error
of the disk or a damaged file ends the use of the file in this process. What a caller awaits may be
cancelled at any time: the work is done all the same and its answer dropped.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import queue
import threading
from pathlib import Path
from typing import Any

import apsw
import msgspec

from coordinator.errors import ConfigurationError, LogUnavailable
from coordinator.log.base import LogIdentity
from coordinator.log.sqlite import file
from coordinator.log.sqlite.jobs import Failed, Job, Work, deliver, settle, unavailable
from coordinator.log.sqlite.lock import FileLock, same_file
from coordinator.log.sqlite.store import Insertion, Store
from coordinator.logs import note

logger = logging.getLogger("syncpoint.log")

BATCH_MAX = 1_000
LOCK_TIMEOUT_SECONDS = 5.0
CHECKPOINT_FRAMES = 1_000
"""About 4 MiB of write-ahead log; a checkpoint then takes a few milliseconds, after the answers."""


class Statistics(msgspec.Struct):
    """Counted since the file was opened; each write transaction is one fsync."""

    proposals: int = 0
    write_transactions: int = 0


class Writer:
    """Shared by all logs of this process that are open on one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.statistics = Statistics()
        self.forked = False
        self.users = 0
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ended: asyncio.Future[None] | None = None
        self._lock: FileLock | None = None
        self._connection: apsw.Connection | None = None
        self._store: Store | None = None
        self._identity: LogIdentity | None = None
        self._opened_file: os.stat_result | None = None
        self._broken: str | None = None
        self._over = False
        self._in_use = threading.Lock()
        self._suspended = False
        self._frames = 0
        self._checkpoint_at = CHECKPOINT_FRAMES
        # A daemon, so that a program that forgot to close can end; `_stop_all` then ends it first.
        self._thread = threading.Thread(
            target=self._run, name=f"decision log {path.name}", daemon=True
        )

    @classmethod
    def acquire(cls, path: Path) -> Writer:
        """The writer of a file, started if it is the first use; to be given back by `release`."""
        with _guard:
            reason = _broken_files.get(path)
            if reason is not None:
                raise ConfigurationError(reason)
            writer = _writers.get(path)
            if writer is None:
                writer = _writers[path] = cls(path)
                _running.add(writer)
                writer._thread.start()
            writer.users += 1
            return writer

    async def release(self) -> None:
        """Finish what was queued before; the last user also closes the file and ends the thread."""
        if self.forked:
            return
        with _guard:
            self.users -= 1
            last = self.users == 0
            if last and _writers.get(self.path) is self:
                del _writers[self.path]
        if last:
            self._ended = asyncio.get_running_loop().create_future()
            self._queue.put(None)
            await self._ended
            self._thread.join()
            return
        with contextlib.suppress(LogUnavailable):  # the callers of what was queued are told
            await self.submit(lambda store: None, writes=False)

    def submit(self, work: Work, *, writes: bool) -> asyncio.Future[Any]:
        """Queue some work; the future is the running loop's. Raises if this is a forked copy."""
        if self.forked:
            raise ConfigurationError(
                f"the decision log {self.path} was opened before this process was forked: open "
                "one in the child, after the fork"
            )
        if self._over:
            raise LogUnavailable(self._closed())
        future = asyncio.get_running_loop().create_future()
        self._queue.put(Job(future, work, writes))
        return future

    def _closed(self) -> str:
        return f"the decision log {self.path} is closed"

    def _run(self) -> None:
        try:
            stopping = False
            while not stopping:
                batch, stopping = self._next_batch()
                with self._in_use:
                    outcomes = self._perform(batch)
                deliver(batch, outcomes)
                if self._frames >= self._checkpoint_at:
                    with self._in_use:
                        self._checkpoint()
        finally:
            self._over = True
            with self._in_use:
                self._close()
            with _guard:
                _running.discard(self)
            while late := self._next_batch(wait=False)[0]:
                deliver(late, [unavailable(self._closed(), None) for _ in late])
            if self._ended is not None:
                settle(self._ended.get_loop(), [(self._ended, None)])

    def _next_batch(self, *, wait: bool = True) -> tuple[list[Job], bool]:
        """What is queued, and whether to stop after it."""
        batch: list[Job] = []
        try:
            while len(batch) < BATCH_MAX:
                job = self._queue.get(block=wait and not batch)
                if job is None:
                    return batch, True
                batch.append(job)
        except queue.Empty:
            pass
        return batch, False

    def _perform(self, batch: list[Job]) -> list[object]:
        """One outcome for each job."""
        if not batch:
            return []
        try:
            if self._suspended or any(job.work is None for job in batch):
                self._open()
            return self._transact(batch)
        except ConfigurationError as error:
            return [Failed(ConfigurationError(str(error))) for _ in batch]
        except LogUnavailable as error:
            return [unavailable(str(error), error.__cause__) for _ in batch]
        except apsw.Error as error:
            reason = self._reason(error)
            return [unavailable(reason, error) for _ in batch]
        except Exception as error:
            self._note(logging.ERROR, "batch-failed", "a batch failed", exc_info=error)
            return [unavailable(f"a batch of {self.path} failed: {error}", error) for _ in batch]

    def _open(self) -> None:
        """Open the file unless it is open. Runs in the writer's thread, as all use of it does."""
        if self._connection is not None or self._broken is not None:
            return
        file.check_place(self.path)
        lock_path = self.path.with_name(self.path.name + ".lock")
        try:
            self._lock = self._lock or FileLock(lock_path)
        except OSError as error:
            raise ConfigurationError(
                f"the decision log {self.path} cannot be used: {lock_path} cannot be opened for "
                f"writing ({error.strerror}); give this user the right to write in that directory"
            ) from error
        self._lock.acquire(LOCK_TIMEOUT_SECONDS)
        try:
            if self._suspended:
                self._check_in_place(self._lock)
            self._connection, self._identity = file.open_file(self.path)
            self._suspended = False
            self._opened_file = os.stat(self.path)
            self._store = Store(self._connection, self._identity.id)
            self._connection.set_wal_hook(self._count_frames)
        finally:
            self._lock.release()

    def _count_frames(self, connection: apsw.Connection, name: str, frames: int) -> int:
        self._frames = frames
        return apsw.SQLITE_OK

    def _transact(self, batch: list[Job]) -> list[object]:
        connection, store, lock = self._connection, self._store, self._lock
        if self._broken is not None:
            raise LogUnavailable(self._broken)
        if connection is None or store is None or lock is None:
            raise LogUnavailable(f"the decision log {self.path} is not open")
        lock.acquire(LOCK_TIMEOUT_SECONDS)
        try:
            self._check_in_place(lock)
            decisions = [job.work for job in batch if isinstance(job.work, Insertion)]
            if len(decisions) == len(batch) and store.record_at_once(decisions):
                self.statistics.proposals += len(batch)
                self.statistics.write_transactions += 1
                return [None] * len(batch)
            changes = connection.total_changes()
            writes = any(job.writes for job in batch)
            connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                store.begin()
                outcomes = [self._outcome(job, connection, store) for job in batch]
                connection.execute("COMMIT")
            except BaseException:
                self._roll_back(connection)
                raise
        finally:
            lock.release()
        if connection.total_changes() != changes:
            self.statistics.write_transactions += 1
        return outcomes

    def _roll_back(self, connection: apsw.Connection) -> None:
        try:
            if connection.in_transaction:  # after some errors SQLite has done it already
                connection.execute("ROLLBACK")
        except apsw.Error as error:
            self._break(
                f"a transaction of the decision log {self.path} could not be rolled back "
                f"({error}): restart this process"
            )

    def _outcome(self, job: Job, connection: apsw.Connection, store: Store) -> object:
        work = job.work
        if isinstance(work, Insertion):
            self.statistics.proposals += 1
            return store.propose(work)
        if work is None:
            return self._identity
        # An exception that is not the file's is the caller's alone: it undoes this work only.
        connection.execute("SAVEPOINT work")
        try:
            outcome = work(store)
        except apsw.Error:
            raise
        except Exception as error:
            connection.execute("ROLLBACK TO work")
            outcome = Failed(error)
        connection.execute("RELEASE work")
        return outcome

    def _check_in_place(self, lock: FileLock) -> None:
        opened = self._opened_file
        if opened is None or not same_file(self.path, opened) or not lock.is_in_place():
            reason = (
                f"the decision log {self.path} or its .lock file was moved, deleted or replaced "
                "while it was open: put it back and restart this process"
            )
            self._break(reason)
            raise LogUnavailable(reason)

    def _reason(self, error: apsw.Error) -> str:
        """What to tell the callers of a failed batch; a fatal error ends the use of the file."""
        number = self._connection.system_errno if self._connection is not None else 0
        if file.is_disk_full(error, number):
            return f"the disk of the decision log {self.path} is full: make space"
        if not file.is_fatal(error, number):
            return f"the decision log {self.path} did not answer: {error}"
        reason = (
            f"the decision log {self.path} had an error of its disk, or is damaged ({error}): "
            "restart this process, which checks the file; if it is damaged, restore a backup: "
            "`syncpoint log restore FILE --force`"
        )
        self._break(reason)
        _broken_files[self.path] = reason
        return reason

    def _break(self, reason: str) -> None:
        self._note(logging.ERROR, "log-broken", reason)
        self._broken = reason
        self._frames = 0
        if self._connection is not None:
            file.close_without_checkpoint(self._connection)
        self._connection = self._store = None

    def _checkpoint(self) -> None:
        """Copy the write-ahead log into the file, as far as no reader needs it."""
        if self._connection is None or self._lock is None:
            return
        self._checkpoint_at = self._frames + CHECKPOINT_FRAMES
        try:
            self._lock.acquire(LOCK_TIMEOUT_SECONDS)
            try:
                total, copied = self._connection.wal_checkpoint("main")
            finally:
                self._lock.release()
        except apsw.Error as error:
            self._note(logging.WARNING, "no-checkpoint", self._reason(error))
            return
        except Exception as error:
            self._note(logging.WARNING, "no-checkpoint", f"no checkpoint: {error}")
            return  # the next one will do
        self._frames = 0
        if total == copied:
            self._checkpoint_at = CHECKPOINT_FRAMES

    def _note(self, level: int, what: str, why: str, **fields: Any) -> None:
        note(logger, level, what, "%s: %s", self.path, why, path=str(self.path), **fields)

    def _close(self) -> None:
        connection, lock = self._connection, self._lock
        self._connection = self._store = self._lock = None
        if connection is not None and lock is not None:
            try:
                lock.acquire(LOCK_TIMEOUT_SECONDS)  # the last connection makes a checkpoint
                connection.close(True)
            except (LogUnavailable, apsw.Error):
                file.close_without_checkpoint(connection)
        if lock is not None:
            lock.close()

    def suspend(self) -> None:
        """Before a fork: wait for what is being written, and close the file.

        SQLite keeps its knowledge of locks in the process. A child that inherited it would believe
        that it has the locks of its parent, and what it then wrote could be lost: nothing of SQLite
        may be open at a fork, also not where the child opens a log of its own.
        """
        self._in_use.acquire()
        if self._connection is not None:
            file.close_without_checkpoint(self._connection)
            self._connection = self._store = None
            self._suspended = True

    def resume(self) -> None:
        """After a fork, in the parent: the next batch opens the file again."""
        self._in_use.release()

    def abandon(self) -> None:
        """After a fork, in the child: the parent's lock must not be kept alive here."""
        self.forked = True
        if self._lock is not None:
            self._lock.close()


_guard = threading.Lock()
_writers: dict[Path, Writer] = {}
_running: set[Writer] = set()
_broken_files: dict[Path, str] = {}


def _stop_all() -> None:
    """At the end of the interpreter: a thread that then still ran could not end well."""
    for writer in list(_running):
        writer._queue.put(None)
        writer._thread.join()


def _before_fork() -> None:
    _guard.acquire()  # nobody holds it who waits for a writer
    for writer in _running:
        writer.suspend()


def _after_fork_in_parent() -> None:
    for writer in _running:
        writer.resume()
    _guard.release()


def _after_fork_in_child() -> None:
    for writer in _running:
        writer.abandon()
    _running.clear()
    _writers.clear()
    _guard.release()


atexit.register(_stop_all)
os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
