"""The GPU check's own code, with a tiny model on a CPU: same jobs, same table, no word about a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; make train-deps")

import torch

from agent import catalog, memory, trial_step
from agent.engines.random_model import random_tree
from agent.engines.transformers import TransformersEngine
from agent.errors import UnknownModelError
from agent.gpu_check import checks, subject
from agent.gpu_check.rows import Job, Row, run
from agent.gpu_check.subject import TINY, TINY_SIZES, Subject

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # peft's
)

BLOCKED = (
    "pygls",
    "lsprotocol",
    "xllamacpp",
    "tree_sitter",
    "tree_sitter_python",
    "starlette",
    "uvicorn",
    "aiohttp",
    "httpx",
)


@pytest.fixture
async def tiny() -> AsyncIterator[Subject]:
    loaded = await subject.load("qwen2.5-coder-7b", TINY, torch.device("cpu"), chance=True)
    yield loaded
    await subject.close(loaded)


def gpu_check(*arguments: str, prelude: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{prelude}\nfrom agent.gpu_check.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.e2e
def test_all_of_it_with_a_tiny_model_and_without_the_other_parts_packages(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    blocked = f"for name in {BLOCKED!r}: sys.modules[name] = None"
    done = gpu_check("--device", "cpu", "--tiny", "--json", str(file), prelude=blocked)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    rows: dict[str, Any] = {row["name"]: row for row in found["rows"]}
    assert found["model"] == "tiny, random weights"
    assert found["versions"]["torch"] == torch.__version__
    held = {name for name, row in rows.items() if row["ok"]}
    assert held == {
        "load in four bits",
        "adapters: attach, swap, detach",
        "twin: serving logits while it trains",
        "full memory",
    }
    assert not [row for row in found["rows"] if row["ok"] is False]
    assert rows["decode"]["figures"]["tokens_per_s"] > 0
    assert rows["first text, 40 tokens"]["figures"]["first_text_ms"] > 0
    assert rows["training step, 2 × 16"]["figures"]["step_s"] > 0
    assert (
        rows["memory, all at once"]["figures"]["planned_bytes"] > rows["load in four bits"]["figures"]["planned_bytes"]
    )
    assert "random weights" in done.stdout
    assert "adapters …" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_cuda_it_says_so_in_one_line() -> None:
    done = gpu_check()
    assert done.returncode == 0
    assert done.stdout == "no CUDA device is here, so nothing was checked\n"
    assert done.stderr == ""


def test_without_torch_it_says_so_in_one_line() -> None:
    done = gpu_check(prelude="sys.modules['torch'] = None")
    assert done.returncode == 0
    assert done.stdout == "torch is not installed, so nothing was checked; run: make train-deps\n"


def test_a_model_that_cannot_be_had_is_one_line_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    broken = (
        "import agent.gpu_check.subject as it\nasync def load(*_, **__): raise ValueError('no luck')\nit.load = load"
    )
    done = gpu_check("--device", "cpu", "--tiny", "--json", str(file), prelude=broken)
    assert done.returncode == 1
    rows = json.loads(file.read_text())["rows"]
    assert [(row["name"], row["ok"]) for row in rows] == [("load in four bits", False), ("everything else", None)]
    assert rows[0]["note"] == "ValueError: no luck"
    assert "NO" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--device", "cpu"), "tabwise: --device is cpu, on which"),
        (("--model", "nonesuch"), "tabwise: --model: unknown model 'nonesuch'; known are"),
        (("--device", "cpu", "--tiny", "--memory", "lots"), "tabwise: --memory is 'lots'"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], told: str) -> None:
    done = gpu_check(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1


async def test_one_failure_is_one_row_and_the_others_are_made() -> None:
    clock = iter(range(100))
    told: list[str] = []
    tidied = []

    async def good() -> list[Row]:
        return [Row("good", "done", True)]

    async def bad() -> list[Row]:
        raise ZeroDivisionError("a\nb")

    jobs = [Job("bad", bad), Job("good", good), Job("good", good), Job("late", bad)]
    rows = await run(
        jobs, clock=lambda: float(next(clock)), until=9.0, tell=told.append, after=lambda: tidied.append(1)
    )
    assert [(row.name, row.result, row.ok) for row in rows] == [
        ("bad", "FAILED", False),
        ("good", "done", True),
        ("good", "done", True),
        ("late", "left out", None),
    ]
    assert rows[0].note == "ZeroDivisionError: a b"
    assert len(tidied) == 3
    assert told[0] == "bad …"
    assert "FAILED (ZeroDivisionError: a b)" in told[1]


async def test_a_random_model_is_packed_as_a_loaded_one(tiny: Subject) -> None:
    module: Any = await tiny.engine.with_model(lambda module: module)
    packed = [layer for layer in module.modules() if type(layer).__name__ == "Linear4bit"]
    assert len(packed) == 7 * TINY_SIZES.layers
    assert all(layer.weight.quant_state.nested for layer in packed)
    assert type(module.lm_head).__name__ == "Linear"
    assert not [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    counted = sum(each.numel() * each.element_size() for each in module.parameters())
    constants = sum(
        each.numel() * each.element_size()
        for layer in packed
        for each in (layer.weight.quant_state.absmax, layer.weight.quant_state.state2.absmax)
    )
    # bitsandbytes' tables of 16 and 256 values for each layer are small beside the constants of real layers.
    assert counted + constants == pytest.approx(checks.planned_base(tiny), rel=0.01)


def test_random_weights_are_the_same_for_the_same_seed() -> None:
    one, again, other = (
        dict(random_tree("any", TINY_SIZES, 64, torch.device("cpu"), seed=seed).module.named_parameters())
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)


def test_other_architectures_are_refused() -> None:
    for name in ("starcoder2-7b", "codellama-7b"):
        with pytest.raises(UnknownModelError, match="is no Qwen2"):
            random_tree(name, catalog.entry(name).dimensions, 64, torch.device("cpu"))


async def test_an_adapter_that_changes_nothing_is_noticed(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.zeros(shape))
    with pytest.raises(checks.CheckError, match="the same answer"):
        await checks.adapter_swap(tiny)


async def test_a_twin_that_shares_too_much_is_noticed(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if training wrote into a tensor that serving reads."""

    real = trial_step.backward

    def damaging(policy: Any, *arguments: Any) -> float:
        loss: float = real(policy, *arguments)
        with torch.no_grad():
            policy.get_input_embeddings().weight.mul_(1.5)
        return loss

    monkeypatch.setattr(trial_step, "backward", damaging)
    with pytest.raises(checks.CheckError, match="serving logits changed"):
        await checks.twin_training(tiny)


