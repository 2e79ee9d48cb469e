"""What the doctor says of the engine."""

from pathlib import Path

import pytest

from agent import doctor, engine_choice
from agent.catalog import LocalModel
from agent.config import EngineSettings, Settings
from agent.doctor import Finding
from agent.engine_choice import Found

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


def test_four_bits_on_a_cpu_are_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.2.3")
    monkeypatch.setattr(engine_choice, "look", lambda: Found(missing=()))
    assert "slow" in findings(FOLDER, quantisation="nf4")["quantisation"].text


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "look", lambda: Found(missing=("torch",)))
    found = findings(FOLDER)
    assert found["engine"].ok is False
    assert "torch is missing; run: make train-deps" in found["engine"].text
