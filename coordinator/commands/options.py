"""Options that commands in files of their own share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.logs import Format, Level, show

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="The configuration file; without it the one that SYNCPOINT_CONFIG names.",
        show_default="./syncpoint.toml",
    ),
]

Application = Annotated[
    str | None,
    typer.Option(
        "--app",
        metavar="MODULE:ATTRIBUTE",
        help="Take the coordinator object of a service's own code instead of a file.",
    ),
]

Json = Annotated[
    bool, typer.Option("--json", help="Machine-readable output on stdout, and nothing else there.")
]

LogLevel = Annotated[
    Level | None,
    typer.Option(
        "--log-level", help="What is logged to stderr, from this level on.", show_default="warning"
    ),
]

LogFormat = Annotated[
    Format | None,
    typer.Option(
        "--log-format", help="How: lines for people, or a JSON object a line.", show_default="text"
    ),
]


def with_logs(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options of its logs, which are set up before it runs."""

    @functools.wraps(command)
    def run(
        *, log_level: Level | None = None, log_format: Format | None = None, **given: Any
    ) -> Any:
        if log_level or log_format:
            show(log_level, log_format or "text")
        return command(**given)

    own = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in (("log_level", LogLevel), ("log_format", LogFormat))
    ]
    parameters = [*own.parameters.values(), *added]
    vars(run)["__signature__"] = own.replace(parameters=parameters)
    return run
