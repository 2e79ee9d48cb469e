"""Adapters on a vLLM server, by its routes for loading them while it runs.

vLLM serves an adapter to the requests that give its name as their `model`. Names end with a hash of the weights and so mean
the same for everybody: one that is there already is used as it is. Knows those routes, no files' contents: that an adapter
belongs to the served model is looked at before (`agent/adapters.py`).

Invariant: only adapters that this engine loaded are unloaded by it.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import PurePosixPath

from agent.config import RemoteSettings
from agent.engines.base import Adapter
from agent.engines.remote_http import Connection
from agent.errors import AdapterError, RemoteError

log = logging.getLogger(__name__)

_RELEASE_S = 5.0  # for all of them together: a daemon that ends must not wait for a server that hangs


class RemoteAdapters:
    """The adapters that are served to us."""

    def __init__(self, connection: Connection, settings: RemoteSettings, *, takes: bool) -> None:
        """Serve none yet; `takes` where the server can load any."""
        self._connection = connection
        self._settings = settings
        self._takes = takes
        self.served: Mapping[str, Adapter] = {}
        """The adapters that requests may name, by name."""
        self._ours: set[str] = set()

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        """Serve these in place of those from before; all or nothing.

        Raises:
            AdapterError: The server takes none, or refuses one of them.
            RemoteError: It cannot be reached.
        """
        if adapters and not self._settings.base:
            raise AdapterError(
                "remote.base is not set, so nobody knows whether an adapter fits; set it to the served model's name in "
                "tabwise models list"
            )
        there = await self._there() if adapters else set()
        new: list[str] = []
        try:
            for adapter in adapters:
                if adapter.name not in there:
                    new += [adapter.name] if await self._load(adapter) else []
        except BaseException:
            for name in new:
                await self._unload(name)
            raise
        self.served = {adapter.name: adapter for adapter in adapters}
        self._ours.update(new)
        for name in sorted(self._ours - self.served.keys()):
            await self._unload(name)
            self._ours.discard(name)

    async def again(self, name: str) -> None:
        """Serve one that the server has lost.

        Raises:
            AdapterError: The server takes none, or refuses it.
            RemoteError: It cannot be reached.
        """
        there = await self._there()
        adapter = self.served.get(name)
        if adapter is None:
            raise AdapterError(f"the adapter {name!r} is not attached any more; ask again")
        if name not in there and await self._load(adapter):
            self._ours.add(name)

    async def release(self) -> None:
        """Unload what this engine loaded."""
        ours, self._ours, self.served = sorted(self._ours), set(), {}
        try:
            async with asyncio.timeout(_RELEASE_S):
                for name in ours:
                    await self._unload(name)
        except TimeoutError:
            log.warning("the server does not answer; adapters stay on it: %s", ", ".join(ours))

    async def _there(self) -> set[str]:
        listed = (await self._connection.get("/v1/models")).get("data")
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        # vLLM tells adapters from models by their parent; other servers list whatever may be named.
        return {str(card.get("id")) for card in cards if card.get("parent") or not self._takes}

    async def _load(self, adapter: Adapter) -> bool:
        """Have an adapter loaded; False where somebody else has done it meanwhile."""
        if not self._takes:
            raise AdapterError(
                f"{self._connection.where} does not list the adapter {adapter.name!r}, and takes none while it runs; of "
                "the servers that are known, vLLM does"
            )
        path = self._path(adapter)
        try:
            await self._connection.tell("/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": path})
        except RemoteError as error:
            if error.status is None:
                raise
            if error.status == HTTPStatus.BAD_REQUEST and adapter.name in await self._there():
                return False
            mend = ""
            if error.status == HTTPStatus.NOT_FOUND:
                mend = (
                    f"; it must find {path}, and be started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True "
                    "(docs/scale.md)"
                )
            raise AdapterError(f"the adapter {adapter.name!r} is not served: {error}{mend}") from None
        return True

    async def _unload(self, name: str) -> None:
        # Whether it goes or not, nobody is served anything wrong: names are never used again for other weights.
        try:
            await self._connection.tell("/v1/unload_lora_adapter", {"lora_name": name})
        except RemoteError as error:
            log.warning("the adapter %s stays on the server: %s", name, error)

    def _path(self, adapter: Adapter) -> str:
        folder = self._settings.adapters_dir
        return str(PurePosixPath(folder) / adapter.folder.name) if folder else str(adapter.folder.absolute())
