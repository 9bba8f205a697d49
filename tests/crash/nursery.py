"""A warm process that forks the processes of the crash tests: an interpreter for each is too dear.

    with Nursery(folder) as nursery:
        process = await nursery.start(plan)

Run as `python -m tests.crash.nursery DESCRIPTOR` it has imported everything, has no thread and no
event loop, and opens nothing itself, so that its forks are as good as fresh processes.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType

import msgspec

from coordinator import cli
from tests.crash.fates import Wire
from tests.crash.process import Plan, run

ROOT = Path(__file__).parents[2]
LINE_SECONDS_MAX = 60.0
_MESSAGE_BYTES_MAX = 64 * 1024
_END_ALL = b"end all"


class Process:
    """A process of a test, at the other end of a socket. `lines` is all that it said."""

    def __init__(
        self,
        nursery: Nursery,
        process_id: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.id = process_id
        self.lines: list[str] = []
        self._nursery = nursery
        self._reader = reader
        self._writer = writer

    async def until(self, word: str) -> None:
        """Read until a line begins with the word."""
        said = await self.says(word)
        assert said, f"the process ended and never said {word!r}, only {self.lines}"

    async def says(self, word: str) -> bool:
        """Read until a line begins with the word; False if the process ended without."""
        while not self.said(word):
            if await self._line() is None:
                return False
        return True

    def said(self, word: str) -> list[str]:
        """What followed the word in each line that began with it."""
        parted = [line.partition(" ") for line in self.lines]
        return [rest for first, _, rest in parted if first == word]

    def go_on(self) -> None:
        self._writer.write(b"go on\n")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.id, number)

    async def ended(self) -> int:
        """Read to the end; returns the exit code, negative for a signal."""
        while await self._line() is not None:
            pass
        self._writer.close()
        return self._nursery.exit_code(self.id)

    async def _line(self) -> str | None:
        async with asyncio.timeout(LINE_SECONDS_MAX):
            try:
                line = await self._reader.readline()
            except ConnectionResetError:  # it was killed with something unread
                line = b""
        if not line:
            return None
        self.lines.append(line.decode().rstrip("\n"))
        return self.lines[-1]


class Nursery:
    """Starts processes by forks of one that is warm; kills them all at its end."""

    def __init__(self, folder: Path) -> None:
        self._errors = folder / "stderr"

    def __enter__(self) -> Nursery:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.nursery", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stderr=errors,
            )
        theirs.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()  # which it takes as its end
        self._process.wait()

    async def start(self, plan: Plan) -> Process:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._socket, [msgspec.json.encode(plan)], [theirs.fileno()])
        process_id = int(self._socket.recv(_MESSAGE_BYTES_MAX))
        reader, writer = await asyncio.open_connection(sock=ours)
        return Process(self, process_id, reader, writer)

    def exit_code(self, process_id: int) -> int:
        self._socket.send(b"%d" % process_id)
        return int(self._socket.recv(_MESSAGE_BYTES_MAX))

    def end_all(self) -> None:
        """Kill every process that has not been asked for its exit code."""
        self._socket.send(_END_ALL)
        self._socket.recv(_MESSAGE_BYTES_MAX)

    def errors(self) -> str:
        """The end of what all processes wrote to stderr."""
        return self._errors.read_text(errors="replace")[-4000:]


def _serve(control: socket.socket) -> None:
    """Fork for each plan, and tell the exit code of each process that is asked for."""
    children: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES_MAX, 1)
        if not message:
            break
        if message == _END_ALL:
            _end(children)
            control.send(message)
            continue
        if not descriptors:
            process_id, status = os.waitpid(int(message), 0)
            children.remove(process_id)
            control.send(b"%d" % os.waitstatus_to_exitcode(status))
            continue
        process_id = os.fork()
        if process_id == 0:
            control.close()
            _live(msgspec.json.decode(message, type=Plan), socket.socket(fileno=descriptors[0]))
        os.close(descriptors[0])
        children.add(process_id)
        control.send(b"%d" % process_id)
    _end(children)


def _end(children: set[int]) -> None:
    while children:
        process_id = children.pop()
        os.kill(process_id, signal.SIGKILL)
        os.waitpid(process_id, 0)


def _live(plan: Plan, connection: socket.socket) -> None:
    """Be the process of the plan, and end without the parent's cleanup."""
    code = 70
    try:
        run(plan, Wire(connection))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _warm_up() -> None:
    """Import what a command imports when it first runs; this one fails, as its file is missing."""
    cli.main(["recover", "--config", str(ROOT / "missing.toml")])


if __name__ == "__main__":
    _warm_up()
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
