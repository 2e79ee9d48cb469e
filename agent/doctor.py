"""Finds out what is installed, which device there is, what will run, and what is missing.

Looks and reports; changes nothing. A finding that keeps Tabwise from working says how to mend it.
"""

import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent import catalog, config, machine, paths, planning
from agent.catalog import LocalModel
from agent.errors import TabwiseError
from agent.memory import Device
from agent.version import __version__

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
    name = settings.model.name
    try:
        model = catalog.find(name)
    except TabwiseError as error:
        yield Finding("model", False, str(error))
        return
    size = _size(model.path)
    yield Finding("model", True, f"{name}: {model.path} ({size / 1e6:.0f} MB)")
    yield _memory(name, model.format)
    yield from _engine(model, settings)


def _engine(model: LocalModel, settings: config.Settings) -> Iterator[Finding]:
    threads = f"{settings.engine.threads or psutil.cpu_count(logical=False)} threads"
    if model.format == "gguf":
        yield Finding("engine", True, f"llama.cpp, {threads}")
        return
    versions = {name: _version(name) for name in ("torch", "transformers", "bitsandbytes")}
    if missing := [name for name, version in versions.items() if version is None]:
        yield Finding(
            "engine",
            False,
            f"transformers, but {', '.join(missing)} is not installed",
            "make train-deps, or a GGUF file",
        )
        return
    on_gpu = _torch_on_gpu()
    where = "a GPU" if on_gpu else f"the CPU, {threads}"
    held = settings.engine.quantisation
    yield Finding(
        "engine",
        True,
        f"transformers {versions['transformers']}, torch {versions['torch']} on {where}, engine.quantisation = {held}",
    )
    if not on_gpu and held in ("nf4", "int8", "bf16"):
        yield Finding(
            "quantisation", None, f"{held} is slow on most CPUs", 'engine.quantisation = "fp32", or a GGUF file'
        )
    yield Finding(
        "figures",
        None,
        f"what is measured here is a {'GPU' if on_gpu else 'CPU'}'s; README and LOG.md say of each figure where it was taken",
    )


def _torch_on_gpu() -> bool:
    # Importing it takes two seconds: its files tell whether it was built for NVIDIA's, the driver whether there is one.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or shutil.which("nvidia-smi") is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def _memory(name: str, model_format: str) -> Finding:
    """Hold the memory plan of the configured model against what is free on the device that will run it."""
    card = machine.gpu() if model_format == "safetensors" else None  # llama.cpp's usual build is for CPUs
    free = card.free_bytes if card else psutil.virtual_memory().available
    asked = planning.Asked(device=(Device.CUDA if card else Device.CPU).value)
    try:
        plan = planning.plan_for(name, asked, planning.budget(asked)).plan
    except TabwiseError as error:
        return Finding("memory", None, f"not planned: {error}")
    needed = plan.total_bytes - plan.bytes_of("system")  # what is free is free beside the system
    text = f"{name} needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    text += f" on {card.name}" if card else ""
    if needed <= free:
        return Finding("memory", True, text)
    return Finding("memory", False, text, f"close programs, or see what would fit: tabwise plan --model {name}")


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
