"""The one thread that computes: whatever touches the model or its caches runs there, one piece of work after the other.

Waiting for work that is given up is not: whoever waits may be cancelled, the work comes to its end all the same, and
`finish` waits for that. Knows no models.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from agent.errors import EngineError

T = TypeVar("T")


class Worker:
    """A thread for an engine."""

    def __init__(self, name: str) -> None:
        """Start when the first work comes."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, in its turn. Who is cancelled meanwhile leaves it to run to its end.

        Raises:
            EngineError: The worker was ended.
        """
        return await asyncio.wrap_future(self._submit(work))

    async def finish(self, work: Callable[[], T]) -> T:
        """Do the same, and return only when it has ended, even if cancelled meanwhile."""
        done = asyncio.wrap_future(self._submit(work))
        cancelled: asyncio.CancelledError | None = None
        while not done.done():
            try:
                await asyncio.shield(done)
            except asyncio.CancelledError as error:
                cancelled = error
            except Exception:  # noqa: BLE001 - raised below, where the result is taken
                break
        if cancelled is not None:
            raise cancelled
        return done.result()

    def end(self) -> None:
        """Take no more work; what waits is still done."""
        self._pool.shutdown(wait=False)

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        try:
            return self._pool.submit(work)
        except RuntimeError:  # the pool's word for having been shut down
            raise EngineError("the model was unloaded; ask again") from None