async def test_memory_that_stays_full_is_noticed(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def lasting(of: Subject, module: Any) -> Iterator[None]:
        handle = module.register_forward_pre_hook(refuse)
        del of, handle
        yield

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(checks, "_pressure", lasting)
    with pytest.raises(memory_errors()):
        await checks.full_memory(tiny)


@pytest.mark.parametrize("shrinks", [False, True])
async def test_memory_that_never_ran_short_is_noticed(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch, shrinks: bool
) -> None:
    """As on a GPU, where it is not known beforehand that a pass is refused."""

    @contextmanager
    def none(of: Subject, module: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(checks, "_pressure", none)
    on_gpu = replace(tiny, device=torch.device("cuda"))  # nothing of the check is sent there
    if shrinks:
        sizes = iter((512, 128))
        monkeypatch.setattr(TransformersEngine, "chunk_tokens", property(lambda engine: next(sizes)))
        (row,) = await checks.full_memory(on_gpu)
        assert row.ok
        assert "served with smaller pieces" in row.note
        return
    with pytest.raises(checks.CheckError, match="memory never ran short: 1016 tokens were read 32 at a time"):
        await checks.full_memory(on_gpu)


def memory_errors() -> tuple[type[Exception], ...]:
    from agent.errors import MemoryFullError

    return MemoryFullError, checks.CheckError


def test_the_cap_leaves_room_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.gpu_check import __main__ as shell

    fractions: list[float] = []
    card = type("Card", (), {"total_memory": 48 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    shell._cap(torch.device("cuda"), 12 << 30)
    assert fractions == [pytest.approx(((12 << 30) - memory.CUDA_RUNTIME_BYTES) / (48 << 30))]
