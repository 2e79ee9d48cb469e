"""What the doctor says of the engine."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from agent import doctor, engine_choice
from agent.catalog import LocalModel
from agent.config import EngineSettings, Settings
from agent.doctor import Finding
from agent.engine_choice import Found
from tests.conftest import World

FOLDER = LocalModel("mine", Path("mine"), "safetensors", None, 0, "")


def findings(model: LocalModel, **engine: object) -> dict[str, Finding]:
    settings = Settings(engine=EngineSettings.model_validate({"threads": 3} | engine))
    return {finding.topic: finding for finding in doctor._engine(model, settings)}


def test_a_gguf_file_runs_in_llama_cpp() -> None:
    found = findings(LocalModel("m", Path("m.gguf"), "gguf", None, 0, ""))
    assert found["engine"].ok
    assert found["engine"].text.startswith("llama.cpp, 3 threads: ")


def test_a_folder_runs_in_transformers_and_figures_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.2.3")
    for on_gpu, where, figures in ((False, "the CPU, 3 threads", "a CPU's"), (True, "a GPU", "a GPU's")):
        card = Found("a card", 1 << 40, (), cuda_build=True) if on_gpu else Found(missing=())
        monkeypatch.setattr(engine_choice, "look", lambda card=card: card)
        found = findings(FOLDER)
        assert found["engine"].ok
        assert f"torch 1.2.3 on {where}" in found["engine"].text
        assert figures in found["figures"].text
        assert "quantisation" not in found


def test_memory_is_that_of_the_engine_that_was_chosen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ram = SimpleNamespace(available=9 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: ram)
    seven = LocalModel("qwen2.5-coder-7b-gguf", Path("m.gguf"), "gguf", None, 0, "")
    folder = LocalModel("qwen2.5-coder-7b", Path("m"), "safetensors", None, 0, "")
    card = Found("a card", 11 << 30, (), cuda_build=True)

    def memory(model: LocalModel, found: Found, **engine: object) -> Finding:
        monkeypatch.setattr(engine_choice, "look", lambda: found)
        return findings(model, **engine)["memory"]

    for model in (seven, folder):
        told = memory(model, card)
        assert told.ok
        assert "(nf4) needs about 6.6 GiB, 11.0 GiB are free on a card" in told.text
    # The card counts for nothing where llama.cpp, or torch without CUDA, uses the machine's memory.
    told = memory(seven, card, kind="llamacpp")
    assert told.ok
    assert "(gguf) needs about 6.1 GiB, 9.0 GiB are free" in told.text
    assert "a card" not in told.text
    told = memory(folder, replace(card, cuda_build=False))
    assert told.ok is False
    assert "(bf16) needs about" in told.text
    assert told.text.endswith("9.0 GiB are free")


def test_four_bits_on_a_cpu_are_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.2.3")
    monkeypatch.setattr(engine_choice, "look", lambda: Found(missing=()))
    assert "slow" in findings(FOLDER, quantisation="nf4")["quantisation"].text


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "look", lambda: Found(missing=("torch",)))
    found = findings(FOLDER)
    assert found["engine"].ok is False
    assert "torch is missing; run: make train-deps" in found["engine"].text
