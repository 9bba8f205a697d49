"""Where a database is: a checked connection string that never shows its password."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

from coordinator.errors import ConfigurationError, one_line

NAME_CHARACTERS_MAX = 100

# A peer that vanished without a word is noticed after about half a minute, instead of libpq's
# two hours; whatever the connection string says itself stands.
_DEFAULTS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "application_name": "syncpoint",
}


def check_name(name: str) -> str:
    """The name, or `ConfigurationError` saying what a participant's name may be."""
    if not isinstance(name, str) or not name or len(name) > NAME_CHARACTERS_MAX:
        raise ConfigurationError(
            f"a participant's name has 1 to {NAME_CHARACTERS_MAX} characters, such as 'accounts'; "
            f"got {name!r:.120}"
        )
    if not name.isprintable():
        raise ConfigurationError(f"a participant's name is printable text; got {name!r}")
    return name


class Location:
    """`conninfo` is for libpq; `str()` is host:port/database, for people."""

    def __init__(self, name: str, url: str) -> None:
        example = "postgresql://app@db1.example:5432/accounts"
        if not isinstance(url, str) or not url.strip():
            raise ConfigurationError(f"participant {name!r}: expected a url such as {example}")
        try:
            given = conninfo_to_dict(url)
            self.conninfo = make_conninfo("", **{**_DEFAULTS, **given})
        except psycopg.Error as error:
            # The whole message may quote the string, and so its password.
            what = str(error).partition(":")[0].partition('"')[0].strip()
            raise ConfigurationError(
                f"participant {name!r}: the connection string is malformed ({what}); expected "
                f"something like {example}"
            ) from None
        self._password = str(given.get("password") or "")
        self._host = str(given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST", ""))
        self._port = str(given.get("port") or os.environ.get("PGPORT", "5432"))
        self._database = str(given.get("dbname") or os.environ.get("PGDATABASE", ""))

    @classmethod
    def of_parameters(cls, name: str, parameters: Mapping[str, object]) -> Location:
        """The location that parameters of a connection name; what libpq lacks is left out."""
        known = {option.keyword.decode() for option in Conninfo.get_defaults()}
        given: dict[str, Any] = {"application_name": _DEFAULTS["application_name"]}
        given |= {key: value for key, value in parameters.items() if key in known}
        return cls(name, make_conninfo("", **given))

    def for_people(self, message: str) -> str:
        """The message in one line, and without the password should it be quoted there."""
        line = one_line(message)
        return line.replace(self._password, "***") if self._password else line

    def __str__(self) -> str:
        hosts = self._host.split(",")
        ports = self._port.split(",")
        ports += [ports[-1]] * (len(hosts) - len(ports))
        shown = ",".join(
            f"{host or 'local'}:{port}" for host, port in zip(hosts, ports, strict=False)
        )
        return f"{shown}/{self._database}" if self._database else shown

    def __repr__(self) -> str:
        return f"<Location {self}>"
