"""Members of one machine: a file each, locked by its process for as long as it lives.

The kernel frees the lock when the process dies, however it dies, so who is dead is seen at once and
without a clock. A member's file appears under its name only when it is locked and holds a beat;
names are random and never used again, so whoever finds the lock free may remove the file. Readers
take the lock shared and for a moment, so that two of them do not take each other for the member.

A beat is written in place, which keeps the locked file; a checksum shows a reader that it read in
the middle of a write.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import weakref
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from coordinator.errors import ConfigurationError, LogUnavailable, ProtocolError
from coordinator.members.base import Beat
from coordinator.model import MemberId

_NAME = re.compile(r"[0-9a-f]{16}")
_JOINING = ".joining-"
_READ_BYTES = 64 * 1024
_ATTEMPTS_MAX = 16

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Beat)


class FileMembers:
    """The port `Members` over a directory, which is created by the first member that joins.

    A copy that came into a child process by a fork raises `ConfigurationError`: it keeps no lock,
    and the parent stays the only member.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(os.path.abspath(directory))
        self._member: MemberId | None = None
        self._descriptor = -1
        self._forked = False
        self._last_seen: dict[MemberId, Beat] = {}
        _members.add(self)

    def __repr__(self) -> str:
        return f"<FileMembers {self.directory} as {self._member or 'nobody'}>"

    async def join(self, member: MemberId, beat: Beat) -> None:
        self._check_not_forked()
        if self._member is not None:
            raise ProtocolError(f"member {self._member} has joined already")
        if not _NAME.fullmatch(member):
            raise ProtocolError(f"{member!r} is not a member's id: sixteen hexadecimal digits")
        with self._errors():
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self._descriptor = self._create(member, beat)
        self._member = member

    async def beat(self, beat: Beat) -> None:
        self._check_not_forked()
        if self._member is None:
            raise ProtocolError("a beat of who has not joined")
        with self._errors():
            if os.fstat(self._descriptor).st_nlink == 0:
                # Somebody cleaned the directory. Without a file we would count as dead.
                self.directory.mkdir(mode=0o700, exist_ok=True)
                former, self._descriptor = self._descriptor, self._create(self._member, beat)
                os.close(former)
            else:
                _write(self._descriptor, beat)

    async def alive(self) -> Mapping[MemberId, Beat]:
        self._check_not_forked()
        return await asyncio.to_thread(self._look_around)

    async def leave(self) -> None:
        member, self._member = self._member, None
        if member is None or self._forked:
            return
        descriptor, self._descriptor = self._descriptor, -1
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_nlink:
                os.unlink(self.directory / member)
        os.close(descriptor)

    def _create(self, member: MemberId, beat: Beat) -> int:
        """A locked file with a beat in it, then its name.

        Until it is locked another member may take it for the rest of a dead one and remove it; then
        it is made once more.
        """
        for _ in range(_ATTEMPTS_MAX):
            path = self.directory / f"{_JOINING}{secrets.token_hex(8)}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _write(descriptor, beat)
                os.rename(path, self.directory / member)
            except (BlockingIOError, FileNotFoundError):
                os.close(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                os.close(descriptor)
                raise
            else:
                return descriptor
        raise LogUnavailable(f"no file can be kept in {self.directory}: something removes them")

    def _look_around(self) -> dict[MemberId, Beat]:
        found: dict[MemberId, Beat] = {}
        with self._errors():
            try:
                names = os.listdir(self.directory)
            except FileNotFoundError:
                names = []
            for name in names:
                if not _NAME.fullmatch(name) and not name.startswith(_JOINING):
                    continue
                beat = self._probe(self.directory / name)
                if beat is not None and _NAME.fullmatch(name):
                    found[MemberId(name)] = beat
        self._last_seen = found
        return dict(found)

    def _probe(self, path: Path) -> Beat | None:
        """The beat of a living member; the file of a dead one is removed."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._read(descriptor, MemberId(path.name))
        else:
            path.unlink(missing_ok=True)
            return None
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, member: MemberId) -> Beat:
        for _ in range(_ATTEMPTS_MAX):
            beat = _decode(_read_all(descriptor))
            if beat is not None:
                return beat
        # It lives, which its lock shows. A clock of zero holds the horizon back and harms nothing.
        return self._last_seen.get(member, Beat(clock_ms=0, count=0))

    def _check_not_forked(self) -> None:
        if self._forked:
            raise ConfigurationError(
                f"the members in {self.directory} were opened before this process was forked: open "
                "them in the child, after the fork"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogUnavailable(
                f"the members in {self.directory} cannot be reached: {error}"
            ) from error

    def _abandon(self) -> None:
        """In a forked child: the copy of the descriptor would keep a dead parent alive."""
        self._forked = True
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _write(descriptor: int, beat: Beat) -> None:
    payload = _encoder.encode(beat)
    data = len(payload).to_bytes(4, "big") + zlib.crc32(payload).to_bytes(4, "big") + payload
    written = os.pwrite(descriptor, data, 0)
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], written)


def _read_all(descriptor: int) -> bytes:
    data = b""
    while True:
        part = os.pread(descriptor, _READ_BYTES, len(data))
        data += part
        if len(part) < _READ_BYTES:
            return data


def _decode(data: bytes) -> Beat | None:
    """The beat, or None when a write was under way."""
    payload = data[8 : 8 + int.from_bytes(data[:4], "big")]
    if len(data) < 8 or zlib.crc32(payload) != int.from_bytes(data[4:8], "big"):
        return None
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError:
        return None


_members: weakref.WeakSet[FileMembers] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for members in _members:
        members._abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
