"""Which of llama.cpp's servers answers, and how another one with other adapters takes its place.

llama.cpp loads adapters with the model. Adapters that the server at work lacks take a new server, which maps the same file:
it is loaded beside the one at work, which answers meanwhile, and put in its place between two streams. Where there is no
room for two, the one at work goes first, and everybody waits until the other one is there; that is so on every GPU. What
was prepared and then given up stays in memory until the next exchange, or until the model is unloaded.

Knows no requests and no slots.

Invariant: what `loaded` and `attached` tell is true of the server that `running` returns.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from agent import gguf_export, gguf_header
from agent.config import EngineSettings
from agent.engines import llamacpp_server
from agent.engines.base import Adapter
from agent.engines.llamacpp_server import LlamaServer
from agent.errors import AdapterError, EngineError, ModelCorruptError, TabwiseError
from agent.gguf_header import GgufHeader

log = logging.getLogger(__name__)

_ROOM = 2.0
"""Times the caches that must be free for two servers at once: buffers, and what other programs take meanwhile."""

Files = tuple[tuple[Adapter, Path], ...]
"""Adapters, and what they were written to for llama.cpp."""


class Servers:
    """The server at work, and the one that is to follow it."""

    def __init__(self, path: Path, settings: EngineSettings, runtime_dir: Path, server: LlamaServer) -> None:
        """Begin with a server without adapters."""
        self.at_work: LlamaServer | None = server
        self.attached: frozenset[str] = frozenset()
        """Names of the adapters that may be asked; the server may hold more, where going back is likely."""
        self._path = path
        self._settings = settings
        self._runtime_dir = runtime_dir
        self._loaded: Files = ()
        self._header: GgufHeader | None = None
        self._closed = False
        self._changing = asyncio.Lock()
        """Held while the server is exchanged, and by short requests, which come while nobody holds the engine's turn."""
        self._preparing = asyncio.Lock()
        """Held, before the other one, while adapters are written and a server is loaded beside the one at work."""
        self._ready: tuple[Files, LlamaServer | None] | None = None
        """What is to be put in place next; without a server where there is no room for two."""

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters that the server at work was loaded with, in its order."""
        return [adapter.name for adapter, _ in self._loaded]

    async def running(self) -> LlamaServer:
        """Return the server at work, brought back where it went away."""
        async with self._changing:
            return await self._present()

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask the server at work for one object; it stays until that is there."""
        async with self._changing:
            return await (await self._present()).post(path, body)

    async def prepare(self, adapters: Sequence[Adapter]) -> None:
        """Load a server for these adapters beside the one at work, where it lacks one and the memory has room for both.

        Raises:
            AdapterError: One of them is damaged or does not fit the model.
        """
        async with self._preparing:
            await self._make_ready({adapter.name: adapter for adapter in adapters})

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        """Have these adapters asked, and no others, by the server that was prepared; no stream may run.

        Raises:
            AdapterError: One of them is damaged or does not fit the model; what was served before still is.
        """
        wanted = {adapter.name: adapter for adapter in adapters}
        async with self._preparing:
            await self._make_ready(wanted)
            async with self._changing:
                if _has(self._loaded, wanted):
                    self.attached = frozenset(wanted)
                else:
                    await self._exchange(frozenset(wanted))

    async def close(self) -> None:
        """Free the memory."""
        async with self._preparing, self._changing:
            self._closed = True
            server, self.at_work = self.at_work, None
            if server is not None:
                await server.close()
            await self._drop_ready()

    async def _make_ready(self, wanted: Mapping[str, Adapter]) -> None:
        if _has(self._loaded, wanted):
            return
        if self._ready is not None and self._ready[1] is not None and _has(self._ready[0], wanted):
            return
        if self._closed:
            raise EngineError("the model was unloaded; ask again")
        await self._drop_ready()
        files = tuple([(adapter, await self._exported(adapter)) for adapter in wanted.values()])
        has_room = self.at_work is not None and self._has_room_for_two()
        self._ready = files, await self._start_with(files) if has_room else None

    async def _drop_ready(self) -> None:
        ready, self._ready = self._ready, None
        if ready is not None and ready[1] is not None:
            await ready[1].close()

    async def _exchange(self, names: frozenset[str]) -> None:
        """Put what is ready in place of the server at work, which comes back where it had to go first, and in vain."""
        assert self._ready is not None
        (files, new), self._ready = self._ready, None
        old = self.at_work
        if new is None:
            self.at_work = None
            if old is not None:
                await old.close()
                old = None
            try:
                new = await self._start_with(files)
            except AdapterError:
                await self._bring_back()
                raise
        # In one go: who is cancelled while the old one ends must not leave one server with the other one's adapters.
        self.at_work, self._loaded, self.attached = new, files, names
        if old is not None:
            await old.close()

    async def _exported(self, adapter: Adapter) -> Path:
        if self._header is None:
            self._header = await asyncio.to_thread(gguf_header.read, self._path)
        return await asyncio.to_thread(gguf_export.exported, adapter, self._header)

    def _has_room_for_two(self) -> bool:
        # On a CPU both map the same weights, and only the caches exist twice for a moment; a GPU would hold all twice.
        header = self._header
        if llamacpp_server.is_on_gpu(self._settings) or header is None:
            return False
        needed = llamacpp_server.caches_bytes(header, self._settings)
        return needed * _ROOM < psutil.virtual_memory().available

    async def _bring_back(self) -> None:
        try:
            self.at_work = await self._start(self._loaded)
        except TabwiseError as error:
            log.error("the model cannot be brought back yet: %s", error)  # the next request tries again

    async def _present(self) -> LlamaServer:
        if self.at_work is None:
            if self._closed:
                raise EngineError("the model was unloaded; ask again")
            self.at_work = await self._start(self._loaded)
        return self.at_work

    async def _start_with(self, files: Files) -> LlamaServer:
        try:
            return await self._start(files)
        except ModelCorruptError as error:
            names = ", ".join(str(adapter.folder) for adapter, _ in files)
            raise AdapterError(f"llama.cpp takes not all of {names}: {error}") from None

    async def _start(self, files: Files) -> LlamaServer:
        return await LlamaServer.start(self._path, self._settings, self._runtime_dir, [file for _, file in files])


def _has(files: Files, wanted: Mapping[str, Adapter]) -> bool:
    return wanted.keys() <= {adapter.name for adapter, _ in files}
