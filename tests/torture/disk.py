"""A file system of one's own that can lose power: what was not flushed to it is gone.

It lives in an image file behind a loop device. `cut` shuts it down without flushing anything, as
`xfs_io -x -c shutdown` does: from then on nothing of it can be written, and what was in memory only
is not there after the next mount. All mounts are in a mount namespace of this process, so nothing
is left behind, however it ends.

What this cannot show: a disk that keeps written blocks in a cache of its own and loses that, or a
block torn in the middle. What reached the image stays there in order.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec


class Kind(msgspec.Struct, frozen=True):
    """How a file system is made without questions, and which package brings its program."""

    package: str
    options: tuple[str, ...]


KINDS = {
    "ext4": Kind("e2fsprogs", ("-q", "-F", "-m", "0")),
    "xfs": Kind("xfsprogs", ("-q", "-f")),
}
"""File systems that can be shut down without flushing."""

IMAGE_MEGABYTES = 400
UNMOUNT_SECONDS_MAX = 10.0
_SHUT_DOWN = 0x8004587D  # XFS_IOC_GOINGDOWN and EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_WITHOUT_FLUSHING = struct.pack("I", 2)
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS


class CannotHere(Exception):
    """This machine does not allow it; says what is missing and what to do."""


class CommandFailed(Exception):
    """A program that mounts, unmounts or makes a file system failed, with what it said."""


def enter_namespace() -> None:
    """Give this process mounts of its own. Raises `CannotHere`."""
    if os.geteuid() != 0:
        raise CannotHere("power cuts need root, to mount a file system: run this as root")
    for program in ("mount", "umount"):
        if shutil.which(program) is None:
            raise CannotHere(f"the program {program} is not there: install util-linux")
    if not Path("/dev/loop-control").exists():
        raise CannotHere("there is no /dev/loop-control: load the kernel module `loop`")
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_NEW_MOUNTS) != 0:
        why = os.strerror(ctypes.get_errno())
        raise CannotHere(f"no mount namespace can be made ({why}): CAP_SYS_ADMIN is needed")
    _run("mount", "--make-rprivate", "/")  # what is mounted here is seen by nobody else


def kinds_here(wanted: list[str]) -> list[str]:
    """Those that can be made and mounted here. Raises `CannotHere` if none of them can."""
    found, reasons = [], []
    for kind in wanted:
        if shutil.which(f"mkfs.{kind}") is None:
            reasons.append(f"mkfs.{kind} is not there, install {KINDS[kind].package}")
            continue
        try:
            with tempfile.TemporaryDirectory() as folder, Disk(kind, Path(folder)):
                found.append(kind)
        except CommandFailed as error:
            reasons.append(str(error))
    if not found:
        raise CannotHere("; ".join(reasons))
    return found


class Disk:
    """A fresh file system of a kind, mounted at `place` while the block runs."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.place = folder / "disk"
        self._image = folder / "image"

    def __enter__(self) -> Disk:
        self.place.mkdir(exist_ok=True)
        with self._image.open("wb") as image:
            image.truncate(IMAGE_MEGABYTES * 1024 * 1024)
        _run(f"mkfs.{self.kind}", *KINDS[self.kind].options, str(self._image))
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount()
        self._image.unlink()

    def mount(self) -> None:
        _run("mount", "-t", self.kind, "-o", "loop", str(self._image), str(self.place))

    def cut(self) -> None:
        """From now on nothing reaches it. Whoever has files open there gets errors."""
        descriptor = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _SHUT_DOWN, _WITHOUT_FLUSHING)
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        """Every file there must be closed, or it is mounted still and holds what it had."""
        give_up = time.monotonic() + UNMOUNT_SECONDS_MAX
        while True:
            try:
                return _run("umount", str(self.place))
            except CommandFailed:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)


def _run(*command: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        told = " ".join((finished.stderr or finished.stdout).split())
        raise CommandFailed(f"{' '.join(command)} failed: {told}")
