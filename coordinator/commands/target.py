"""Which coordinator a command works on: the one a file describes, or a service's own object."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from coordinator.coordinator import Coordinator
from coordinator.errors import ConfigurationError

DEFAULT_FILE = Path("syncpoint.toml")


def load(config: Path | None, application: str | None) -> Coordinator:
    """The coordinator, not opened.

    `application` is MODULE:ATTRIBUTE, imported with the working directory on the path. Without it
    the file is `config`, else the one that SYNCPOINT_CONFIG names, else ./syncpoint.toml. Raises
    `ConfigurationError` that names the file, the module or the attribute, and the fix.
    """
    if application is None:
        named = os.environ.get("SYNCPOINT_CONFIG")
        return Coordinator.from_config(config or named or DEFAULT_FILE)
    if config is not None:
        raise ConfigurationError("both --app and a configuration file are named: give one of them")
    module_name, colon, attribute = application.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigurationError(f"--app {application}: write it as shop.db:coordinator")
    found = _import(application, module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(
                f"--app {application}: there is no {part!r} in {module_name}; name the Coordinator "
                "object that this module holds"
            )
        found = getattr(found, part)
    if not isinstance(found, Coordinator):
        raise ConfigurationError(
            f"--app {application} is a {type(found).__name__}: name a Coordinator object"
        )
    return found


def _import(application: str, module_name: str) -> object:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigurationError(
                f"--app {application}: there is no module {missing!r}; name one that can be "
                f"imported from {here} or is installed"
            ) from error
        raise ConfigurationError(
            f"--app {application}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
