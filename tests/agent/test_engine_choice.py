import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import catalog, config, engine_choice, memory
from agent.catalog import LocalModel
from agent.config import EngineSettings, RemoteSettings, Settings
from agent.engine_choice import Choice, EngineKind, EngineLoader, Found
from agent.engines.base import Engine
from agent.errors import ConfigError, EngineError, MemoryFullError, RemoteError, UnknownModelError
from agent.memory import Quantisation, Workload
from tests.conftest import World
from tests.fakes import FakeEngine

GGUF = LocalModel("starter", Path("/m.gguf"), "gguf", "qwen", 32768, "")
FOLDER = LocalModel("qwen2.5-coder-7b", Path("/m"), "safetensors", "qwen", 32768, "")
CARD = Found("NVIDIA X", 12 << 30, (), cuda_build=True)
LIBRARIES = Found(None, 0, (), cuda_build=False)


def chosen(kind: str, model: LocalModel, found: Found, needed: int | None = 6 << 30) -> Choice:
    settings = config.with_engine(Settings(remote=RemoteSettings(url="http://10.1.1.1:8000")), kind)
    return engine_choice.choose(settings, model, found, lambda *_: needed)


@pytest.mark.parametrize("model", [GGUF, FOLDER])
def test_a_gpu_that_has_room_runs_transformers(model: LocalModel) -> None:
    choice = chosen("auto", model, CARD)
    assert choice.kind is EngineKind.TRANSFORMERS
    assert "NVIDIA X has room" in choice.reason


@pytest.mark.parametrize(
    ("found", "needed", "why"),
    [
        (Found(), 1, "no NVIDIA GPU"),
        (LIBRARIES, 1, "no NVIDIA GPU"),
        (Found("X", 12 << 30, ("torch",)), 1, "torch is not installed"),
        (Found("X", 12 << 30, (), cuda_build=False), 1, "build for CPUs"),
        (CARD, 13 << 30, "needs 13.0 GiB, 12.0 GiB of NVIDIA X are free"),
        (CARD, None, "not known"),
    ],
)
def test_without_that_llamacpp_does_and_says_why(found: Found, needed: int | None, why: str) -> None:
    choice = chosen("auto", GGUF, found, needed)
    assert choice.kind is EngineKind.LLAMACPP
    assert why in choice.reason


def test_a_model_folder_without_a_gpu() -> None:
    assert chosen("auto", FOLDER, LIBRARIES).kind is EngineKind.TRANSFORMERS
    with pytest.raises(UnknownModelError, match="make train-deps"):
        chosen("auto", FOLDER, Found())
    with pytest.raises(UnknownModelError, match="GGUF"):
        chosen("llamacpp", FOLDER, CARD)


def test_what_is_asked_for_is_taken() -> None:
    assert chosen("llamacpp", GGUF, CARD).kind is EngineKind.LLAMACPP
    assert chosen("transformers", GGUF, LIBRARIES).kind is EngineKind.TRANSFORMERS
    with pytest.raises(EngineError, match="torch, peft"):
        chosen("transformers", GGUF, Found("X", 1, ("torch", "peft")))


SEVEN_GGUF = LocalModel("qwen2.5-coder-7b-gguf", Path("/m.gguf"), "gguf", "qwen", 32768, "")


@pytest.mark.parametrize(
    ("free_gib", "settings", "planned"),
    [
        (24, {}, Workload(Quantisation.BF16)),
        (11, {}, Workload(Quantisation.NF4)),  # since sixteen bits do not fit
        (4, {}, Workload(Quantisation.NF4)),  # the least, so that one can say how much is missing
        (11, {"quantisation": "bf16"}, Workload(Quantisation.BF16)),
        (24, {"quantisation": "nf4"}, Workload(Quantisation.NF4)),
        (24, {"quantisation": "int8"}, Workload(Quantisation.INT8)),
        (11, {"context_tokens": 131_072}, Workload(context_tokens=32_768)),  # all that the model has
        (11, {"cache_contexts": 7, "batch_tokens": 64}, Workload(caches=7, prefill_tokens=64)),
    ],
)
@pytest.mark.parametrize("model", [FOLDER, SEVEN_GGUF])
def test_the_plan_is_that_of_what_transformers_would_do(
    world: World, model: LocalModel, free_gib: int, settings: dict[str, Any], planned: Workload
) -> None:
    needed = engine_choice.planned_bytes(model, EngineSettings.model_validate(settings), free_gib << 30)
    assert needed == memory.plan(catalog.entry(FOLDER.name).dimensions, planned).total_bytes


