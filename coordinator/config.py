"""Frozen settings, and the file `syncpoint.toml` that every command reads.

`Settings.validate` checks each field and the relations between them, at one place and before
anything begins; a wrong one is answered by `ConfigurationError` with the field, the value and the
fix.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec

from coordinator.errors import ConfigurationError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times in seconds. The defaults suit transactions of milliseconds to minutes."""

    timeout: float = 30.0
    """The deadline of a transaction that names none."""
    timeout_max: float = 300.0
    """The longest deadline a transaction may ask for; the same in every process of a cluster."""
    retention: float = 900.0
    """How long a finished record is kept at least; more than twice the longest deadline."""
    key_retention: float = 86_400.0
    """How long idempotency keys are kept."""
    absence_limit: float = 604_800.0
    """How long forgetting waits for a participant that no process has swept."""
    sweep_interval: float = 1.0
    """The pause between two rounds of the sweep."""
    scan_timeout: float = 3.0
    """How long a round waits for one participant to list its branches."""
    beat_interval: float = 0.5
    """How often a member says that it lives, and what it drives."""
    active_most: int = 8
    """How many transactions may work in databases at once, where those are near."""
    drain_timeout: float = 10.0
    """How long closing waits for second phases that are under way."""
    retry_first: float = 0.05
    """The first pause before a failed second phase is tried again; it doubles, with jitter."""
    retry_most: float = 5.0
    """The longest such pause."""

    def validate(self) -> Settings:
        """Return self; raises `ConfigurationError` for the first field that cannot work."""
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ConfigurationError(f"setting {field} is {value!r}: give seconds above 0")
        if not isinstance(self.active_most, int) or self.active_most < 1:
            raise ConfigurationError(
                f"setting active_most is {self.active_most!r}: give a whole number of transactions"
            )
        if self.timeout > self.timeout_max:
            raise ConfigurationError(
                f"setting timeout is {self.timeout} s, above timeout_max ({self.timeout_max} s): "
                "lower the one or raise the other"
            )
        if self.retention <= 2 * self.timeout_max:
            raise ConfigurationError(
                f"setting retention is {self.retention} s: it must be more than twice timeout_max "
                f"({self.timeout_max} s), or a transaction could outlive its own record"
            )
        if self.retry_first > self.retry_most:
            raise ConfigurationError(
                f"setting retry_first ({self.retry_first} s) is above retry_most "
                f"({self.retry_most} s): lower the one or raise the other"
            )
        return self


class ParticipantConfig(msgspec.Struct, frozen=True):
    """One `[participants.NAME]` table: its kind, and the options of that kind."""

    name: str
    kind: str
    options: Mapping[str, Any]


class Config(msgspec.Struct, frozen=True):
    """A whole `syncpoint.toml`."""

    cluster: str
    log: str
    participants: tuple[ParticipantConfig, ...]
    settings: Settings


def load(path: Path) -> Config:
    """Read and check a configuration file; `ConfigurationError` names the file and the field."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{path}: no such file. Create it, or name another with --config or SYNCPOINT_CONFIG"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    try:
        return _parse(_expand(raw, "", path.parent))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _parse(raw: dict[str, Any]) -> Config:
    unknown = raw.keys() - {"cluster", "log", "participants", "settings"}
    if unknown:
        raise ConfigurationError(
            f"unknown key {sorted(unknown)[0]!r}: there are cluster, log, participants, settings"
        )
    for key in ("cluster", "log"):
        if not isinstance(raw.get(key), str) or not raw[key]:
            raise ConfigurationError(f"{key} is {raw.get(key)!r}: give a text")
    tables = raw.get("participants", {})
    if not isinstance(tables, dict):
        raise ConfigurationError("participants: write a table [participants.NAME] for each")
    try:
        settings = msgspec.convert(raw.get("settings", {}), Settings)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"settings: {error}") from error
    participants = tuple(_participant(name, table) for name, table in tables.items())
    return Config(raw["cluster"], raw["log"], participants, settings.validate())


def _participant(name: str, table: object) -> ParticipantConfig:
    if not isinstance(table, dict) or not isinstance(table.get("kind"), str):
        raise ConfigurationError(f'participants.{name}: name its kind, for instance "postgresql"')
    return ParticipantConfig(name, table["kind"], {k: v for k, v in table.items() if k != "kind"})


def _expand(value: Any, field: str, folder: Path) -> Any:
    """Replace `${NAME}` by the environment and `file:PATH` by a secret's text, everywhere."""
    if isinstance(value, dict):
        return {
            key: _expand(each, f"{field}.{key}".lstrip("."), folder) for key, each in value.items()
        }
    if isinstance(value, list):
        return [_expand(each, field, folder) for each in value]
    if not isinstance(value, str):
        return value
    if value.startswith("file:"):
        secret = folder / value.removeprefix("file:")
        try:
            return secret.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{field}: the secret {secret} cannot be read: {error}"
            ) from error

    def replace(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigurationError(f"{field}: the environment has no variable {match[1]}")
        return os.environ[match[1]]

    return _VARIABLE.sub(replace, value)


def build(described: ParticipantConfig, path: str) -> Any:
    """The participant that a table describes, by its kind's entry point.

    Raises `ConfigurationError` naming the file, the participant and what is wrong.
    """
    kinds = {each.name: each for each in entry_points(group="syncpoint.participants")}
    where = f"{path}: participants.{described.name}"
    if described.kind not in kinds:
        raise ConfigurationError(
            f"{where}: unknown kind {described.kind!r}: there are {', '.join(sorted(kinds))}"
        )
    try:
        factory = kinds[described.kind].load()
    except ImportError as error:
        raise ConfigurationError(
            f"{where}: {error}; install the adapter with `pip install 'syncpoint[all]'`"
        ) from error
    try:
        participant = factory(described.name, **described.options)
    except TypeError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    return participant
