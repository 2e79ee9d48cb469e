"""Which engine serves, and why: llama.cpp, transformers, or a remote server.

`choose` is pure: settings, a model, what was found on this machine, and a memory plan as a callable. The rest looks, and
loads what was chosen. No engine's library is imported before that: torch takes seconds and 300 MB, which a daemon with
llama.cpp must not pay. Engines' modules are imported by name, so that nothing that imports this one imports torch.

Invariant: a remote server is only chosen where the settings say so in so many words, never by `auto`.
"""

import asyncio
import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from agent import catalog, machine, remote_server, served_plan
from agent.catalog import LocalModel
from agent.config import EngineSettings, Settings
from agent.engines.base import Engine
from agent.errors import AdapterError, EngineError, MemoryFullError, ModelError, TabwiseError, UnknownModelError
from agent.memory import Device

_LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")
_CUDA_BUILD = re.compile(r"""^cuda\b[^=\n]*=\s*['"]""", re.MULTILINE)


class EngineKind(StrEnum):
    """What can run a model."""

    LLAMACPP = "llamacpp"
    TRANSFORMERS = "transformers"
    REMOTE = "remote"

    @property
    def label(self) -> str:
        """Its name as it is written for people."""
        return {"llamacpp": "llama.cpp", "transformers": "transformers", "remote": "a remote server"}[self.value]


@dataclass(frozen=True, slots=True)
class Found:
    """What this machine has for the engine that needs more than a CPU."""

    gpu: str | None = None
    """Name of the NVIDIA GPU; None where there is none."""
    gpu_free_bytes: int = 0
    missing: tuple[str, ...] = _LIBRARIES
    """Libraries of the transformers engine that are not installed."""
    cuda_build: bool = False
    """Whether torch was built for CUDA."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that serves, and why in a few words."""

    kind: EngineKind
    reason: str


Needs = Callable[[LocalModel, EngineSettings, int], int | None]
"""Bytes that a model needs on a GPU that has so many free, by the memory plan; None where its sizes are not known."""


def choose(settings: Settings, model: LocalModel, found: Found, needs: Needs) -> Choice:
    """Return which engine runs `model`.

    Args:
        settings: `engine.kind` says which one, or that it is to be found out.
        model: What is to be run.
        found: What this machine has.
        needs: The memory plan.

    Raises:
        EngineError: The one that is wanted is not installed.
        UnknownModelError: The model is of a format that it does not take.
    """
    wanted = settings.engine.kind
    if wanted == "remote":
        return Choice(EngineKind.REMOTE, f'engine.kind is "remote"; {remote_server.exposure(settings.remote)}')
    if wanted == "llamacpp":
        if model.format != "gguf":
            raise UnknownModelError(
                f"{model.name} is a model folder for transformers, and llama.cpp takes GGUF files; choose one in model.name, "
                'or set engine.kind to "auto"'
            )
        return Choice(EngineKind.LLAMACPP, 'engine.kind is "llamacpp"')
    if wanted == "transformers":
        if found.missing:
            raise EngineError(f"the transformers engine needs {', '.join(found.missing)}; run: make train-deps")
        return Choice(EngineKind.TRANSFORMERS, 'engine.kind is "transformers"')
    return _automatic(settings, model, found, needs)


def _automatic(settings: Settings, model: LocalModel, found: Found, needs: Needs) -> Choice:
    against = _against_transformers(settings, model, found, needs)
    if against is None:
        return Choice(EngineKind.TRANSFORMERS, f"{found.gpu} has room for {model.name}")
    if model.format == "gguf":
        return Choice(EngineKind.LLAMACPP, against)
    if not found.missing:
        return Choice(
            EngineKind.TRANSFORMERS, f"{model.name} is a model folder, which llama.cpp does not take ({against})"
        )
    raise UnknownModelError(
        f"{model.name} is a model folder, for which {', '.join(found.missing)} is missing; run: make train-deps, or choose a "
        "GGUF file in model.name"
    )


def _against_transformers(settings: Settings, model: LocalModel, found: Found, needs: Needs) -> str | None:
    """Return why transformers on the GPU is out of the question; None where nothing speaks against it."""
    if found.gpu is None:
        return "no NVIDIA GPU"
    if found.missing:
        return f"{found.gpu} is here, but {', '.join(found.missing)} is not installed (make train-deps)"
    if not found.cuda_build:
        return f"{found.gpu} is here, but torch is a build for CPUs"
    needed = needs(model, settings.engine, found.gpu_free_bytes)
    if needed is None:
        return f"the sizes of {model.name} are not known, so nobody knows whether {found.gpu} has room for it"
    if needed > found.gpu_free_bytes:
        return f"{model.name} needs {needed / 2**30:.1f} GiB, {found.gpu_free_bytes / 2**30:.1f} GiB of {found.gpu} are free"
    return None


