"""Which of several requests counts: the latest one for a document, in so far as nobody cancels it.

Knows tasks and keys, no protocol.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Latest:
    """Runs one piece of work for each key; a new one ends the one before."""

    def __init__(self) -> None:
        """Run nothing yet."""
        self._running: dict[str, asyncio.Task[Any]] = {}

    async def run(self, key: str, work: Coroutine[Any, Any, T]) -> T | None:
        """Run `work`, ending what runs for the same key.

        Returns:
            Its result; None where a later call ended it.

        Raises:
            asyncio.CancelledError: The caller was cancelled; the work has ended by then.
        """
        before = self._running.get(key)
        if before is not None:
            before.cancel()
        task = asyncio.create_task(work)
        self._running[key] = task
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            return None
        finally:
            if self._running.get(key) is task:
                del self._running[key]
