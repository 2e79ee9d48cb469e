"""The language server's line to the daemon: opened when first needed, mended when it broke.

Imports the client, and with it aiohttp and pydantic, only after `initialize` was answered: they take as long as half of
the server's start. Knows no protocol.
"""

import asyncio
import importlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from agent.errors import DaemonError, DaemonGoneError, TabwiseError
from agent.types import Completion, CompletionRequest, Explanation, ExplanationRequest

if TYPE_CHECKING:
    from agent.client import DaemonClient

T = TypeVar("T")

_RETRY_S = 5.0  # between two tries to start a daemon that could not start; short enough for who has mended it

log = logging.getLogger(__name__)


class AgentLink:
    """A daemon to talk to, whichever it is at the moment."""

    def __init__(self) -> None:
        """Connect to nothing yet."""
        self.on_loading: Callable[[], None] | None = None
        """Called when an answer has to wait for the model to be loaded."""
        self._client: DaemonClient | None = None
        self._opening = asyncio.Lock()
        self._failure: TabwiseError | None = None
        self._failed = 0.0

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[str | Completion, None]:
        """Yield parts of a completion, then the whole.

        Raises:
            TabwiseError: There is none to be had.
        """
        async with aclosing(self._stream(lambda client: client.complete(request))) as parts:
            async for part in parts:
                yield part

    async def explain(self, request: ExplanationRequest) -> AsyncGenerator[str | Explanation, None]:
        """Yield parts of an explanation, then the whole."""
        async with aclosing(self._stream(lambda client: client.explain(request))) as parts:
            async for part in parts:
                yield part

    async def warm(self) -> AsyncGenerator[str, None]:
        """Have a daemon of our version run, with its model loaded; yields the states on the way."""
        await self._ensure_daemon(await self._open())
        async with aclosing(self._stream(lambda client: client.warm())) as parts:
            async for part in parts:
                yield part

    async def snippet_tokens(self) -> int:
        """Return how many tokens from other files the daemon's prompts hold at most; 0 while that is not known."""
        client = await self._open()
        try:
            return int((await client.status())["snippet_tokens"])
        except TabwiseError as error:
            log.info("nothing of other files is taken now: %s", error)
            return 0

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.__aexit__()

    async def _stream(self, ask: Callable[["DaemonClient"], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """Yield what the daemon answers; where none runs, one is started and asked."""
        client = await self._open()
        try:
            async with aclosing(ask(client)) as parts:
                async for part in parts:
                    yield part
            return
        except DaemonGoneError as gone:
            log.info("starting the daemon: %s", gone)
        await self._ensure_daemon(client)
        async with aclosing(ask(client)) as parts:
            async for part in parts:
                yield part

    async def _ensure_daemon(self, client: "DaemonClient") -> None:
        # A daemon that cannot start would otherwise be tried with every keystroke, a process each.
        if self._failure is not None and time.monotonic() - self._failed < _RETRY_S:
            raise DaemonError(str(self._failure))
        try:
            await client.ensure_daemon()
        except TabwiseError as error:
            self._failure, self._failed = error, time.monotonic()
            raise
        self._failure = None

    async def _open(self) -> "DaemonClient":
        async with self._opening:
            if self._client is None:
                module: Any = await asyncio.to_thread(importlib.import_module, "agent.client")
                self._client = module.DaemonClient()
                self._client.on_loading = self.on_loading
            return self._client
