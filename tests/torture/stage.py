"""Where a run happens: two servers, the networks to them, the log, the client processes.

    folder/
      options.json   seed and options      faults.jsonl   every fault, with its times
      history/       a file a process      clients/       what each process logged
      syncpoint.db   the log               syncpoint.toml the same service for the command line
      found.json     what was there in the end

Only processes that were started here are ever signalled. All of them end with this one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

import msgspec
import psycopg

from coordinator.model import id_floor
from participants.postgres.embedded import EmbeddedServer
from tests.torture.network import Network
from tests.torture.operations import TABLES
from tests.torture.values import BALANCE, CLUSTER, DATABASES, SETTINGS, Exit, Options, Plan

ROOT = Path(__file__).parents[2]
AHEAD_MS = 3_600_000


def strangers(number: int) -> tuple[str, str]:
    """Names of branches that are not ours: one of another log, and one of another program.

    They are prepared in each database before the run, and must be there after it. The other log's
    clock is ahead, so that a sweep which took the branch for ours would not find it too old.
    """
    transaction = id_floor(round(time.time() * 1000) + AHEAD_MS)
    return f"sp:{'f' * 16}:{'a' * 16}:{transaction}:{number:016x}", f"somebody else {number}"


class Stage:
    """Everything is started by `async with`, and stopped at its end."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder
        settings = {"max_connections": "250"}
        slots = 8 * options.processes
        self.servers = tuple(
            EmbeddedServer(settings, max_prepared_transactions=max(slots, 24)) for _ in DATABASES
        )
        self.server_locks = tuple(asyncio.Lock() for _ in DATABASES)
        self.networks: tuple[Network, ...] = ()
        self.slots: list[Slot] = []
        self.planted: list[str] = []
        self.exits: list[Exit] = []
        self.epoch = time.monotonic()

    @property
    def log_path(self) -> Path:
        return self.folder / "syncpoint.db"

    def direct(self, number: int) -> str:
        """The url of a database, past the network."""
        return self.servers[number].url(DATABASES[number])

    async def __aenter__(self) -> Stage:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()

    async def _start(self) -> None:
        for name in ("history", "clients"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "options.json").write_bytes(msgspec.json.encode(self.options))
        await asyncio.gather(*(asyncio.to_thread(each.start) for each in self.servers))
        for number in range(len(DATABASES)):
            await asyncio.to_thread(self._make_database, number)
        self.networks = tuple(Network(server.port) for server in self.servers)
        for network in self.networks:
            await network.open()
        self._write_config()
        self.epoch = time.monotonic()
        self.slots = [Slot(self, number) for number in range(self.options.processes)]
        for slot in self.slots:
            slot.start()

    async def _stop(self) -> None:
        for slot in self.slots:
            await slot.end(signal.SIGKILL)
        for network in self.networks:
            network.close()
        for server in self.servers:
            await asyncio.to_thread(server.close)

    def _make_database(self, number: int) -> None:
        url = self.servers[number].create_database(DATABASES[number])
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(TABLES.encode())
            connection.execute(
                "INSERT INTO account SELECT id, %s FROM generate_series(0, %s) AS id",
                (BALANCE, self.options.accounts - 1),
            )
        for gid in strangers(number):
            self.planted.append(gid)
            with psycopg.connect(url) as connection:
                connection.execute("INSERT INTO planted VALUES ('a row that stays in doubt')")
                connection.execute(f"PREPARE TRANSACTION '{gid}'".encode())

    def _write_config(self) -> None:
        lines = [f"cluster = '{CLUSTER}'", f"log = 'sqlite:///{self.log_path}'", "[settings]"]
        lines += [f"{name} = {value}" for name, value in msgspec.structs.asdict(SETTINGS).items()]
        for number, name in enumerate(DATABASES):
            lines += [f"[participants.{name}]", "kind = 'postgresql'"]
            lines.append(f"url = '{self.direct(number)}'")
        config = self.folder / "syncpoint.toml"
        config.touch(0o600)
        config.write_text("\n".join(lines) + "\n")

    async def command(self, *arguments: str) -> tuple[int, bytes]:
        """Run `syncpoint` on this service; returns its exit code and what it printed."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "coordinator", *arguments,
            "--config", str(self.folder / "syncpoint.toml"),
            cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        output, _ = await process.communicate()
        return process.returncode or 0, output


class Slot:
    """A place for a client process: when it is killed or ends, the next one takes its place."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.number = number
        self.lock = asyncio.Lock()
        """Held by who kills or pauses it."""
        self.name = ""
        self._stage = stage
        self._count = 0
        self._process: asyncio.subprocess.Process | None = None
        self._sent: set[int] = set()
        self._ends_by: signal.Signals | None = None
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._running = asyncio.get_running_loop().create_task(self._keep_running())

    async def _keep_running(self) -> None:
        while self._ends_by is None:
            await self._spawn()
            assert self._process is not None
            if self._ends_by is not None:  # meanwhile
                self.signal(self._ends_by)
            code = await self._process.wait()
            # Before Python has its handlers, SIGTERM ends it at once.
            by_us = {0: "ended", -signal.SIGKILL: "killed", -signal.SIGTERM: "stopped"}
            how = by_us.get(code, "") if -code in {0, *self._sent} else ""
            self._stage.exits.append(Exit(self.name, how or f"died with {code}"))

    async def _spawn(self) -> None:
        self.name = f"client-{self.number}-{self._count}"
        self._count += 1
        self._sent = set()
        stage = self._stage
        plan = Plan(
            name=self.name,
            seed=str(stage.options.seed),
            log=f"sqlite:///{stage.log_path}",
            urls=(stage.networks[0].url(stage.direct(0)), stage.networks[1].url(stage.direct(1))),
            history=str(stage.folder / "history" / f"{self.name}.jsonl"),
            epoch=stage.epoch,
            clients=stage.options.clients_each,
            accounts=stage.options.accounts,
            is_blocking=self.number % 2 == 1,
        )
        with (stage.folder / "clients" / f"{self.name}.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.torture.client", msgspec.json.encode(plan).decode(),
                cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> bool:
        """False if the process has just gone."""
        process = self._process
        if process is None or process.returncode is not None:
            return False
        self._sent.add(number)
        process.send_signal(number)
        return True

    async def end(self, how: signal.Signals, seconds: float = 30.0) -> None:
        """End it for good, killing it after `seconds`; then its history has no end."""
        self._ends_by = how
        if self._running is None:
            return
        self.signal(how)
        _, late = await asyncio.wait({self._running}, timeout=seconds)
        if late:
            self.signal(signal.SIGKILL)
        await self._running


def processes_of(parent: int) -> list[int]:
    """A process that was started here and those it has started, the parent first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = [parent]
    for each in found:
        found += children.get(each, [])
    return found
