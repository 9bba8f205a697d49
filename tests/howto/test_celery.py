"""The Celery worker of the how-tos: real children, messages that come twice, a child that dies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.howto.serving import (
    BALANCE,
    EXAMPLES,
    Shop,
    command,
    environment_of,
    running,
    wait_until,
)

WORKER = "tests.howto.celery_worker"
SEND = f"""
import json, sys
from {WORKER} import transfer
for each in json.load(sys.stdin):
    transfer.apply_async(each["args"], task_id=each["id"])
"""


class Worker:
    """A running worker with two children, and the folder of its broker."""

    def __init__(self, shop: Shop, output: Path) -> None:
        self.shop = shop
        self.folder = Path(shop.environment["BROKER_FOLDER"])
        self.output = output

    def send(self, *tasks: tuple[str, str, int]) -> None:
        """Messages with their task id, from another process, as a web service's."""
        messages = [
            {"id": task_id, "args": [source, "bob", amount]} for task_id, source, amount in tasks
        ]
        subprocess.run(
            [sys.executable, "-c", SEND],
            cwd=EXAMPLES, env=environment_of(self.shop), input=json.dumps(messages), text=True,
            timeout=60, check=True,
        )  # fmt: skip

    def wait_for(self, *expected: str) -> None:
        """Until the worker's output has each text as often as it is named."""
        wait_until(
            lambda: all(
                self.output.read_text().count(text) >= expected.count(text) for text in expected
            ),
            f"the worker never said {expected}",
        )


@pytest.fixture
def worker(shop: Shop) -> Iterator[Worker]:
    for name in ("messages", "control"):
        (shop.folder / name).mkdir()
    shop.environment["BROKER_FOLDER"] = str(shop.folder)
    words = command("celery", "celery_app", WORKER)
    # A warm shutdown takes Celery seven seconds, whatever ran in it.
    with running(shop, [*words, "--loglevel", "INFO"], graceful=False) as (_, output):
        yield Worker(shop, output)


def test_a_task_that_comes_again_commits_once(worker: Worker) -> None:
    shop = worker.shop
    (worker.folder / "die").touch()
    worker.send(("order 1", "a1", 30))
    worker.wait_for("signal 9 (SIGKILL)", "[order 1] succeeded in")
    worker.send(*[("order 1", "a1", 30)] * 2, *((f"order {n}", f"a{n}", n) for n in range(2, 8)))
    worker.wait_for(*["succeeded in"] * 9)
    told = re.findall(
        r"ForkPoolWorker-\d\] Task .*\[(order \d)\] succeeded in \S+: (\d+)",
        worker.output.read_text(),
    )
    assert sorted(told) == [("order 1", str(BALANCE - 30))] * 3 + [
        (f"order {n}", str(BALANCE - n)) for n in range(2, 8)
    ]
    assert shop.entries() == {f"order {n}": 1 for n in range(1, 8)}
    assert shop.balance("a1") == BALANCE - 30
