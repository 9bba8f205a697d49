"""History files: how a client writes one, and what can be read of one afterwards.

A line is on the disk before the operation that it announces begins, and before anything follows
from the answer that it notes. A process may be killed in the middle of its last line; everything
else that is missing or torn is damage.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from tests.torture.values import Ended, History, Line

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class HistoryFile:
    """The one writer of a file; every thread of the process may use it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._lock = threading.Lock()
        self._lines = 0

    def write(self, kind: type[Line], **fields: Any) -> None:
        """Append a line and wait until it is on the disk."""
        with self._lock:
            line = kind(n=self._lines, at=time.time(), mono=time.monotonic(), **fields)
            self._lines += 1
            os.write(self._descriptor, _encoder.encode(line) + b"\n")
            os.fdatasync(self._descriptor)


def read(name: str, data: bytes) -> History:
    """What a file holds. Pure."""
    lines: list[Line] = []
    damage: list[str] = []
    *whole, last = data.split(b"\n")  # the last is empty, or torn by a kill
    for number, text in enumerate(whole):
        try:
            line = _decoder.decode(text)
        except msgspec.MsgspecError as error:
            damage.append(f"{name}: line {number} cannot be read: {error}")
            continue
        if lines and line.n != lines[-1].n + 1:
            damage.append(f"{name}: line {line.n} follows line {lines[-1].n}")
        elif not lines and line.n != 0:
            damage.append(f"{name}: begins with line {line.n}")
        lines.append(line)
    ends = [number for number, line in enumerate(lines) if isinstance(line, Ended)]
    if ends and (last or ends != [len(lines) - 1]):
        damage.append(f"{name}: something follows its end")
    return History(name, tuple(lines), tuple(damage))


def read_folder(folder: Path) -> tuple[History, ...]:
    """All histories of a run, in the order of their names."""
    return tuple(read(path.stem, path.read_bytes()) for path in sorted(folder.glob("*.jsonl")))


class Tail:
    """Counts outcomes in the files of a folder while they are being written."""

    def __init__(self, folder: Path) -> None:
        self.outcomes: dict[str, int] = {}
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def look(self) -> dict[str, int]:
        """How often each outcome was told until now, and `invoked`, by all files together."""
        for path in self._folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for text in whole.splitlines():
                line = msgspec.json.decode(text)
                kind = line.get("outcome") or {"invoke": "invoked"}.get(line["type"])
                if kind:
                    self.outcomes[kind] = self.outcomes.get(kind, 0) + 1
        return self.outcomes
