"""Several workers on one SQLite log, one of which is killed under load, again and again.

The moment of each kill is a seeded choice among the answers of the victim, so that it is at work.
Each key is sent by two clients at a time. Whoever was cut off asks again with the same key, except
some, who give up.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.howto.served import WORKER
from tests.howto.serving import SECONDS_MAX, Server, Shop, command, serving, wait_until
from tests.support.postgres import gids

UVICORN = command("fastapi", "fastapi_app:app", "tests.howto.served:fastapi")
GUNICORN = command("flask", "flask_app:app", "tests.howto.served:flask")
CLIENTS = 8
CALM = 40
"""Answers between the start, or a kill, and the next kill, at most."""
KILLS_MAX = 8
RECOVERED = ": recovered: "
SWEEP_SECONDS = 3.0


class Load:
    """Clients that send transfers until they are told to stop, and what they were answered."""

    def __init__(self, server: Server) -> None:
        self.committed: set[str] = set()
        self.given_up: set[str] = set()
        self.cut_off = 0
        self.failure: BaseException | None = None
        """Of any client; the test ends with it."""
        self.workers: list[int] = []
        """Who gave each answer."""
        self._url = server.url
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def client(self, seed: float) -> None:
        try:
            self._send_transfers(seed)
        except BaseException as error:
            self.failure = error

    def _send_transfers(self, seed: float) -> None:
        choice = random.Random(seed)
        # A connection a request: then the kernel spreads them over the workers.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=self._url, limits=limits, timeout=SECONDS_MAX,
                          trust_env=False) as client:  # fmt: skip
            while not self._stop.is_set():
                with self._lock:
                    number = next(self._numbers) // 2  # so each key is sent by two clients
                self._transfer(client, number, choice)

    def _transfer(self, client: httpx.Client, number: int, choice: random.Random) -> None:
        key = f"k{number}"
        order = {"source": f"a{number % 10}", "target": "bob", "amount": 1}
        patient = choice.random() < 0.7
        give_up = time.monotonic() + SECONDS_MAX
        while not self._is_answered(client, key, order):
            if not patient:
                self.given_up.add(key)
                return
            assert time.monotonic() < give_up, f"{key} was never answered"

    def _is_answered(self, client: httpx.Client, key: str, order: dict[str, object]) -> bool:
        try:
            answer = client.post("/transfers", json=order, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            with self._lock:
                self.cut_off += 1
            return False
        assert answer.status_code in (200, 503), answer.text
        with self._lock:
            self.workers.append(int(answer.headers[WORKER]))
            if answer.status_code == 200:
                self.committed.add(key)
        return answer.status_code == 200

    def stop(self) -> None:
        self._stop.set()

    def wait_for(self, answers: int) -> None:
        self.wait_until(lambda: len(self.workers) >= answers, f"{answers} answers never came")

    def wait_until(self, condition: Callable[[], bool], complaint: str) -> None:
        wait_until(lambda: self.failure or condition(), complaint)
        if self.failure is not None:
            raise self.failure


def kill_one(load: Load, killed: set[int], choice: random.Random) -> None:
    """Kill the worker that gave the last answer, after some number of answers by both."""
    seen = len(load.workers)

    def living() -> list[int]:
        return [each for each in load.workers[seen:] if each not in killed]

    load.wait_until(lambda: len(set(living())) == 2, "one worker answers everything")
    load.wait_for(len(load.workers) + choice.randrange(CALM))
    victim = living()[-1]
    killed.add(victim)
    os.kill(victim, signal.SIGKILL)


def was_swept(server: Server) -> bool:
    """Whether a sweep has found something to finish, which it does within seconds if at all."""
    give_up = time.monotonic() + SWEEP_SECONDS
    while RECOVERED not in server.output():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    ("words", "socket_option"), [(UVICORN, "--fd={}"), (GUNICORN, "--bind=fd://{}")],
    ids=["uvicorn", "gunicorn"],
)  # fmt: skip
def test_a_killed_worker_leaves_nothing_behind(
    shop: Shop, words: Sequence[str], socket_option: str
) -> None:
    choice = random.Random(words[0])
    with serving(shop, words, socket_option=socket_option) as server:
        load = Load(server)
        with ThreadPoolExecutor(CLIENTS) as threads:
            try:
                for _ in range(CLIENTS):
                    threads.submit(load.client, choice.random())
                killed: set[int] = set()
                for _ in range(KILLS_MAX):
                    kill_one(load, killed, choice)
                    if load.cut_off and was_swept(server):
                        break
                load.wait_for(len(load.workers) + CALM)
            finally:
                load.stop()
        assert load.failure is None, load.failure
        # The server goes on: it is its sweeps that clean up.
        wait_until(lambda: [gids(url) for url in shop.urls] == [[], []], "something stays prepared")
        entries = shop.entries()
        assert load.cut_off > 0, "no kill hit a request"
        assert RECOVERED in server.output(), "no kill left anything to a sweep"
    assert load.committed - entries.keys() == set()
    assert set(entries) - load.committed <= load.given_up
    assert set(entries.values()) == {1}
