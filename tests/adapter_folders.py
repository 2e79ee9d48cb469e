"""Small adapters as PEFT saves them, written without PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent import adapters
from agent.adapters import BaseFacts

FACTS = BaseFacts("base-1", "tokenizer-1", "qwen/line-anchored-1")
MODULE = "model.layers.0.self_attn.q_proj"
RANK, INPUTS, OUTPUTS = 2, 6, 4
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}


def key(module: str, half: str) -> str:
    """The name of a tensor in PEFT's file."""
    return f"base_model.model.{module}.lora_{half}.weight"


def tensors(seed: int = 1) -> dict[str, Any]:
    """The two halves of one module."""
    import numpy as np

    random = np.random.default_rng(seed)
    return {
        key(MODULE, "A"): random.normal(size=(RANK, INPUTS)).astype("f4"),
        key(MODULE, "B"): random.normal(size=(OUTPUTS, RANK)).astype("f4"),
    }


def write_adapter(
    folder: Path,
    *,
    seed: int = 1,
    facts: BaseFacts = FACTS,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter; what `config` has is laid over the ordinary one."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | dict(config or {})))
    save_file(dict(weights if weights is not None else tensors(seed)), folder / "adapter_model.safetensors")
    adapters.write_manifest(folder, facts)
    return folder
