"""Finds out what is installed, which device there is, what will run, and what is missing.

Looks and reports; changes nothing. A finding that keeps Tabwise from working says how to mend it.
"""

import asyncio
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent import catalog, config, engine_choice, paths, remote_server, served_plan
from agent.catalog import LocalModel
from agent.engine_choice import Choice, EngineKind, Found
from agent.errors import TabwiseError
from agent.memory import Device
from agent.version import __version__

_LOOK_S = 10.0  # for a remote server to say what it serves
_TRAINING = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
_BASE = ("xllamacpp", "pygls", "starlette", "uvicorn")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    ok: bool | None
    """None for a plain fact, or for something that may be missing."""
    text: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look at everything."""
    return list(_examine())


def _examine() -> Iterator[Finding]:
    yield Finding(
        "tabwise", None, f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    cores, memory = psutil.cpu_count(logical=False) or 1, psutil.virtual_memory()
    yield Finding(
        "machine",
        None,
        f"{cores} cores, {memory.total / 2**30:.0f} GiB memory, {memory.available / 2**30:.0f} GiB of it free",
    )
    yield _device()
    for name in _BASE:
        yield _package(name)
    found = {name: _version(name) for name in _TRAINING}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        yield Finding("training", None, f"not installed: {', '.join(missing)}", "make train-deps")
    else:
        yield Finding("training", True, ", ".join(f"{name} {version}" for name, version in found.items()))
    settings = None
    try:
        settings = config.load()
        state = "read" if paths.config_file().exists() else "not there, the defaults hold"
        yield Finding("settings", True, f"{paths.config_file()} ({state})")
    except TabwiseError as error:
        yield Finding("settings", False, str(error), f"edit {paths.config_file()}")
    if settings:
        yield from _model(settings)
    try:
        yield Finding("sockets", True, str(paths.runtime_dir()))
    except TabwiseError as error:
        yield Finding("sockets", False, str(error))
    yield Finding("logs", None, str(paths.log_dir()))


def _device() -> Finding:
    try:
        from agent.engines.llamacpp_server import devices  # 100 MB of native code, and the doctor must work without it
    except ImportError:
        return Finding("device", None, "unknown: llama.cpp is not installed")
    found = devices()
    gpu_here = shutil.which("nvidia-smi") is not None
    if gpu_here and all(kind == "CPU" for kind, _ in found):
        text = f"{found[0][1]} (llama.cpp); an NVIDIA driver is here, but this build of llama.cpp is for CPUs"
        return Finding("device", None, text, "install a CUDA build of xllamacpp into the environment")
    return Finding("device", None, ", ".join(f"{name} ({kind})" for kind, name in found))


def _package(name: str) -> Finding:
    version = _version(name)
    return Finding(name, version is not None, version or "not installed", "" if version else "make install")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _model(settings: config.Settings) -> Iterator[Finding]:
    if settings.engine.kind == "remote":
        yield from _remote(settings)
        return
    name = settings.model.name
    try:
        model = catalog.find(name)
    except TabwiseError as error:
        yield Finding("model", False, str(error))
        return
    size = _size(model.path)
    yield Finding("model", True, f"{name}: {model.path} ({size / 1e6:.0f} MB)")
    yield from _engine(model, settings)


def _engine(model: LocalModel, settings: config.Settings) -> Iterator[Finding]:
    found = engine_choice.look()
    try:
        choice = engine_choice.choose(settings, model, found, engine_choice.planned_bytes)
    except TabwiseError as error:
        yield Finding("engine", False, str(error))
        return
    yield _memory(model, settings, choice, found)
    threads = f"{settings.engine.threads or psutil.cpu_count(logical=False)} threads"
    if choice.kind is not EngineKind.TRANSFORMERS:
        yield Finding("engine", True, f"{choice.kind.label}, {threads}: {choice.reason}")
        return
    on_gpu, held = found.gpu is not None and found.cuda_build, settings.engine.quantisation
    where = "a GPU" if on_gpu else f"the CPU, {threads}"
    versions = f"transformers {_version('transformers')}, torch {_version('torch')}"
    yield Finding("engine", True, f"{versions} on {where}, engine.quantisation = {held}: {choice.reason}")
    if not on_gpu and held in ("nf4", "int8", "bf16"):
        yield Finding(
            "quantisation", None, f"{held} is slow on most CPUs", 'engine.quantisation = "fp32", or a GGUF file'
        )
    yield Finding(
        "figures",
        None,
        f"what is measured here is a {'GPU' if on_gpu else 'CPU'}'s; README and LOG.md say of each figure where it was taken",
    )


def _memory(model: LocalModel, settings: config.Settings, choice: Choice, found: Found) -> Finding:
    """Hold the memory plan of the configured model against what is free on the device of the engine that was chosen."""
    on_gpu = choice.kind is EngineKind.TRANSFORMERS and found.gpu is not None and found.cuda_build
    free = found.gpu_free_bytes if on_gpu else psutil.virtual_memory().available
    try:
        if choice.kind is EngineKind.TRANSFORMERS:
            device = Device.CUDA if on_gpu else Device.CPU
            plan = served_plan.in_transformers(model.name, settings.engine, device, free)
        else:
            plan = served_plan.in_llamacpp(model.name, settings.engine)
    except TabwiseError as error:
        return Finding("memory", None, f"not planned: {error}")
    needed, held = served_plan.needed_bytes(plan), plan.workload.quantisation.value
    text = f"{model.name} ({held}) needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    text += f" on {found.gpu}" if on_gpu else ""
    if needed <= free:
        return Finding("memory", True, text)
    return Finding("memory", False, text, f"close programs, or see what would fit: tabwise plan --model {model.name}")


def _remote(settings: config.Settings) -> Iterator[Finding]:
    """Look at the settings of a remote server, and ask it what it serves."""
    try:
        where = remote_server.root(settings.remote)
        token = remote_server.token(settings.remote)
    except TabwiseError as error:
        yield Finding("engine", False, str(error), f"edit {paths.config_file()}")
        return
    yield Finding("engine", True, f"a remote server: {where}, {'with a token' if token else 'without a token'}")
    # Not a fault, since it was set so; but nobody shall overlook it.
    yield Finding("privacy", None, remote_server.exposure(settings.remote))
    try:
        yield Finding("server", True, asyncio.run(_served(settings)))
    except TabwiseError as error:
        yield Finding("server", False, str(error))


async def _served(settings: config.Settings) -> str:
    from agent.engines.remote import RemoteEngine  # aiohttp takes 0.15 s to import

    # Who looks waits for seconds, not for as long as a completion might.
    remote = settings.remote.model_copy(update={"first_s": min(settings.remote.first_s, _LOOK_S)})
    engine = await RemoteEngine.load(remote, settings.engine)
    try:
        exact = "tokens by id" if engine.dialect.exact else "text alone: no log-probabilities, nothing to learn from"
        return f"{engine.model} by {engine.dialect.name} ({exact}), {engine.context_tokens} tokens of context"
    finally:
        await engine.close()


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
