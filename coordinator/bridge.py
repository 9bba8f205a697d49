"""From threads to an event loop and back: what the synchronous face stands on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def run_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine on a loop of another thread and wait for it; raises what it raises.

    It sees the caller's context variables. When the waiting thread is interrupted, by Ctrl-C for
    instance, the coroutine is cancelled. Raises `RuntimeError` if the loop is closed.
    """
    if loop.is_closed():
        coroutine.close()
        raise RuntimeError("the event loop is closed")
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class LoopThread:
    """An event loop in a daemon thread of its own, from now until `stop`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return run_on(self.loop, coroutine)

    def stop(self) -> None:
        """End the loop once what is due now has run, and its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
