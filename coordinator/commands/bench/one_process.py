"""One measurement in a process of its own, so that its memory is its own.

What to do comes as JSON on stdin, and the measurement goes as JSON to stdout.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from coordinator.commands.bench.syncpoint import Syncpoint
from coordinator.commands.bench.workload import Databases, Measurement, measure
from coordinator.errors import TransactionError


class Order(msgspec.Struct, frozen=True):
    """Transfers with Syncpoint on this log, kept for `retention` seconds."""

    databases: Databases
    clients: int
    seconds: float
    log: str
    retention: float


def measure_apart(order: Order) -> Measurement:
    """Raises `TransactionError` with the last line of what the process said if it failed."""
    # Its own session: Ctrl-C reaches only us, and we end it.
    process = subprocess.Popen(
        [sys.executable, "-m", "coordinator.commands.bench.one_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(msgspec.json.encode(order))
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise TransactionError(f"a measurement in a process of its own failed: {lines[-1]}")
    return msgspec.json.decode(output, type=Measurement)


def main() -> None:
    """The process itself."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    case = Syncpoint(log=Path(order.log), retention=order.retention)
    measurement = measure(case, order.databases, order.clients, order.seconds)
    sys.stdout.buffer.write(msgspec.json.encode(measurement))


if __name__ == "__main__":
    main()
