"""A transfer between two databases as it is usually written by hand: the program that is killed.

It does what SQLAlchemy's `twophase=True` and zope.sqlalchemy do: a random name for each branch,
PREPARE TRANSACTION in both databases, then COMMIT PREPARED one after the other. Nothing is written
down about which branches belong together or what was decided.
"""

from __future__ import annotations

import secrets
import sys

import psycopg
from psycopg import sql

from coordinator.commands.demo.crash import wait_to_be_killed

MOVE = "UPDATE account SET balance = balance + %s WHERE id = %s"


def transfer(accounts_url: str, ledger_url: str, account: int, amount: int) -> None:
    """Move `amount` from an account of the one database to the same account of the other."""
    first, second = f"_sa_{secrets.token_hex(16)}", f"_sa_{secrets.token_hex(16)}"
    with (
        psycopg.connect(accounts_url, autocommit=True) as accounts,
        psycopg.connect(ledger_url, autocommit=True) as ledger,
    ):
        accounts.execute("BEGIN")
        accounts.execute(MOVE, (-amount, account))
        ledger.execute("BEGIN")
        ledger.execute(MOVE, (amount, account))
        accounts.execute(sql.SQL("PREPARE TRANSACTION {}").format(first))
        ledger.execute(sql.SQL("PREPARE TRANSACTION {}").format(second))
        accounts.execute(sql.SQL("COMMIT PREPARED {}").format(first))
        wait_to_be_killed()
        ledger.execute(sql.SQL("COMMIT PREPARED {}").format(second))


if __name__ == "__main__":
    transfer(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
