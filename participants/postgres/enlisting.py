"""What `connection()` and `session()` return: awaitable, and an asynchronous context manager."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Enlisting(Generic[_T]):
    """`await` it, or use it with `async with`; leaving the block changes nothing.

    `ask` gives what belongs to the running transaction, the same one however often it is called.
    """

    __slots__ = ("_ask",)

    def __init__(self, ask: Callable[[], Coroutine[Any, Any, _T]]) -> None:
        self._ask = ask

    def __await__(self) -> Generator[Any, Any, _T]:
        return self._ask().__await__()

    async def __aenter__(self) -> _T:
        return await self._ask()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The transaction goes on."""
