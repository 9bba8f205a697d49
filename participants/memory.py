"""A participant in memory: a key-value store with prepared branches, for tests of services.

It behaves as a database does: writes are seen by their own transaction at once and by others after
the commit, a key that another branch has written is refused at once (retryable) instead of waited
for, and prepared branches survive `close`, as they would survive a restart. Several participants
may share a `MemoryStore`, as several processes share a database.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any
from uuid import uuid4

from coordinator.context import required
from coordinator.errors import (
    ConfigurationError,
    ProtocolError,
    TransactionAborted,
    TransactionError,
)
from coordinator.model import (
    FINISHED,
    Branch,
    BranchId,
    Ending,
    EndingKind,
    Verdict,
    Vote,
    VoteKind,
    Xid,
)
from coordinator.participant import Binding
from coordinator.transactional import GlobalTransaction


class MemoryStore:
    """What would be on disk: the committed values and the prepared branches."""

    def __init__(self) -> None:
        self.identity = f"memory:{uuid4()}"
        self.committed: dict[str, Any] = {}
        self.prepared: dict[BranchId, tuple[Xid, dict[str, Any]]] = {}
        self.ended: dict[BranchId, Verdict] = {}
        self.writers: dict[str, BranchId] = {}


class BlockingMemory:
    """`put` and `get` for a synchronous transaction; see `Memory`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def put(self, key: str, value: Any) -> None:
        transaction = required(f"{self._memory.name}.blocking.put()", blocking=True)
        transaction.run(self._memory._put(transaction, key, value))

    def get(self, key: str) -> Any:
        transaction = required(f"{self._memory.name}.blocking.get()", blocking=True)
        return transaction.run(self._memory._get(transaction, key))


class Memory:
    """A key-value store under a name. `None` is no value: putting it deletes the key."""

    def __init__(self, name: str, store: MemoryStore | None = None) -> None:
        if not name:
            raise ConfigurationError("a participant has a name, such as 'stock'")
        self._name = name
        self.blocking = BlockingMemory(self)
        """The same verbs for synchronous callers."""
        self.store = store or MemoryStore()
        self._binding: Binding | None = None
        self._process = 0
        # Keyed by the object: asking a transaction for its id makes its commit a recorded one.
        self._xids: dict[GlobalTransaction, Xid] = {}
        self._open: dict[BranchId, dict[str, Any]] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def committed(self) -> Mapping[str, Any]:
        """The committed values, whoever runs; not for use inside a transaction."""
        return dict(self.store.committed)

    async def put(self, key: str, value: Any) -> None:
        """Write in the running transaction.

        Raises `TransactionError` outside one, `TransactionAborted` (retryable) when another branch
        has written the key and has not ended.
        """
        await self._put(required(f"{self._name}.put()", blocking=False), key, value)

    async def get(self, key: str) -> Any:
        """Read in the running transaction: its own write, or what is committed, or None."""
        return await self._get(required(f"{self._name}.get()", blocking=False), key)

    async def _put(self, transaction: GlobalTransaction, key: str, value: Any) -> None:
        branch = await self._enlist(transaction)
        holder = self.store.writers.setdefault(key, branch)
        if holder != branch:
            raise TransactionAborted(
                f"{self._name}: {key!r} is being written by branch {holder}", retryable=True
            )
        self._open[branch][key] = value

    async def _get(self, transaction: GlobalTransaction, key: str) -> Any:
        branch = await self._enlist(transaction)
        return self._open[branch].get(key, self.store.committed.get(key))

    async def open(self, binding: Binding) -> str:
        if self._binding is not None and self._process != os.getpid():
            await self.close()  # what was open belongs to the parent of this forked process
        if self._binding is not None:
            raise ConfigurationError(f"participant {self._name!r} is open already")
        self._binding, self._process = binding, os.getpid()
        return self.store.identity

    async def close(self) -> None:
        """Roll back what is open; prepared branches stay."""
        self._binding = None
        for branch in list(self._open):
            self._release(branch)
        self._xids.clear()

    async def prepare(self, xid: Xid) -> Vote:
        writes = self._open.get(xid.branch)
        if writes is None:
            return Vote(VoteKind.ABORTED, reason=f"nothing is open in {self._name} under {xid}")
        if not writes:
            return Vote(VoteKind.READ_ONLY)
        self.store.prepared[xid.branch] = (xid, writes)
        self._close_work(xid.branch)
        return Vote(VoteKind.PREPARED, token=b"\x01")

    async def commit(self, branch: Branch) -> Ending:
        if branch.id in self.store.prepared:
            self._apply(self.store.prepared.pop(branch.id)[1])
            self.store.ended[branch.id] = Verdict.COMMIT
            self._release(branch.id)
            return FINISHED
        if self._open.get(branch.id):
            raise ProtocolError(f"branch {branch.xid} was not asked for its vote")
        if branch.id in self._open or not branch.token:
            self._release(branch.id)  # it had written nothing
            return FINISHED
        if self.store.ended.get(branch.id) is Verdict.COMMIT:
            return FINISHED
        return Ending(EndingKind.HEURISTIC_ROLLBACK, f"{self._name} holds no branch {branch.xid}")

    async def rollback(self, branch: Branch) -> Ending:
        if self.store.ended.get(branch.id) is Verdict.COMMIT:
            return Ending(EndingKind.HEURISTIC_COMMIT, f"{branch.xid} was committed")
        self.store.prepared.pop(branch.id, None)
        self._release(branch.id)
        return FINISHED

    async def commit_one_phase(self, branch: Branch) -> tuple[Verdict, str, bool]:
        writes = self._open.get(branch.id)
        if writes is None:
            return Verdict.ABORT, f"nothing is open in {self._name} under {branch.xid}", False
        self._apply(writes)
        self._release(branch.id)
        return Verdict.COMMIT, "", False

    async def recover(self) -> Collection[Branch]:
        log = self._bound().log
        xids = [xid for xid, _ in self.store.prepared.values()]
        return [Branch(xid, self._name) for xid in xids if xid.log == log]

    def __repr__(self) -> str:
        return (
            f"<Memory {self._name!r} {len(self._open)} open, {len(self.store.prepared)} prepared>"
        )

    async def _enlist(self, transaction: GlobalTransaction) -> BranchId:
        if transaction.log_id != self._bound().log:
            raise ConfigurationError(f"{self._name} was opened by another coordinator")
        xid = self._xids.get(transaction)
        if xid is None:
            await transaction.admit()
            xid = await transaction.enlist(self, one_phase=True)
            self._xids[transaction] = xid
            self._open[xid.branch] = {}
        if xid.branch not in self._open or transaction.is_over:
            raise TransactionError(f"{self._name}: the transaction of {xid} is over")
        return xid.branch

    def _bound(self) -> Binding:
        if self._binding is None:
            raise ConfigurationError(
                f"participant {self._name!r} is not open: name it in Coordinator(participants="
                "[...]), and work inside `async with coordinator`"
            )
        return self._binding

    def _apply(self, writes: dict[str, Any]) -> None:
        for key, value in writes.items():
            if value is None:
                self.store.committed.pop(key, None)
            else:
                self.store.committed[key] = value

    def _release(self, branch: BranchId) -> None:
        self._close_work(branch)
        for key in [key for key, holder in self.store.writers.items() if holder == branch]:
            del self.store.writers[key]

    def _close_work(self, branch: BranchId) -> None:
        self._open.pop(branch, None)
        for transaction in [each for each, xid in self._xids.items() if xid.branch == branch]:
            del self._xids[transaction]
