"""Serves and trains a model with random weights, and prints the most memory that it took: run as a process of its own.

The peak is Linux's own account of this process (VmHWM); the resource module's begins with the parent's. Memory that is
freed must go back at once, so whoever starts this sets MALLOC_MMAP_THRESHOLD_.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

from agent import trial_step

KINDS: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM),
}


def memory(field: str) -> int:
    """Return bytes of this process's account: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def serve(model: Any, case: dict[str, Any]) -> DynamicCache:
    """Read a prompt as long as the context into a cache, piece by piece, and return it."""
    cache, tokens, piece = DynamicCache(), case["context_tokens"], case["prefill_tokens"]
    ids = torch.randint(0, case["config"]["vocab_size"], (1, tokens))
    with torch.inference_mode():
        for start in range(0, tokens, piece):
            model(ids[:, start : start + piece], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def train(model: Any, case: dict[str, Any]) -> float:
    """Do two DPO steps of two pairs each, and return the last loss.

    Only in the second step are the optimizer's states there while activations are, and only with the second pair the
    gradients of the first.
    """
    tokens, scored, vocabulary = case["row_tokens"], case["scored_tokens"], case["config"]["vocab_size"]
    policy = trial_step.policy_of(model, case["rank"], checkpointing=case["checkpointing"])
    optimizer = trial_step.optimizer_for(policy)
    loss = 0.0
    for _ in range(2):
        for _ in range(2):
            loss = trial_step.backward(policy, torch.randint(0, vocabulary, (2, tokens)), scored)
        optimizer.step()
        optimizer.zero_grad()
    return loss


def main() -> None:
    """Run the case that stands in the first argument."""
    case = json.loads(sys.argv[1])
    torch.manual_seed(0)
    config, kind = KINDS[case["kind"]]
    # Everything once with a small model, so that what the libraries take for themselves is held before.
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128}
    warm = kind(
        config(**(case["config"] | small | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}))
    )
    few = {"context_tokens": 64, "rank": 4, "row_tokens": 32, "scored_tokens": 8, "config": {"vocab_size": 128}}
    serve(warm, case | few)
    train(warm, case | few)
    del warm
    before = memory("VmRSS")
    model = kind(config(**case["config"])).eval()
    loaded = memory("VmRSS")
    # Making a tied model holds a head of its own for a moment; loading one does not, and is not what is measured here.
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    cache = serve(model, case)
    served = memory("VmHWM")
    loss = train(model, case) if case["rank"] else 0.0
    found = {
        "before": before,
        "loaded": loaded - before,
        "served": served - before,
        "peak": memory("VmHWM") - before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cached": cache.get_seq_length(),
        "loss": loss,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
