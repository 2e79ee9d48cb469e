"""One step of preference training on random tokens: what it takes in memory and time, not what is learnt.

The loss is DPO's over two rows, against reference log-probabilities that are known beforehand, with scores for the
completion's tokens alone: the shape of the recipe's step. Measured by the GPU check and by the planner's test. Needs torch
and peft; knows no data.

Source: Direct Preference Optimization, arXiv 2305.18290, equation 7.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

_BETA = 0.1


def policy_of(module: Any, rank: int, *, checkpointing: bool) -> Any:
    """Return the module with an adapter on all linear layers of its blocks, in float32, ready to be trained.

    Args:
        module: Causal language model; it is wrapped in place.
        rank: Of the adapter.
        checkpointing: Whether activations are computed anew on the way back.
    """
    policy = get_peft_model(module, LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.0))
    policy.train()
    if checkpointing:
        # Its name from transformers 5.18 on, and before.
        enable = getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for each in trained(policy):
        each.data = each.data.float()
    return policy


def trained(policy: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that are trained."""
    return [each for each in policy.parameters() if each.requires_grad]


def optimizer_for(policy: Any) -> Any:
    """Return AdamW: with 8-bit states on a GPU, plain on a CPU."""
    parameters = trained(policy)
    if parameters[0].device.type == "cuda":
        import bitsandbytes

        packed: Any = bitsandbytes.optim
        return packed.AdamW8bit(parameters, lr=1e-4)
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=False)


def backward(policy: Any, ids: torch.Tensor, scored: int, between: Callable[[], None] | None = None) -> float:
    """Add the gradients of one pair's loss, and return the loss.

    Args:
        policy: A model with an adapter.
        ids: Chosen and rejected row (2, T); the rejected one is a little shorter.
        scored: How many tokens at the end of each are the completion's.
        between: Called on the way, when all that the way back needs is held.
    """
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] // 32] = 0
    # Where the base is not float32, sums are made in bfloat16, and the adapter's weights are read as such.
    mixed = policy.get_input_embeddings().weight.dtype is not torch.float32
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
        logits = policy(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=scored + 1).logits
    chances = torch.log_softmax(logits[:, :-1].float(), dim=-1)  # (2, scored, V)
    chosen, rejected = chances.gather(-1, ids[:, -scored:, None]).sum((1, 2))
    reference = (chosen - rejected).detach()
    loss: Any = -torch.nn.functional.logsigmoid(_BETA * (chosen - rejected - reference))
    if between:
        between()
    loss.backward()
    return float(loss.detach())