def look() -> Found:
    """Find out what this machine has, without importing any of it."""
    missing = tuple(name for name in _LIBRARIES if importlib.util.find_spec(name) is None)
    card = machine.gpu()
    gpu, free_bytes = (card.name, card.free_bytes) if card else (None, 0)
    return Found(gpu, free_bytes, missing, cuda_build="torch" not in missing and _built_for_cuda())


def _built_for_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        # torch writes there what it was built for; to ask torch itself would be to import it.
        return bool(_CUDA_BUILD.search((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")))
    except OSError:
        return False


def planned_bytes(model: LocalModel, settings: EngineSettings, free_bytes: int) -> int | None:
    """Return what `model` needs in transformers on a GPU that has so much free; None where the memory plan cannot say."""
    try:
        plan = served_plan.in_transformers(model.name, settings, Device.CUDA, free_bytes)
    except TabwiseError:
        return None
    return served_plan.needed_bytes(plan)


def model_name(settings: Settings) -> str:
    """Return the name of the model that answers."""
    return settings.model.name if settings.engine.kind != "remote" else settings.remote.model or catalog.REMOTE


def find(settings: Settings) -> LocalModel:
    """Return the model that answers: its files, or that it is elsewhere.

    Raises:
        ConfigError: No server is named for a model that is elsewhere.
        ModelError: There is no such model, or its file is not what it should be.
    """
    if settings.engine.kind != "remote":
        return catalog.find(settings.model.name)
    remote_server.root(settings.remote)
    fmt = None if settings.remote.fim == "auto" else settings.remote.fim
    return LocalModel(model_name(settings), Path(), catalog.REMOTE, fmt, 0, "")


def adapters_base(settings: Settings, model: LocalModel) -> LocalModel:
    """Return the model whose files tell what `model` is: it itself, or what `remote.base` names of one that is elsewhere.

    Raises:
        AdapterError: Nobody knows what is served there.
    """
    if model.format != catalog.REMOTE:
        return model
    name = settings.remote.base
    if not name:
        raise AdapterError(
            "remote.base is not set, so nobody knows whether an adapter fits; set it to the served model's name in "
            "tabwise models list"
        )
    try:
        return catalog.find(name)
    except ModelError as error:
        raise AdapterError(f"remote.base is {name!r}, against which adapters are held, but {error}") from None


class EngineLoader:
    """Finds the configured model, chooses its engine, and loads it."""

    def __init__(
        self, settings: Settings, runtime: Path, *, look: Callable[[], Found] = look, needs: Needs = planned_bytes
    ) -> None:
        """Choose nothing yet: what the machine has is looked at each time that a model is loaded."""
        self.choice: Choice | None = None
        """What was chosen at the last load."""
        self._settings = settings
        self._runtime = runtime
        self._look = look
        self._needs = needs

    async def load(self, model: LocalModel) -> Engine:
        """Bring a model into memory, or a line to it.

        Raises:
            TabwiseError: It cannot be loaded.
        """
        found = Found() if self._settings.engine.kind in ("llamacpp", "remote") else await asyncio.to_thread(self._look)
        self.choice = choose(self._settings, model, found, self._needs)
        if self.choice.kind is EngineKind.TRANSFORMERS:
            try:
                return await self._transformers(model)
            except MemoryFullError as error:
                if self._settings.engine.kind != "auto" or model.format != "gguf":
                    raise
                self.choice = Choice(EngineKind.LLAMACPP, f"transformers could not be used: {error}")
        engine = self._settings.engine
        if self.choice.kind is EngineKind.REMOTE:
            remote: Any = importlib.import_module("agent.engines.remote")
            loaded: Engine = await remote.RemoteEngine.load(self._settings.remote, engine)
        else:
            llamacpp: Any = importlib.import_module("agent.engines.llamacpp")  # 100 MB of native code
            loaded = await llamacpp.LlamaCppEngine.load(model.path, engine, self._runtime)
        return loaded

    async def _transformers(self, model: LocalModel) -> Engine:
        transformers: Any = await asyncio.to_thread(importlib.import_module, "agent.engines.transformers")
        engine: Engine = await transformers.TransformersEngine.load(model, self._settings.engine)
        return engine

    def told(self) -> dict[str, Any]:
        """Return what `tabwise status` shows of it."""
        choice, remote = self.choice, self._settings.engine.kind == "remote"
        if choice is None and remote:  # needs no looking, and nobody shall have to load it to know
            choice = Choice(EngineKind.REMOTE, remote_server.exposure(self._settings.remote))
        return {
            "kind": choice.kind.value if choice else None,
            "reason": choice.reason if choice else None,
            "text_leaves_machine": remote and not remote_server.is_here(self._settings.remote),
        }
