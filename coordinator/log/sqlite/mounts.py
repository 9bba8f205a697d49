"""Which file system a path is on, as far as the kernel tells (on Linux; elsewhere: unknown)."""

from __future__ import annotations

import os
import re
from pathlib import Path

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "davfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "smb3",
        "smbfs",
        "sshfs",
    }
)
"""Kinds whose locks or shared memory do not reach, or not reliably, across machines. A kind that is
served by a user's process is looked up without its `fuse.`."""

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")


def network_file_system(path: Path) -> str | None:
    """The kind of network file system that holds `path`, or None if it is on none."""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    kind = file_system_of(os.path.realpath(path), mounts)
    return kind if kind.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS else None


def file_system_of(path: str, mounts: str) -> str:
    """The kind of the mount that holds an absolute path; `mounts` is the text of mountinfo."""
    longest, kind = "", ""
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4])
        holds = path == point or path.startswith(point.rstrip("/") + "/")
        # A later mount on the same point hides the earlier one.
        if holds and len(point) >= len(longest):
            longest, kind = point, after.split(" ", 1)[0]
    return kind
