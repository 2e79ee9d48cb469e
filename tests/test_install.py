"""The installer: what it refuses, and what it says."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pip_calls(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []

    def pip(python: Path, *arguments: str) -> None:
        assert python.exists()
        if "--report" in arguments:
            items: list[dict[str, Any]] = [
                {"metadata": {"name": name}, "download_info": {"url": f"file:///none/{name}.whl"}}
                for name in (["torch", "nvidia-cublas", "triton"] if "cuda" in arguments[-1] else ["torch", "numpy"])
            ]
            Path(arguments[arguments.index("--report") + 1]).write_text(json.dumps({"install": items}))
        calls.append(arguments)

    monkeypatch.setattr(installer, "_pip", pip)
    monkeypatch.setattr(installer.shutil, "which", lambda _: None)
    return calls


def test_an_environment_of_somebody_elses_is_refused(
    installer: ModuleType, tmp_path: Path, pip_calls: list[Any]
) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(installer.InstallError, match="was not made by this script"):
        installer.install(tmp_path / "other", [], "", cuda=False)
    assert pip_calls == []


def test_it_installs_once_and_adds_what_is_missing(installer: ModuleType, tmp_path: Path, pip_calls: list[Any]) -> None:
    environment = tmp_path / "env"
    installer.install(environment, [], "", cuda=False)
    assert len(pip_calls) == 1
    installer.install(environment, [], "", cuda=False)
    assert len(pip_calls) == 1
    installer.install(environment, ["dev"], "", cuda=False)
    assert pip_calls[-1][-1].endswith("[dev]")
    installer.install(environment, [], "", cuda=False)  # less is there already
    assert len(pip_calls) == 2


def test_cuda_is_refused_on_a_machine_without_a_gpu_and_the_way_out_is_told(
    installer: ModuleType, tmp_path: Path, pip_calls: list[Any]
) -> None:
    with pytest.raises(installer.InstallError, match=r"GB of CUDA packages \(2 of them\).*TORCH=") as caught:
        installer.install(tmp_path / "env", ["train"], "torch-cuda", cuda=False)
    assert "\n" not in str(caught.value)
    assert not [call for call in pip_calls if "--dry-run" not in call]
    installer.install(tmp_path / "env", ["train"], "torch-cuda", cuda=True)
    assert any(call[-1] == "torch-cuda" for call in pip_calls)


def test_a_cpu_build_goes_through(installer: ModuleType, tmp_path: Path, pip_calls: list[Any]) -> None:
    installer.install(tmp_path / "env", ["train"], "", cuda=False)
    assert pip_calls[0][-1] == "torch==2.13.0"
    assert pip_calls[-1][-1].endswith("[train]")
