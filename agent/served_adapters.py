"""Which adapter serves which task, while requests run.

What is wanted is a folder for each task; it is remembered across unloads of the model and across daemons. What is served
follows: looked at, attached, and only then taken for new answers. An answer holds the adapter that it was begun with: that
one stays attached until the answer is whole, and a few of the last stay attached after it, so that going back is quick.
Knows engines through their protocol only.

Invariants: an adapter that is refused changes nothing; one that is held is never detached.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import adapters, base_facts, paths
from agent.engine_host import EngineHost
from agent.engines.base import Adapter, Task
from agent.errors import AdapterError, TabwiseError
from agent.loaded import LoadedModel

log = logging.getLogger(__name__)

_SPARE = 2  # adapters that stay attached unused: the one before, and a candidate that is compared with it


@dataclass(frozen=True, slots=True)
class Served:
    """What a task is served with."""

    folder: Path | None = None
    """The folder that is wanted; None for the bare model."""
    adapter: Adapter | None = None
    """The adapter that answers now; None for the bare model."""
    error: str | None = None
    """Why the one that is wanted does not answer, where that is so."""


class ServedAdapters:
    """The adapters of a daemon."""

    def __init__(self, host: EngineHost, record: Path) -> None:
        """Take up what was wanted before.

        Args:
            host: The model; it serves what is wanted as soon as it is loaded.
            record: File in which what is wanted is remembered.
        """
        self._host = host
        self._record = record
        self._tasks = {task: Served(folder) for task, folder in _remembered(record).items()}
        self._attached: tuple[Adapter, ...] = ()
        """Those that were taken last first."""
        self._held: Counter[str] = Counter()
        self._changing = asyncio.Lock()
        host.on_loaded = self.restore

    @asynccontextmanager
    async def held(self, task: Task) -> AsyncIterator[str | None]:
        """Have an answer's adapter stay attached; yields its name, or None for the bare model."""
        adapter = self._tasks[task].adapter
        if adapter is None:
            yield None
            return
        self._held[adapter.name] += 1
        try:
            yield adapter.name
        finally:
            self._held[adapter.name] -= 1

    async def serve(self, wanted: Mapping[Task, Path | None]) -> None:
        """Serve these tasks with these folders' adapters, once the model is loaded; others are served as before.

        Raises:
            AdapterError: One of them is refused; nothing has changed.
            ModelError: The model cannot be loaded.
        """
        async with self._host.use() as loaded, self._changing:
            new = {task: await self._inspected(loaded, folder) for task, folder in wanted.items()}
            tasks = self._tasks | new
            await self._attach(loaded, tasks)
            self._tasks = tasks
            folders = {task.value: str(served.folder) for task, served in tasks.items() if served.folder}
            await asyncio.to_thread(_remember, self._record, folders)
        for task, served in new.items():
            log.info("%s is served with %s", task.value, served.adapter.name if served.adapter else "the bare model")

    async def restore(self, loaded: LoadedModel) -> None:
        """Serve with a model that was just loaded what is wanted; what is refused is said in the status."""
        async with self._changing:
            self._attached = ()
            wanted, self._tasks = self._tasks, {task: Served() for task in Task}
            tasks = {task: await self._looked_at(loaded, before.folder) for task, before in wanted.items()}
            try:
                await self._attach(loaded, tasks)
            except TabwiseError as error:
                log.error("no adapter is served: %s", error)
                tasks = {task: Served(one.folder, None, one.error or str(error)) for task, one in tasks.items()}
            self._tasks = tasks

    def describe(self) -> dict[str, dict[str, Any] | None]:
        """Return what is wanted and what is served, by task; None for the bare model."""
        return {
            task.value: {
                "folder": str(served.folder),
                "name": served.adapter.name if served.adapter else None,
                "error": served.error,
            }
            if served.folder
            else None
            for task, served in self._tasks.items()
        }

    async def _inspected(self, loaded: LoadedModel, folder: Path | None) -> Served:
        if folder is None:
            return Served()
        facts = await asyncio.to_thread(base_facts.of, loaded.model, loaded.fim)
        return Served(folder, await asyncio.to_thread(adapters.inspect, folder, facts))

    async def _looked_at(self, loaded: LoadedModel, folder: Path | None) -> Served:
        try:
            return await self._inspected(loaded, folder)
        except TabwiseError as error:
            log.error("an adapter is not served: %s", error)
            return Served(folder, None, str(error))

    async def _attach(self, loaded: LoadedModel, tasks: Mapping[Task, Served]) -> None:
        """Have attached what is to be served, what serves until then, what is held, and a few more."""
        new = {served.adapter.name: served.adapter for served in tasks.values() if served.adapter}
        serving = {served.adapter.name for served in self._tasks.values() if served.adapter}
        # Answers that begin while this waits for its turn still begin with what serves now.
        needed = [one for one in self._attached if one.name in serving or self._held[one.name]]
        others = [one for one in self._attached if one not in needed]
        first = list((new | {one.name: one for one in needed}).values())
        spare = [one for one in others if one.name not in new][:_SPARE]
        if not first and not self._attached:
            return
        try:
            await loaded.engine.attach([*first, *spare])
        except AdapterError:
            if not spare:
                raise
            spare = []  # an adapter that nobody asked for may have gone from the disk
            await loaded.engine.attach(first)
        self._attached = (*first, *spare)


def _remembered(record: Path) -> dict[Task, Path | None]:
    try:
        raw = json.loads(record.read_text(encoding="utf-8"))
        folders = {task: raw.get(task.value) for task in Task}
    except FileNotFoundError:
        folders = {}
    except (OSError, ValueError, AttributeError):
        log.error("the record %s of what was served cannot be read; serve the adapters anew", record)
        folders = {}
    return {task: Path(str(folders[task])) if folders.get(task) else None for task in Task}


def _remember(record: Path, folders: Mapping[str, str]) -> None:
    paths.private_dir(record.parent)
    paths.write_private(record, json.dumps(folders))
