"""A trio loop in a thread of its own, for code that is not under trio.

Invariant: every call runs in the one loop, and its errors come back as they are. A call that is cancelled on this
side is cancelled there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

T = TypeVar("T")


class Portal:
    """The way into the loop. Use `open_portal`."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs `function` in the loop and returns its result; the calling thread waits."""
        return self._portal.call(function)

    async def run(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs `function` in the loop; the caller's asyncio loop goes on meanwhile.

        Cancelling this cancels `function`, and returns when that is over.
        """
        future = self._portal.start_task_soon(function)
        return await asyncio.wrap_future(future)

    async def finish(self, function: Callable[[], Awaitable[T]]) -> T:
        """As `run`, to its end even when the caller is cancelled: for clean-up."""
        return await asyncio.shield(asyncio.wrap_future(self._portal.start_task_soon(function)))

    def hold(self, manager: AbstractAsyncContextManager[T]) -> AbstractContextManager[T]:
        """An asynchronous context manager of the loop as one of this thread."""
        return self._portal.wrap_async_context_manager(manager)


@contextmanager
def open_portal() -> Iterator[Portal]:
    """A loop that ends with the block."""
    with start_blocking_portal("trio") as portal:
        yield Portal(portal)
