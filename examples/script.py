"""A plain script: `python script.py SOURCE TARGET AMOUNT REQUEST`, once for each REQUEST."""

from __future__ import annotations

import os
import sys

from coordinator import AlreadyDecided, Coordinator, OutcomeUnknown, TransactionAborted
from participants.postgres import PostgreSQL

accounts = PostgreSQL("accounts", os.environ["ACCOUNTS_URL"])
ledger = PostgreSQL("ledger", os.environ["LEDGER_URL"])
coordinator = Coordinator(
    os.environ.get("SYNCPOINT_LOG", "sqlite:///syncpoint.db"),
    cluster="shop",
    participants=[accounts, ledger],
)


@coordinator.transactional(timeout=5, attempts=3, idempotency_key=lambda *order: order[3])
def transfer(source: str, target: str, amount: int, request: str) -> None:
    conn = accounts.blocking.connection()  # a psycopg.Connection
    conn.execute("UPDATE account SET balance = balance - %s WHERE id = %s", (amount, source))
    conn = ledger.blocking.connection()
    conn.execute("INSERT INTO entry VALUES (%s, %s, %s)", (request, target, amount))


def main(source: str, target: str, amount: str, request: str) -> str:
    try:
        transfer(source, target, int(amount), request)
    except AlreadyDecided as error:
        return f"done before, by transaction {error.transaction_id}"
    except TransactionAborted as error:
        sys.exit(f"nothing happened: {error}")
    except OutcomeUnknown as error:
        sys.exit(f"{error}; or run this again with the same request")
    return "done"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
