"""A model of a real one's shape whose weights are chance: what it takes and how fast it is are the real one's, its text is not.

For measuring a card on which no weights lie. Made on the device, one matrix after the other, each quantised before the
next is made, so that a 7B in four bits never needs more than it has in the end and one matrix. Qwen2's architecture only:
it is the catalogue's main one. Knows nothing of what is measured.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from agent.catalog import Dimensions
from agent.engines.loading import LoadedTree
from agent.engines.quantisation import Quantisation
from agent.engines.vocabulary import Vocabulary
from agent.errors import UnknownModelError

_SPREAD = 0.02  # of weights, as Qwen2's own initialisation has it
_END = "<|endoftext|>"


def random_tree(name: str, size: Dimensions, context_tokens: int, device: torch.device, *, seed: int = 0) -> LoadedTree:
    """Return a model in NF4 with random weights, frozen and in evaluation mode.

    Args:
        name: For errors.
        size: Sizes of a model of Qwen2's kind.
        context_tokens: The longest text that it takes.
        device: Where it shall lie; nothing of it is made elsewhere.
        seed: The same weights for the same seed, device and library.

    Raises:
        UnknownModelError: The sizes are not those of a Qwen2.
    """
    if size.mlp_matrices != 3 or size.biases != "qkv":
        raise UnknownModelError(f"{name} is no Qwen2, and random weights are made for that only; choose a Qwen model")
    torch.manual_seed(seed)
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(_config(size, context_tokens))
    model.to(dtype=torch.bfloat16)
    for layer in [*model.model.layers]:
        for parent, child in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for short in child:
                _pack(getattr(layer, parent), f"{short}_proj", device)
    for part in model.modules():
        for key, tensor in list(part.named_parameters(recurse=False)):
            if tensor.is_meta:
                setattr(part, key, _random(tensor.shape, device, norm="norm" in type(part).__name__.lower()))
    # Its buffers are computed when it is made, and are no parameters.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    if size.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.is_loaded_in_4bit = True  # peft asks for it
    return LoadedTree(model.eval().requires_grad_(False), _vocabulary(name), device, Quantisation.NF4)


def _config(size: Dimensions, context_tokens: int) -> Qwen2Config:
    sizes: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": context_tokens,
        "tie_word_embeddings": size.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen2Config(**sizes)


def _pack(parent: Any, name: str, device: torch.device) -> None:
    """Put a random matrix in four bits, with a bias where there is one, in a layer's place."""
    import bitsandbytes

    packed: Any = bitsandbytes.nn
    old = getattr(parent, name)
    new = packed.Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = _random(old.weight.shape, device).data
    # Moved to where it is already: that is when it is quantised.
    new.weight = packed.Params4bit(weight, compress_statistics=True, quant_type="nf4", module=new).to(device)
    if old.bias is not None:
        new.bias = _random(old.bias.shape, device)
    setattr(parent, name, new)


def _random(shape: torch.Size, device: torch.device, *, norm: bool = False) -> torch.nn.Parameter:
    tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return torch.nn.Parameter(tensor.fill_(1.0) if norm else tensor.normal_(0.0, _SPREAD), requires_grad=False)


def _vocabulary(name: str) -> Vocabulary:
    """Return a vocabulary of single bytes; the model's other rows stand for no text."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={each: index for index, each in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    return Vocabulary(fast(tokenizer_object=backend, eos_token=_END), name)
