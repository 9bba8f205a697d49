"""The Django service of the how-tos: WSGI under gunicorn, ASGI under uvicorn, Django's connection.

What Django's own transactions do around and inside a global one is tried in a process of its own,
because Django is configured once in a process.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.howto.serving import BALANCE, EXAMPLES, Server, Shop, command, environment_of, serving


def check_transfers(server: Server, shop: Shop) -> None:
    """Synchronous views, on the connection of Django's ORM."""
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(
                lambda n: server.post("/transfers", f"k{n}", source=f"a{n}", target="b", amount=n),
                range(8),
            )
        )
    assert [(each.status_code, each.text) for each in answers] == [
        (200, f'{{"balance": {BALANCE - n}}}') for n in range(8)
    ]
    repeated = server.post("/transfers", "k1", source="a1", target="b", amount=1)
    assert (repeated.status_code, repeated.text) == (200, answers[1].text)
    assert server.post("/transfers", "k9", source="nobody", target="b", amount=1).status_code == 404
    assert server.post("/transfers", source="a1", target="b", amount=1).status_code == 400
    assert shop.entries() == {f"k{n}": 1 for n in range(8)}


def test_wsgi_with_the_connection_of_the_orm(shop: Shop) -> None:
    with serving(shop, command("wsgi"), socket_option="--bind=fd://{}") as server:
        check_transfers(server, shop)
        refused = server.post("/deposits", "d1", source="b", target="a1", amount=1)
        assert refused.status_code == 500
        # Whichever worker it came to, one that has opened it in a thread or one that has not yet.
        assert re.search("open on another event loop|coordinator is not open", server.output())


def test_asgi_with_synchronous_and_asynchronous_views(shop: Shop) -> None:
    with serving(shop, command("asgi"), socket_option="--fd={}") as server:
        check_transfers(server, shop)
        for _ in range(2):
            answer = server.post("/deposits", "d1", source="b", target="a1", amount=1)
            assert answer.status_code == 200, answer.text
    assert shop.balance("a1") == BALANCE
    assert shop.entries()["d1"] == 1


def test_asgi_does_not_start_without_its_database(shop: Shop) -> None:
    shop.environment["LEDGER_URL"] = "postgresql://app@127.0.0.1:1/ledger"
    done = subprocess.run(
        [sys.executable, "-m", *command("asgi"), "--port", "0"],
        cwd=EXAMPLES, env=environment_of(shop), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "ledger" in done.stderr, done.stderr


def test_transactions_of_django_around_and_inside(shop: Shop) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.howto.django_cases"],
        cwd=EXAMPLES, env=environment_of(shop), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 11
