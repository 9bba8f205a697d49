"""The services of the how-tos, whose answers also tell which process gave them.

What the coordinator tells its log of messages, such as what a sweep has recovered, is printed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

WORKER = "X-Worker"
logging.basicConfig(level=logging.INFO)


def flask(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    from flask_app import app

    def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
        return start_response(status, [*headers, (WORKER, str(os.getpid()))], *more)

    return app(environ, start)


async def fastapi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    from fastapi_app import app

    async def tell(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"].append((WORKER.encode(), str(os.getpid()).encode()))
        await send(message)

    await app(scope, receive, tell)
