"""Atomic commitment over several databases, through crashes: the public names."""

from __future__ import annotations

from coordinator.config import Settings
from coordinator.coordinator import Coordinator
from coordinator.errors import (
    AlreadyDecided,
    ConfigurationError,
    HeuristicOutcome,
    LogUnavailable,
    OutcomeUnknown,
    ProtocolError,
    TransactionAborted,
    TransactionError,
)
from coordinator.model import Outcome, Status, TransactionId
from coordinator.transactional import GlobalTransaction

__all__ = [
    "AlreadyDecided",
    "ConfigurationError",
    "Coordinator",
    "GlobalTransaction",
    "HeuristicOutcome",
    "LogUnavailable",
    "Outcome",
    "OutcomeUnknown",
    "ProtocolError",
    "Settings",
    "Status",
    "TransactionAborted",
    "TransactionError",
    "TransactionId",
]
