"""Two real PostgreSQL servers for the demonstration and the benchmark, started side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import psycopg

from participants.postgres.embedded import EmbeddedServer


@contextmanager
def two_servers(
    max_prepared_transactions: int = 64, settings: Mapping[str, str] | None = None
) -> Iterator[tuple[EmbeddedServer, ...]]:
    """Two new ones, running in the block."""
    servers = (
        EmbeddedServer(settings, max_prepared_transactions=max_prepared_transactions)
        for _ in range(2)
    )
    with running(*servers) as started:
        yield started


@contextmanager
def running(*servers: EmbeddedServer) -> Iterator[tuple[EmbeddedServer, ...]]:
    """Start them side by side, and stop them at the end of the block, however it ends."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)
        with ThreadPoolExecutor(len(servers)) as starters:
            list(starters.map(EmbeddedServer.start, servers))
        yield servers


def server_version(url: str) -> str:
    """The version of the server, such as 18.6."""
    with psycopg.connect(url) as connection:
        row = connection.execute("SHOW server_version").fetchone()
    return str(row[0]) if row else "unknown"
