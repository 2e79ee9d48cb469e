"""transformers' own `generate`, from scratch each time: what our decode loop is held against. Knows no caches of ours."""

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers


def generate(module: Any, prompt: Sequence[int], new_tokens: int, end_ids: frozenset[int]) -> tuple[list[int], float]:
    """Return the likeliest text behind a prompt, without the token that ends it, and the seconds that it took."""
    library: Any = transformers
    # What is not given would be taken from the model's own settings, which sample and punish repetition.
    plain = library.GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(end_ids),
        pad_token_id=min(end_ids, default=0),
    )
    ids = torch.tensor([list(prompt)], device=module.device)
    began = time.perf_counter()
    with torch.no_grad():
        written = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    found: list[int] = written[0, len(prompt) :].tolist()
    took = time.perf_counter() - began
    return (found[:-1] if found and found[-1] in end_ids else found), took
