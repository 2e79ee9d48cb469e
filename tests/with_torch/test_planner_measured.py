"""The memory planner against what PyTorch really takes: peaks of processes that serve and train models with random weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")
pytest.importorskip("peft", reason="peft is not installed; make train-deps")

from agent import architecture, catalog, memory, weights
from agent.memory import MIB, Device, Optimizer, Quantisation, Training, Workload

TOLERANCE = 0.10
SHARED = {"hidden_size": 768, "intermediate_size": 3072, "tie_word_embeddings": True, "max_position_embeddings": 4096}
MODELS: dict[str, dict[str, Any]] = {
    # 111 M weights each, 424 MiB in 32 bits: a gated MLP, and one without a gate but with biases; fewer key heads in both.
    "qwen2": {"num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32_000}
    | SHARED,
    "starcoder2": {"num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 49_152}
    | SHARED,
}
SERVE = Workload(Quantisation.FP32, Device.CPU, context_tokens=2048, caches=1, prefill_tokens=512, served_rank=0)
# Pieces of 64: a plan adds the serving step to the training step, and in this process the one follows the other.
TRAIN = replace(SERVE, context_tokens=1024, prefill_tokens=64)
STEP = Training(row_tokens=256, scored_tokens=64, optimizer=Optimizer.ADAM)
CASES = {
    "serving": SERVE,
    "training": replace(TRAIN, training=STEP),
    "training, not checkpointed": replace(TRAIN, training=replace(STEP, checkpointing=False)),
    "training, long rows": replace(TRAIN, training=replace(STEP, row_tokens=512, scored_tokens=128)),
}


def measured(kind: str, workload: Workload) -> dict[str, Any]:
    """Run the workload in a process of its own and return what it took, in bytes, less what was held before."""
    training = workload.training
    case = {
        "kind": kind,
        "config": MODELS[kind],
        "context_tokens": workload.context_tokens,
        "prefill_tokens": workload.prefill_tokens,
        "rank": training.rank if training else 0,
        "row_tokens": training.row_tokens if training else 0,
        "scored_tokens": training.scored_tokens if training else 0,
        "checkpointing": training is not None and training.checkpointing,
    }
    # Blocks of 64 KiB and more go back to the system when they are freed: what is held is then what is counted.
    quick_to_free = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.with_torch.peak", json.dumps(case)],
        env=os.environ | quick_to_free | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.e2e  # of processes, and twenty seconds each: no part of the fast tests
@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc"
)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_near_the_measured_peak(kind: str, name: str) -> None:
    workload = CASES[name]
    size = architecture.of_config(kind, MODELS[kind] | {"model_type": kind}).dimensions
    plan = memory.plan(size, workload)
    found = measured(kind, workload)
    planned, peak = plan.tensor_bytes, found["peak"]
    # Beside the weights alone, which are the greater part of a small model and easily counted.
    rest = (planned - plan.base_bytes) / MIB, (peak - found["loaded"]) / MIB
    sys.stdout.write(
        f"\n{kind}, {name}: planned {planned / MIB:.0f} MiB, measured {peak / MIB:.0f} MiB ({planned / peak - 1:+.1%}); "
        f"beside the weights {rest[0]:.0f} and {rest[1]:.0f}\n"
    )
    assert found["cached"] == workload.context_tokens
    if workload.training:
        assert 0.5 < found["loss"] < 0.9, "the loss of an untrained pair is ln 2"
    assert planned == pytest.approx(peak, rel=TOLERANCE)
    assert rest[0] == pytest.approx(rest[1], rel=0.25, abs=15)


CONFIGURATIONS = {
    "deepseek": "llama",
    "codellama": "llama",
    "mellum": "llama",
    "granite": "llama",
    "codegemma": "gemma",
}
"""transformers' families of those whose names do not begin with the family's."""


@pytest.mark.parametrize("name", [name for name, entry in catalog.entries().items() if entry.format == "safetensors"])
def test_weights_are_counted_as_transformers_does(name: str) -> None:
    """On the meta device, where a tensor has a shape and no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = catalog.entry(name).dimensions
    first = name.split("-")[0]
    family = CONFIGURATIONS.get(first, {"qwen2.5": "qwen2"}.get(first, first))
    config = AutoConfig.for_model(
        family,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        vocab_size=size.vocabulary,
        tie_word_embeddings=size.tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **({"attention_bias": True, "mlp_bias": True} if size.biases == "all" and family == "llama" else {}),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert weights.parameters(size) == pytest.approx(sum(each.numel() for each in model.parameters()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapters_weights_are_counted_as_peft_does(kind: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from tests.with_torch.peak import KINDS

    config, model = KINDS[kind]
    with torch.device("meta"):
        policy = get_peft_model(model(config(**MODELS[kind])), LoraConfig(r=16, target_modules="all-linear"))
    size = architecture.of_config(kind, MODELS[kind] | {"model_type": kind}).dimensions
    trained = sum(each.numel() for each in policy.parameters() if each.requires_grad)
    assert weights.lora_parameters(size, 16) == trained
