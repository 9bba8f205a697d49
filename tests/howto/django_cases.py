"""What Django's own transactions do around and inside a global one: run as a program.

Django is configured once in a process, so the tests run this file in one of its own. It prints the
name of each case that passed.
"""

from __future__ import annotations

from collections.abc import Callable

import django_app as app
import pytest
from django.db import IntegrityError, connection, transaction

from coordinator import TransactionAborted, TransactionError
from coordinator.testing import refuse
from tests.howto.serving import BALANCE

Account = app.Account


def pay(balance: int) -> None:
    """Leave so much in the account, on Django's connection, and book the rest in the ledger."""
    app.accounts.blocking.enlist(connection.connection)
    Account.objects.filter(id="a1").update(balance=balance)
    conn = app.ledger.blocking.connection()
    conn.execute("INSERT INTO entry VALUES ('x', 'b', %s)", (BALANCE - balance,))


run = app.coordinator.transactional(pay)


def balances() -> tuple[int, int]:
    """What is in the account, and what was booked, once everything is over."""
    with app.coordinator.blocking.transaction():
        conn = app.ledger.blocking.connection()
        [booked] = conn.execute("SELECT coalesce(sum(amount), 0) FROM entry").fetchone()
    return Account.objects.get(id="a1").balance, int(booked)


def an_atomic_block_around_it_before_its_first_statement() -> None:
    with transaction.atomic():
        run(1)
        assert balances() == (1, BALANCE - 1)
        Account.objects.filter(id="a2").update(balance=BALANCE)


def an_atomic_block_inside_is_a_savepoint() -> None:
    @app.coordinator.transactional
    def nested() -> None:
        pay(1)
        with pytest.raises(KeyError, match=r"undone"), transaction.atomic():
            Account.objects.filter(id="a1").update(balance=2)
            raise KeyError("undone")

    with transaction.atomic():
        nested()
    assert balances() == (1, BALANCE - 1)


def callbacks_of_on_commit_run_after_both_have_committed() -> None:
    seen = []

    @app.coordinator.transactional
    def announced() -> None:
        pay(1)
        transaction.on_commit(lambda: seen.append(balances()))

    with transaction.atomic():
        announced()
        assert seen == []
    assert seen == [(1, BALANCE - 1)]


def an_exception_that_leaves_the_atomic_block_too() -> None:
    seen = []

    @app.coordinator.transactional
    def failing() -> None:
        pay(1)
        transaction.on_commit(lambda: seen.append(1))
        raise KeyError("mine")

    with pytest.raises(KeyError, match=r"mine"), transaction.atomic():
        failing()
    assert (balances(), seen) == ((BALANCE, 0), [])


def an_error_of_the_database_and_the_connection_afterwards() -> None:
    with pytest.raises(IntegrityError, match=r"account_balance_check"), transaction.atomic():
        run(-1)
    assert balances() == (BALANCE, 0)
    with transaction.atomic():
        run(1)
    assert balances() == (1, BALANCE - 1)


def a_query_before_it_in_the_same_block_is_refused() -> None:
    with pytest.raises(TransactionError, match=r"open transaction"), transaction.atomic():
        balances()
        run(1)
    assert balances() == (BALANCE, 0)


def an_outermost_block_inside_it_would_commit_and_is_refused() -> None:
    @app.coordinator.transactional
    def inside() -> None:
        with transaction.atomic():
            pay(1)

    with pytest.raises(
        TransactionError, match=r"commit\(\) on a connection of a global transaction"
    ):
        inside()
    connection.close_if_unusable_or_obsolete()  # as Django does at the end of a request
    assert balances() == (BALANCE, 0)


def a_no_at_the_commit_and_the_connection_afterwards() -> None:
    with pytest.raises(TransactionAborted), refuse(app.ledger), transaction.atomic():
        run(1)
    assert balances() == (BALANCE, 0)
    with transaction.atomic():
        run(1)
    assert balances() == (1, BALANCE - 1)


def without_a_block_single_statements_take_part() -> None:
    run(1)
    assert balances() == (1, BALANCE - 1)


def without_a_block_what_opens_one_is_refused() -> None:
    @app.coordinator.transactional
    def creating() -> None:
        pay(1)
        Account.objects.bulk_create([Account(id="new", balance=0)])

    with pytest.raises(
        TransactionError, match=r"set_autocommit\(\) on a connection of a global transaction"
    ):
        creating()
    assert balances() == (BALANCE, 0)


def the_orm_without_enlist_takes_no_part() -> None:
    @app.coordinator.transactional
    def apart() -> None:
        Account.objects.filter(id="a1").update(balance=1)
        raise KeyError("too late")

    with pytest.raises(KeyError, match=r"too late"):
        apart()
    assert balances() == (1, 0)
    Account.objects.filter(id="a1").update(balance=BALANCE)


CASES: list[Callable[[], None]] = [
    an_atomic_block_around_it_before_its_first_statement,
    an_atomic_block_inside_is_a_savepoint,
    callbacks_of_on_commit_run_after_both_have_committed,
    an_exception_that_leaves_the_atomic_block_too,
    an_error_of_the_database_and_the_connection_afterwards,
    a_query_before_it_in_the_same_block_is_refused,
    an_outermost_block_inside_it_would_commit_and_is_refused,
    a_no_at_the_commit_and_the_connection_afterwards,
    without_a_block_single_statements_take_part,
    without_a_block_what_opens_one_is_refused,
    the_orm_without_enlist_takes_no_part,
]


def main() -> None:
    for case in CASES:
        with connection.cursor() as cursor:
            cursor.execute("UPDATE account SET balance = %s", (BALANCE,))
        with app.coordinator.blocking.transaction():
            app.ledger.blocking.connection().execute("DELETE FROM entry")
        case()
        print(case.__name__)
    connection.close()


if __name__ == "__main__":
    main()
