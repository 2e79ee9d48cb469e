"""Keeps one model in memory while it is wanted: loads it on the first request, unloads it after a quiet time.

Knows how long a model was not used, not what it is used for.

Invariant: a model is never unloaded while somebody uses it, and never loaded twice.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import StrEnum

from agent import catalog
from agent.catalog import LocalModel
from agent.crash_guard import CrashGuard
from agent.engines.base import Engine
from agent.errors import EngineError, TabwiseError
from agent.loaded import LoadedModel, prepare

log = logging.getLogger(__name__)

Load = Callable[[LocalModel], Awaitable[Engine]]

_LOOK_EVERY_S = 1.0  # how late an unload may come


class HostState(StrEnum):
    """Whether a model is in memory."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class EngineHost:
    """The one model of a daemon."""

    def __init__(self, name: str, load: Load, guard: CrashGuard, *, unload_after_s: float) -> None:
        """Load nothing yet.

        Args:
            name: Name or path of the model.
            load: Brings a model into memory.
            guard: Is told of each load.
            unload_after_s: Quiet time after which the model leaves memory; 0 for never.
        """
        self.name = name
        self.state = HostState.UNLOADED
        self.error: TabwiseError | None = None
        self.loads = 0
        self.last_used = time.monotonic()
        self.users = 0
        self.on_loaded: Callable[[LoadedModel], Awaitable[None]] | None = None
        """Called with a model that was just loaded, before anybody may use it."""
        self._load = load
        self._guard = guard
        self._unload_after_s = unload_after_s
        self._loaded: LoadedModel | None = None
        self._bringing: asyncio.Task[LoadedModel] | None = None
        self._lock = asyncio.Lock()  # held while a model comes or goes

    @property
    def loaded(self) -> LoadedModel | None:
        """The model in memory, if there is one."""
        return self._loaded

    @asynccontextmanager
    async def use(self) -> AsyncIterator[LoadedModel]:
        """Hold the model in memory, loading it first where it is not.

        Raises:
            ModelError: It cannot be loaded.
        """
        self.users += 1
        try:
            yield await self._ensure()
        finally:
            self.users -= 1
            self.last_used = time.monotonic()

    async def warm(self) -> AsyncGenerator[HostState, None]:
        """Load the model if need be; yields each state on the way.

        Raises:
            ModelError: It cannot be loaded.
        """
        if self._loaded is None:
            yield HostState.LOADING
        async with self.use():
            yield HostState.READY

    async def watch(self) -> None:
        """Unload the model whenever it was not used for long enough; runs until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._loaded and self._unload_after_s and self.idle_s >= self._unload_after_s:
                await self.unload()

    @property
    def idle_s(self) -> float:
        """Seconds since the model was last used; 0 while it is."""
        return 0.0 if self.users else time.monotonic() - self.last_used

    async def unload(self) -> None:
        """Take the model out of memory, unless somebody uses it."""
        async with self._lock:
            if self._loaded is None or self.users:
                return
            loaded, self._loaded, self.state = self._loaded, None, HostState.UNLOADED
            await loaded.engine.close()
            self._guard.unloaded()
            log.info("unloaded %s", self.name)

    async def close(self) -> None:
        """Take the model out of memory, whoever uses it; one that is being loaded is waited for first."""
        if self._bringing is not None:
            await asyncio.gather(self._bringing, return_exceptions=True)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            with contextlib.suppress(TabwiseError):
                await loaded.engine.close()
            self._guard.unloaded()

    async def _ensure(self) -> LoadedModel:
        if self._loaded is not None:
            return self._loaded
        if self._bringing is None:
            # A task of its own, shielded: who gives up waiting must not break a load that others wait for.
            self._bringing = asyncio.create_task(self._bring_once())
            self._bringing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._bringing)

    async def _bring_once(self) -> LoadedModel:
        try:
            async with self._lock:
                self._loaded = await self._bring()
                return self._loaded
        finally:
            self._bringing = None

    async def _understood(self, model: LocalModel) -> LoadedModel:
        engine = await self._load(model)
        try:
            loaded = await prepare(model, engine)
            if self.on_loaded is not None:
                await self.on_loaded(loaded)
            return loaded
        except BaseException:
            await engine.close()  # nobody else knows of it
            raise

    async def _bring(self) -> LoadedModel:
        started = time.perf_counter()
        self.state, self.error = HostState.LOADING, None
        try:
            model = await asyncio.to_thread(catalog.find, self.name)
            self._guard.loading(self.name)
            loaded = await self._understood(model)
            self._guard.serving(self.name)
        except Exception as error:  # noqa: BLE001 - whatever it is, the state must tell that nothing is loaded
            told = error if isinstance(error, TabwiseError) else _unexpected(self.name, error)
            self.state, self.error = HostState.FAILED, told
            self._guard.unloaded()
            log.error("cannot load %s: %s", self.name, told)
            raise told from None
        self.state = HostState.READY
        self.loads += 1
        fmt = loaded.fim.name if loaded.fim else "none"
        log.info("loaded %s in %.2f s, fim format %s", self.name, time.perf_counter() - started, fmt)
        return loaded


def _unexpected(name: str, error: Exception) -> TabwiseError:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return EngineError(f"cannot load {name}: {' '.join(str(reason).split())}; see tabwise doctor")
