"""What makes others lose atomicity without any crash: the caller is told what both databases hold.

Every disturbance on every face, over two servers that are counted afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from participants.postgres.embedded import EmbeddedServer
from tests.support.disturbed import (
    ABORTED,
    COMMITTED,
    FACES,
    Disturbed,
    Step,
    transfer,
)
from tests.support.postgres import query
from tests.support.proxy import Fault

BOTH, NEITHER = (99, 101), (100, 100)
OF_PSYCOPG = [face for face in FACES if "session" not in face]


@pytest.fixture
def disturbed(
    database: str, second_database: str, postgres_servers: tuple[EmbeddedServer, EmbeddedServer]
) -> Iterator[Disturbed]:
    first, second = postgres_servers
    disturbed = Disturbed((database, second_database), (first.port, second.port))
    yield disturbed
    disturbed.close()


def check(disturbed: Disturbed, told: str, reason: str = "") -> None:
    """The caller was told that, both databases agree, and the next transfer is as any other."""
    held = disturbed.bank.balances()
    assert (disturbed.told, held) == (told, BOTH if told == COMMITTED else NEITHER), (
        f"{disturbed.told}, {held}: {disturbed.error!r}"
    )
    assert reason in str(disturbed.error)


@pytest.mark.parametrize("face", FACES)
def test_undisturbed_it_commits(disturbed: Disturbed, face: str) -> None:
    disturbed.run(face, transfer())
    check(disturbed, COMMITTED)


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_ANSWER], ids=lambda f: f.name)
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("face", FACES)
def test_cut_at_prepare(disturbed: Disturbed, face: str, where: int, fault: Fault) -> None:
    disturbed.on(where, b"PREPARE TRANSACTION", fault)
    disturbed.run(face, transfer())
    assert disturbed.proxies[where].fired == [fault]
    check(disturbed, ABORTED, "lost while it prepared")


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_ANSWER], ids=lambda f: f.name)
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("face", FACES)
def test_cut_at_commit_prepared(disturbed: Disturbed, face: str, where: int, fault: Fault) -> None:
    disturbed.on(where, b"COMMIT PREPARED", fault)
    disturbed.run(face, transfer())
    assert disturbed.proxies[where].fired == [fault]
    check(disturbed, COMMITTED)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("face", FACES)
def test_cut_between_begin_and_the_first_statement(
    disturbed: Disturbed, face: str, where: int
) -> None:
    disturbed.run(face, [Step("cut", where), *transfer()])
    check(disturbed, ABORTED)
    assert not isinstance(disturbed.error, AssertionError)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("face", FACES)
def test_cut_after_the_last_statement(disturbed: Disturbed, face: str, where: int) -> None:
    disturbed.run(face, [*transfer(), Step("cut", where)])
    check(disturbed, ABORTED, "lost")


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("face", FACES)
def test_an_error_that_was_swallowed(disturbed: Disturbed, face: str, where: int) -> None:
    disturbed.run(face, [*transfer(), Step("fail", where, "SELECT 1 / 0")])
    check(disturbed, ABORTED, "division by zero")


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("verb", ["commit", "rollback"])
def test_the_users_own_verb_changes_nothing(disturbed: Disturbed, face: str, verb: str) -> None:
    first, second = transfer()
    disturbed.run(face, [first, Step("verb", 0, verb), second])
    check(disturbed, COMMITTED)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "COMMIT AND CHAIN", "COMMIT; BEGIN"])
@pytest.mark.parametrize("face", FACES)
def test_a_raw_end_of_the_transaction(
    disturbed: Disturbed, face: str, statement: str, where: int
) -> None:
    disturbed.run(face, [Step("execute", where, statement), *transfer()])
    check(disturbed, ABORTED, "sent as text")


@pytest.mark.parametrize("face", FACES)
def test_what_was_done_before_a_raw_commit_is_beyond_us(disturbed: Disturbed, face: str) -> None:
    """Nobody can take it back: the caller is told, and the rest is rolled back."""
    first, second = transfer()
    disturbed.run(face, [first, Step("execute", 0, "COMMIT"), first, second])
    assert (disturbed.told, disturbed.bank.balances()) == (ABORTED, (99, 100))
    assert "part of the work is no longer in the transaction" in str(disturbed.error)


@pytest.mark.parametrize("face", FACES)
def test_a_deferred_constraint(disturbed: Disturbed, face: str) -> None:
    twice = [Step("execute", 1, "INSERT INTO entry (note) VALUES ('same')")] * 2
    disturbed.run(face, [*transfer(), *twice])
    check(disturbed, ABORTED, "duplicate key")


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("LISTEN news", "LISTEN"),
        ("SELECT pg_notify('news', 'x')", "NOTIFY"),
        ("CREATE TEMPORARY TABLE scratch (n int)", "temporary"),
        ("DECLARE held CURSOR WITH HOLD FOR SELECT 1", "WITH HOLD"),
    ],
)
@pytest.mark.parametrize("face", FACES)
def test_what_postgresql_cannot_prepare(
    disturbed: Disturbed, face: str, statement: str, reason: str
) -> None:
    disturbed.run(face, [*transfer(), Step("execute", 0, statement)])
    check(disturbed, ABORTED, reason)


@pytest.mark.parametrize("what", ["copy", "pipeline", "stream"])
@pytest.mark.parametrize("face", OF_PSYCOPG)
def test_a_result_set_that_is_left_open(disturbed: Disturbed, face: str, what: str) -> None:
    disturbed.run(face, [*transfer(), Step("leave open", 0, what)])
    check(disturbed, ABORTED, "still running")


@pytest.mark.parametrize("face", OF_PSYCOPG)
def test_a_cursor_on_the_server_that_is_left_open(disturbed: Disturbed, face: str) -> None:
    disturbed.run(face, [*transfer(), Step("leave open", 0, "cursor")])
    check(disturbed, COMMITTED)


@pytest.mark.parametrize("statement", ["SET ROLE tenant", "SET LOCAL ROLE tenant"])
@pytest.mark.parametrize("face", FACES)
def test_another_role(disturbed: Disturbed, face: str, statement: str) -> None:
    """Only the owner of a branch may end it, and PREPARE makes the current role its owner."""
    url = disturbed.bank.direct[0]
    query(url, "DROP OWNED BY tenant" if _has_tenant(url) else "CREATE ROLE tenant")
    query(url, "GRANT ALL ON account TO tenant")
    for _ in range(2):  # and the next borrower of the session is not that role
        disturbed.run(face, [Step("execute", 0, "SELECT 1 / (current_user <> 'tenant')::int")])
        assert disturbed.told == COMMITTED, disturbed.error
    disturbed.run(face, [Step("execute", 0, statement), *transfer()])
    check(disturbed, COMMITTED)


def _has_tenant(url: str) -> bool:
    return bool(query(url, "SELECT 1 FROM pg_roles WHERE rolname = 'tenant'"))
