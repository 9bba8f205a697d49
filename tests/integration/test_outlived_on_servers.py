"""A thread's body that runs on after its deadline commits nothing, in no database.

The rules are tried in `tests/unit/test_outlived.py`.
"""

from __future__ import annotations

import pytest

from coordinator import TransactionAborted, TransactionError
from coordinator.context import current
from tests.support.bank import GIVE, TAKE, blocking_bank, wait_until
from tests.support.postgres import query


def test_the_second_half_is_not_committed_without_the_first(
    database: str, second_database: str
) -> None:
    with blocking_bank((database, second_database)) as bank:
        refused: list[TransactionError] = []

        @bank.coordinator.transactional
        def credit() -> None:
            bank.ledger.blocking.connection().execute(GIVE)

        @bank.coordinator.transactional(propagation="requires_new")
        def note() -> None:
            statement = "INSERT INTO entry (note) VALUES ('tried')"
            bank.accounts.blocking.connection().execute(statement.encode())

        @bank.coordinator.transactional(timeout=0.3)
        def transfer() -> None:
            transaction = current()
            assert transaction is not None
            bank.accounts.blocking.connection().execute(TAKE)
            wait_until(lambda: transaction.has_ended)
            for use in (credit, bank.accounts.blocking.connection, bank.ledger.blocking.session):
                with pytest.raises(TransactionError) as raised:
                    use()
                refused.append(raised.value)
            note()  # what asks to be independent of its caller is

        with pytest.raises(TransactionAborted, match=r"deadline of 0\.3 s"):
            transfer()
        assert len(refused) == 3 and bank.balances() == (100, 100)
        assert query(database, "SELECT note FROM entry") == [("tried",)]
        assert bank.nothing_is_prepared()
        credit()
        assert bank.balances() == (100, 101)
