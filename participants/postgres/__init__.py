"""PostgreSQL as a participant. `participants.postgres.embedded` has a server for trials."""

from __future__ import annotations

from participants.postgres.participant import PostgreSQL
from participants.postgres.replies import DatabaseUnavailable

__all__ = ["DatabaseUnavailable", "PostgreSQL"]
