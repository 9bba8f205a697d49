"""A client process: a few clients on one coordinator, each doing one operation after another.

Started by the torture as `python -m tests.torture.client PLAN`. SIGTERM ends it after the running
operations, in the way a service is stopped; the end of its parent ends it at once. On an event
loop, the last of its clients is a thread; else all of them are, and the coordinator opens itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

import msgspec

from coordinator import ConfigurationError, Coordinator, LogUnavailable, TransactionError
from participants.postgres import PostgreSQL
from tests.torture.history import HistoryFile
from tests.torture.operations import AsyncFace, BlockingFace, Operation, draw_operation, told
from tests.torture.values import CLUSTER, DATABASES, SETTINGS, Asked, Ended, Invoked, Plan, Told

LOCK_TIMEOUT_SECONDS = 1.0
THINKING_SECONDS_MAX = 0.05
OPENING_PAUSE_SECONDS = 0.1
IDS_KEPT = 16
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Client:
    """One of the clients of this process: draws operations and writes down how they end."""

    def __init__(self, service: Service, number: int, *, blocking: bool) -> None:
        self._plan = service.plan
        self.draw = random.Random(f"{self._plan.seed} {self._plan.name} {number}")
        self._service = service
        self._number = number
        self._blocking = blocking

    def operations(self, stop: threading.Event) -> Iterator[Operation]:
        """Announced in the history when they come out of here."""
        count = 0
        while not stop.is_set():
            count += 1
            operation = draw_operation(
                self.draw,
                f"{self._plan.name}.{self._number}.{count}",
                self._plan.accounts,
                time.monotonic() - self._plan.epoch,
                blocking=self._blocking,
            )
            self._service.history.write(
                Invoked,
                op=operation.op,
                how=("blocking " if self._blocking else "") + operation.how,
                changes=operation.changes,
                key=operation.key,
                seconds=operation.seconds,
                publishes=operation.publishes,
            )
            yield operation

    def note(
        self, operation: Operation, returned: str | None, error: BaseException | None = None
    ) -> None:
        fields = told(operation, returned, error)
        if fields["outcome"] == "surprise":
            logging.error("%s: %s", operation.op, fields["error"], exc_info=error)
        ids = self._service.ids
        name = fields.get("transaction") or ids.get(operation.op)
        self._service.history.write(Told, **fields | {"transaction": name})
        if name:
            ids[operation.op] = name
        while len(ids) > IDS_KEPT:
            ids.pop(next(iter(ids)), None)

    def question(self) -> tuple[str, str] | None:
        """Now and then, a transaction to ask about, and how: its status, or an abort.

        It may be one that another client of this process has just begun.
        """
        ids = list(self._service.ids.values())
        if not ids or self.draw.random() < 0.7:
            return None
        return self.draw.choice(ids), self.draw.choice(("status", "status", "abort"))

    def note_answer(self, since: float, transaction: str, verb: str, status: str) -> None:
        self._service.history.write(
            Asked, since=since, transaction=transaction, verb=verb, status=status
        )

    def pause(self) -> float:
        return self.draw.uniform(0, THINKING_SECONDS_MAX)


async def client_on_the_loop(
    client: Client, face: AsyncFace, coordinator: Coordinator, stop: threading.Event
) -> None:
    for operation in client.operations(stop):
        try:
            client.note(operation, await face.run(operation))
        except (Exception, asyncio.CancelledError) as error:
            client.note(operation, None, error)
        if question := client.question():
            transaction, verb = question
            since = time.monotonic()
            try:
                status = await getattr(coordinator, verb)(transaction)
                client.note_answer(since, transaction, verb, status)
            except TransactionError as error:
                logging.warning("%s of %s: %s", verb, transaction, error)
        await asyncio.sleep(client.pause())


def client_in_a_thread(
    client: Client, face: BlockingFace, coordinator: Coordinator, stop: threading.Event
) -> None:
    for operation in client.operations(stop):
        try:
            client.note(operation, face.run(operation))
        except Exception as error:
            client.note(operation, None, error)
        if question := client.question():
            transaction, verb = question
            since = time.monotonic()
            try:
                status = getattr(coordinator.blocking, verb)(transaction)
                client.note_answer(since, transaction, verb, status)
            except TransactionError as error:
                logging.warning("%s of %s: %s", verb, transaction, error)
        time.sleep(client.pause())


class Service:
    """What the process consists of."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.stop = threading.Event()
        self.history = HistoryFile(plan.history)
        self.ids: dict[str, str] = {}
        """The transactions of the latest operations that are known by their ids."""
        self.participants = {
            name: PostgreSQL(name, url, pool_size=6, lock_timeout=LOCK_TIMEOUT_SECONDS)
            for name, url in zip(DATABASES, plan.urls, strict=True)
        }
        self.coordinator = Coordinator(
            plan.log,
            cluster=CLUSTER,
            participants=list(self.participants.values()),
            settings=SETTINGS,
        )
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())

    def run(self) -> None:
        if self.plan.is_blocking:
            self._run_blocking()
        else:
            asyncio.run(self._run_on_a_loop())
        self.history.write(Ended)

    def _run_blocking(self) -> None:
        while not self._opened_blocking():
            time.sleep(OPENING_PAUSE_SECONDS)
        threads = [
            threading.Thread(target=self._in_a_thread, args=(number,))
            for number in range(self.plan.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.coordinator.blocking.close()

    def _opened_blocking(self) -> bool:
        try:
            self.coordinator.blocking.open()
        except TransactionError as error:
            self._refuse_to_go_on(error)
        return self.coordinator.loop is not None or self.stop.is_set()

    async def _run_on_a_loop(self) -> None:
        while self.coordinator.is_closed and not self.stop.is_set():
            try:
                await self.coordinator.open()
            except TransactionError as error:
                self._refuse_to_go_on(error)
                await asyncio.sleep(OPENING_PAUSE_SECONDS)
        face = AsyncFace(self.coordinator, self.participants, self.ids)
        last = self.plan.clients - 1
        thread = asyncio.create_task(asyncio.to_thread(self._in_a_thread, last))
        on_the_loop = [
            client_on_the_loop(
                Client(self, number, blocking=False), face, self.coordinator, self.stop
            )
            for number in range(last)
        ]
        await asyncio.gather(thread, *on_the_loop)
        await self.coordinator.close()

    def _refuse_to_go_on(self, error: TransactionError) -> None:
        """A server or the log that is away comes back; anything else is a finding."""
        logging.warning("cannot open yet: %s", error)
        if not isinstance(error, ConfigurationError | LogUnavailable):
            raise error

    def _in_a_thread(self, number: int) -> None:
        face = BlockingFace(self.coordinator, self.participants, self.ids)
        client = Client(self, number, blocking=True)
        client_in_a_thread(client, face, self.coordinator, self.stop)


def main() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        level=logging.INFO,
        stream=sys.stderr,
    )
    Service(msgspec.json.decode(sys.argv[1], type=Plan)).run()


if __name__ == "__main__":
    main()
