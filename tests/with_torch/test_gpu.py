"""What must hold on a GPU, with a 7B in four bits: `make gpu-check` runs the same checks, and measures besides.

Weights are random unless the model was pulled; nothing here reads text.
"""

from collections.abc import AsyncIterator

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; make train-deps")

import torch

from agent.gpu_check import checks, subject
from agent.gpu_check.rows import Row
from agent.gpu_check.subject import FULL, Meter, Subject

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's
]

MODEL = "qwen2.5-coder-7b"


@pytest.fixture(scope="module")
async def seven() -> AsyncIterator[Subject]:
    loaded = await subject.load(MODEL, FULL, torch.device("cuda"), chance=not subject.is_here(MODEL))
    yield loaded
    await subject.close(loaded)


def holds(rows: list[Row]) -> None:
    assert rows
    assert all(row.ok for row in rows), rows


async def test_a_7b_takes_what_was_planned(seven: Subject) -> None:
    held = Meter(seven.device).held_bytes
    assert held == pytest.approx(checks.planned_base(seven), rel=0.03)


async def test_adapters_come_and_go(seven: Subject) -> None:
    holds(list(await checks.adapter_swap(seven)))


async def test_a_twin_trains_while_the_other_serves(seven: Subject) -> None:
    holds(list(await checks.twin_training(seven)))


async def test_full_memory_is_survived(seven: Subject) -> None:
    holds(list(await checks.full_memory(seven)))
