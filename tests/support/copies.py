"""Servers that begin as a copy of another one: standbys and restored backups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from coordinator import failpoint
from participants.postgres.embedded import EmbeddedServer
from tests.support.branches import until
from tests.support.postgres import query

STANDBY = "standby"
UNSAFE_BUT_QUICK = {"fsync": "off"}  # tests crash processes, and not the machine


class BaseBackup(EmbeddedServer):
    """A copy of a running server with its password, taken by `take`; `start` restores it."""

    options: tuple[str, ...] = ()

    def __init__(self, origin: EmbeddedServer) -> None:
        super().__init__()
        self.password = origin.password
        self._origin = origin

    def take(self) -> None:
        self._create()

    def _make_data(self) -> None:
        self._run(
            "pg_basebackup", f"--dbname={self._origin.url()}?application_name={STANDBY}",
            f"--pgdata={self._data}", "--checkpoint=fast", "--no-sync", *self.options,
        )  # fmt: skip


class Standby(BaseBackup):
    """A hot standby, which follows its origin until it is promoted."""

    options = ("--write-recovery-conf",)

    async def catch_up(self) -> None:
        """Wait until it has received everything that its origin has written."""
        ((written,),) = query(self._origin.url(), "SELECT pg_current_wal_flush_lsn()")
        received = f"SELECT pg_last_wal_receive_lsn() >= '{written}'"
        await until(lambda: query(self.url(), received) == [(True,)])

    def follows(self) -> bool:
        """Whether its origin streams to it."""
        streams = "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"
        return bool(query(self._origin.url(), streams))

    def replace_origin(self) -> None:
        """The origin's machine is lost; this server is promoted in its place."""
        self._origin.kill()
        self.start()
        query(self.url(), "SELECT pg_promote()")

    def url_of_either(self, database: str) -> str:
        """Leads to the one of the two that is the primary."""
        hosts = f"127.0.0.1:{self._origin.port},127.0.0.1:{self.port}"
        return (
            f"postgresql://postgres:{self.password}@{hosts}/{database}"
            "?target_session_attrs=read-write"
        )


@contextmanager
def once_at(point: str, act: Callable[[], None]) -> Iterator[list[str]]:
    """Do something the first time that a failpoint is reached; yields whether it was."""
    reached: list[str] = []

    def handler(name: str) -> None:
        if name == point and not reached:
            reached.append(name)
            act()

    failpoint.install(handler)
    try:
        yield reached
    finally:
        failpoint.install(None)
