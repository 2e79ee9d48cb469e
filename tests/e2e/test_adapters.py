"""Adapters of the real starter model, through the command line and the daemon."""

import asyncio
import json
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from agent import base_facts, catalog, fim, gguf_header
from agent.client import DaemonClient
from agent.engines.base import Task
from agent.errors import AdapterError
from agent.types import Completion, CompletionRequest, Document, Explanation, ExplanationRequest, Generation
from tests.adapter_folders import key, write_adapter
from tests.conftest import SOAK, World, count

pytestmark = pytest.mark.e2e

np = pytest.importorskip("numpy", reason="numpy is not installed; make train-deps")
pytest.importorskip("gguf", reason="gguf is not installed; make train-deps")

_NEAR_NATS = 0.1
"""Between the log-probabilities of one token with the same weights: llama.cpp's kernels for quantised weights round otherwise
for another shape of the batch, and so do two tokens that are about as likely change places."""
RANK = 4
MATRICES = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}


def starter_adapter(folder: Path, seed: int, strength: float = 0.05) -> Path:
    """Random weights on some matrices of all layers: enough to change what the starter thinks likely."""
    model = catalog.find("starter")
    base = gguf_header.read(model.path)
    random = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    for layer in range(base.metadata["qwen2.block_count"]):
        for module, tensor in MATRICES.items():
            inputs, outputs = base.tensors[f"blk.{layer}.{tensor}.weight"].shape
            path = f"model.layers.{layer}.{module}"
            weights[key(path, "A")] = (random.normal(size=(RANK, inputs)) / inputs**0.5).astype("f4")
            weights[key(path, "B")] = (random.normal(size=(outputs, RANK)) * strength).astype("f4")
    config = {"r": RANK, "target_modules": [module.partition(".")[2] for module in MATRICES]}
    return write_adapter(folder, facts=base_facts.of(model, fim.FORMATS["qwen"]), config=config, weights=weights)


async def complete(client: DaemonClient) -> Generation:
    document = Document("file:///a.py", 0, "a.py", "python")
    asked = CompletionRequest(uuid.uuid4().hex, document, "def area(width, height):\n    ", "\n")
    async with aclosing(client.complete(asked)) as parts:
        async for part in parts:
            if isinstance(part, Completion):
                facts = await client.generation(asked.id)
                assert part.adapter == facts.adapter
                return facts
    raise AssertionError("no completion")


async def test_an_adapter_answers_until_it_is_taken_away_and_survives_the_daemon(real_world: World) -> None:
    folder = starter_adapter(real_world.root / "mine", 1)
    async with DaemonClient() as client:
        await client.ensure_daemon()
        bare = await complete(client)
        served = real_world.run("adapters", "serve", str(folder), "--json")
        assert served.returncode == 0, served.stderr
        name = json.loads(served.stdout)["completion"]["name"]
        other = await complete(client)
        assert (bare.adapter, other.adapter) == (None, name)
        assert other.output_logps != bare.output_logps
        explained = [
            part async for part in client.explain(ExplanationRequest("e", "a.py", "python", "x = 1", max_tokens=8))
        ]
        assert isinstance(explained[-1], Explanation)
        assert explained[-1].adapter is None

        assert real_world.run("stop").stdout == "stopped\n"
        await client.ensure_daemon()
        again = await complete(client)
        assert (again.adapter, again.output_ids) == (name, other.output_ids)

        foreign = write_adapter(real_world.root / "foreign")
        with pytest.raises(AdapterError, match="foreign is refused"):
            await client.serve_adapters({Task.COMPLETION: str(foreign)})
        assert (await complete(client)).output_ids == other.output_ids
        await client.serve_adapters({Task.COMPLETION: None})
        last = await complete(client)
        assert (last.adapter, last.output_ids) == (None, bare.output_ids)
        assert last.output_logps == pytest.approx(bare.output_logps, abs=0.05)  # from another piece of the cache


def is_of(adapters_own: Generation, said: Generation) -> bool:
    """Whether this is what the same weights say: token for token as likely, up to where two are as good as each other."""
    steps = zip(adapters_own.output_ids, adapters_own.output_logps, said.output_ids, said.output_logps, strict=False)
    for own_id, own_logp, said_id, said_logp in steps:
        if abs(own_logp - said_logp) > _NEAR_NATS:
            return False
        if own_id != said_id:
            return True  # each was the likeliest where it was written; what follows cannot be compared
    return len(adapters_own.output_ids) == len(said.output_ids)


async def test_swaps_while_four_clients_complete(real_world: World) -> None:
    # Of other strengths, so that their answers differ by far more than a batch's shape makes out.
    strengths = {1: 0.05, 2: 0.2}
    folders = [starter_adapter(real_world.root / f"{seed}", seed, strength) for seed, strength in strengths.items()]
    answers: list[Generation] = []
    swapping = True

    async def type_on() -> None:
        async with DaemonClient() as client:
            while swapping:
                answers.append(await complete(client))

    async with DaemonClient() as client:
        await client.ensure_daemon()
        wanted: dict[str | None, Generation] = {}
        for folder in folders:
            await client.serve_adapters({Task.COMPLETION: str(folder)})
            facts = await complete(client)
            wanted[facts.adapter] = facts
        one, other = wanted.values()
        assert not is_of(one, other)  # or it would not be seen who was answered by the wrong one
        assert not is_of(other, one)
        typists = [asyncio.create_task(type_on()) for _ in range(4)]
        for number in range(count(200)):
            await client.serve_adapters({Task.COMPLETION: str(folders[number % 2])})
            await asyncio.sleep(0.1)
        swapping = False
        await asyncio.gather(*typists)
    assert {facts.adapter for facts in answers} == wanted.keys()
    for facts in answers:
        assert is_of(wanted[facts.adapter], facts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_peft_and_llamacpp_serve_the_same(real_world: World) -> None:
    pytest.importorskip("peft", reason="peft is not installed; make train-deps")
    prompts = 100 if SOAK else 3  # the reference reads each in float32: seconds, and minutes for what it unpacks first
    done = real_world.run("bench", "adapter", "--prompts", str(prompts), "--json", timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["changed_texts"] > 0
    assert found["scale_0_exact"] == prompts
    assert found["f16_mean_gap_nats"] < 0.02
    assert found["f16_same"] >= 0.95 * prompts - 1  # one of few may be a near tie
    assert found["q4_same"] >= found["q4_same_bare"] - max(1, 0.03 * prompts)
