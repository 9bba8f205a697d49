"""A coordinator over two real databases, for tests that look at both of them afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from coordinator import Coordinator
from participants.postgres import PostgreSQL
from tests.support.postgres import gids, query

BALANCES = "SELECT balance FROM account ORDER BY id"
TAKE = "UPDATE account SET balance = balance - 1 WHERE id = 'alice'"
GIVE = "UPDATE account SET balance = balance + 1 WHERE id = 'bob'"
SLOW = "SELECT pg_sleep(60)"
SECONDS_MAX = 15.0


class Bank:
    """`accounts` and `ledger` on two servers. A transfer takes from the one and gives to the other.

    `urls` are where the participants connect, which may be through proxies, `direct` the databases.
    """

    def __init__(
        self, direct: tuple[str, str], urls: tuple[Any, Any] | None = None, **options: Any
    ) -> None:
        self.direct = direct
        accounts, ledger = urls or direct
        self.accounts = PostgreSQL("accounts", accounts, **options)
        self.ledger = PostgreSQL("ledger", ledger, **options)
        self.coordinator = Coordinator(
            "memory:", cluster="bank", participants=[self.accounts, self.ledger]
        )

    def balances(self) -> tuple[int, int]:
        """What alice has in accounts, and bob in the ledger; both began with 100."""
        (alice, _), (_, bob) = (
            [int(str(row[0])) for row in query(url, BALANCES)] for url in self.direct
        )
        return alice, bob

    def nothing_is_prepared(self) -> bool:
        return all(gids(url) == [] for url in self.direct)


@contextmanager
def blocking_bank(*args: Any, **options: Any) -> Iterator[Bank]:
    """A bank whose coordinator is used by the threads of the test."""
    bank = Bank(*args, **options)
    try:
        yield bank
    finally:
        bank.coordinator.blocking.close()


def running(url: str, part: str) -> bool:
    """Whether a session of the database is executing a statement that contains `part`."""
    return bool(
        query(
            url,
            "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() "
            f"AND datname = current_database() AND query LIKE '%{part}%'",
        )
    )


def wait_until(condition: Callable[[], object]) -> None:
    """Poll a condition on the server's side, which no event announces."""
    give_up = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < give_up, "it did not come to pass"
        time.sleep(0.01)