@pytest.mark.parametrize("model", [FOLDER, SEVEN_GGUF])
def test_auto_takes_a_7b_to_a_card_with_11_gib_free(world: World, model: LocalModel) -> None:
    card = Found("NVIDIA X", 11 << 30, (), cuda_build=True)
    choice = engine_choice.choose(Settings(), model, card, engine_choice.planned_bytes)
    assert choice.kind is EngineKind.TRANSFORMERS
    if model is SEVEN_GGUF:
        choice = engine_choice.choose(
            Settings(), model, replace(card, gpu_free_bytes=6 << 30), engine_choice.planned_bytes
        )
        assert choice.kind is EngineKind.LLAMACPP
        assert "GiB, 6.0 GiB of NVIDIA X are free" in choice.reason


def test_of_a_model_that_is_not_understood_nothing_is_planned(world: World) -> None:
    assert engine_choice.planned_bytes(replace(FOLDER, name="/nonesuch"), EngineSettings(), 1 << 40) is None


def test_a_remote_server_is_only_ever_chosen_by_name() -> None:
    choice = chosen("remote", GGUF, CARD)
    assert choice.kind is EngineKind.REMOTE
    assert "text leaves this machine: it is sent to 10.1.1.1:8000" in choice.reason
    for found in (Found(), CARD, LIBRARIES):
        assert chosen("auto", GGUF, found).kind is not EngineKind.REMOTE


def test_an_engine_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="kind") as caught:
        config.with_engine(Settings(), "vllm")
    assert "\n" not in str(caught.value)


def test_a_remote_model_needs_no_file_and_an_address() -> None:
    settings = config.with_engine(Settings(remote=RemoteSettings(url="http://h", model="m", fim="qwen")), "remote")
    found = engine_choice.find(settings)
    assert (found.name, found.format, found.fim) == ("m", "remote", "qwen")
    with pytest.raises(ConfigError, match=r"remote\.url"):
        engine_choice.find(config.with_engine(Settings(), "remote"))


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_gpu_is_asked_of_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, 'echo "NVIDIA GeForce RTX 4070 Ti, 580.1, 12282, 11500"; echo "Another, 580.1, 8, 4"')
    found = engine_choice.look()
    assert (found.gpu, found.gpu_free_bytes) == ("NVIDIA GeForce RTX 4070 Ti", 11500 << 20)


@pytest.mark.parametrize("script", ["exit 9", "echo 'NVIDIA-SMI has failed, [N/A]'", "echo"])
def test_a_driver_that_does_not_work_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    smi(tmp_path, monkeypatch, script)
    assert engine_choice.look().gpu is None


def test_looking_imports_no_engine() -> None:
    code = (
        "import sys\n"
        "from agent import engine_choice, serve\n"
        "engine_choice.look()\n"
        "print([name for name in ('torch', 'transformers', 'xllamacpp', 'agent.engines.remote') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_remote_load_looks_at_no_gpu(tmp_path: Path) -> None:
    def looked() -> Found:
        raise AssertionError("it was looked")

    remote = RemoteSettings(url="http://127.0.0.1:1", connect_s=0.2)
    settings = Settings(engine=EngineSettings(kind="remote"), remote=remote)
    loader = EngineLoader(settings, tmp_path, look=looked)
    with pytest.raises(RemoteError, match="cannot be reached"):
        await loader.load(engine_choice.find(settings))
    told: dict[str, Any] = loader.told()
    assert told["kind"] == "remote"
    assert told["text_leaves_machine"] is False


async def test_where_the_plan_was_wrong_llamacpp_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        async def load(*_: Any) -> Engine:
            raise MemoryFullError("the GPU is full")

    class Served:
        @staticmethod
        async def load(*_: Any) -> Engine:
            return FakeEngine()

    monkeypatch.setitem(sys.modules, "agent.engines.transformers", SimpleNamespace(TransformersEngine=Full))
    monkeypatch.setitem(sys.modules, "agent.engines.llamacpp", SimpleNamespace(LlamaCppEngine=Served))
    loader = EngineLoader(Settings(), tmp_path, look=lambda: CARD, needs=lambda *_: 1)
    assert isinstance(await loader.load(GGUF), FakeEngine)
    assert loader.told()["kind"] == "llamacpp"
    assert "the GPU is full" in loader.told()["reason"]
    asked_for = EngineLoader(config.with_engine(Settings(), "transformers"), tmp_path, look=lambda: CARD)
    with pytest.raises(MemoryFullError):
        await asked_for.load(GGUF)


def test_where_text_goes_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = config.with_engine(Settings(remote=RemoteSettings(url="http://10.1.1.1")), "remote")
    told = EngineLoader(settings, tmp_path).told()
    assert told["text_leaves_machine"] is True
    assert "10.1.1.1" in told["reason"]
    assert EngineLoader(Settings(), tmp_path).told()["kind"] is None
