"""A decision log in one SQLite file."""

from __future__ import annotations

from coordinator.log.sqlite.log import SQLiteLog
from coordinator.log.sqlite.writer import Statistics

__all__ = ["SQLiteLog", "Statistics"]
