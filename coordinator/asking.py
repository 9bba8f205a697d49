"""What the log says of a transaction, and how somebody who needs an end asks for one."""

from __future__ import annotations

import logging

from coordinator.engine import Engine
from coordinator.log.base import BelowHorizon, Log, Proposal
from coordinator.logs import say
from coordinator.model import ABORT, Status, TransactionId, Verdict

logger = logging.getLogger("syncpoint.coordinator")


async def status_of(log: Log, transaction: TransactionId) -> Status:
    """Read linearizably; raises `LogUnavailable`."""
    reading = await log.read(transaction)
    if reading.record is None:
        below = transaction < reading.horizon
        return Status.FORGOTTEN if below else Status.UNDECIDED
    verdict = reading.record.answer or reading.record.decision.verdict
    if verdict is Verdict.DELEGATED:
        return Status.UNDECIDED
    return Status.COMMITTED if verdict is Verdict.COMMIT else Status.ABORTED


async def abort(engine: Engine, transaction: TransactionId) -> Status:
    """Propose abort and answer what stands; see `Coordinator.abort`."""
    if engine.decides_elsewhere(transaction):
        return Status.UNDECIDED
    answer = await engine.log.propose(Proposal(transaction, ABORT))
    if isinstance(answer, BelowHorizon):
        status = Status.FORGOTTEN
    else:
        status = await status_of(engine.log, transaction)
    message = "abort() was called with its id; what stands: %s"
    say(logger, logging.INFO, transaction, "abort-asked", message, status, status=status)
    return status
