"""The plain script of the how-tos, as a process."""

from __future__ import annotations

import subprocess
import sys

from tests.howto.serving import BALANCE, EXAMPLES, Shop, command, environment_of


def run(shop: Shop, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=EXAMPLES,
        env=environment_of(shop),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_script_commits_once_and_says_so(shop: Shop) -> None:
    arguments = command("script")[2:]
    first = run(shop, *arguments)
    assert (first.returncode, first.stdout, first.stderr) == (0, "done\n", "")
    second = run(shop, *arguments)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("done before, by transaction "), second.stdout
    assert shop.balance("a1") == BALANCE - 30
    assert shop.entries() == {"invoice 7": 1}


def test_an_exception_of_its_own_ends_the_script_and_nothing_happened(shop: Shop) -> None:
    failed = run(shop, "a1", "bob", str(BALANCE + 1), "too much")
    assert failed.returncode == 1
    assert "account_balance_check" in failed.stderr
    assert shop.balance("a1") == BALANCE
    assert shop.entries() == {}


def test_a_ledger_that_is_away_is_a_definite_answer(shop: Shop) -> None:
    shop.environment["LEDGER_URL"] = "postgresql://app@127.0.0.1:1/ledger"
    failed = run(shop, "a1", "bob", "30", "invoice 8")
    assert failed.returncode == 1
    assert "ledger" in failed.stderr.splitlines()[-1], failed.stderr
    assert shop.balance("a1") == BALANCE
