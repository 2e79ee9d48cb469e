"""Tiny models with random weights, for transformers and for llama.cpp, and adapters that PEFT made for them.

The GGUF files are written here from transformers' tensors, by the rules of the format and not by the code under test: what
llama.cpp computes from them is first held against transformers without any adapter.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from agent import adapters
from agent.adapters import MODULES, BaseFacts
from tests.fakes import SPECIALS

HEADS, KV_HEADS, WIDTH, LAYERS, CONTEXT = 4, 2, 64, 2, 512
TARGETS = tuple(module.rpartition(".")[2] for module in MODULES)
MERGE = ("a", "b")


def _symbols() -> list[str]:
    # Byte-level BPE writes printable bytes as they are and others as characters from 256 on; texts of tests are ASCII.
    others = [byte for byte in range(128) if not 33 <= byte < 127]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(128)]


WORDS = [*_symbols(), "".join(MERGE), *SPECIALS]
END_ID = WORDS.index("<|endoftext|>")

KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def make_model(kind: str, seed: int = 0, kv_heads: int = KV_HEADS) -> Any:
    """A model of an architecture whose every tensor counts, in float32 and in evaluation mode."""
    config, model = KINDS[kind]
    torch.manual_seed(seed)
    made = model(
        config(
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            head_dim=WIDTH // HEADS,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=END_ID,
        )
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:  # norms and biases; published ones are bfloat16
                parameter.copy_((torch.randn_like(parameter) * 0.1 + 1).bfloat16())
    return made.eval().requires_grad_(False)


def write_gguf(model: Any, kind: str, path: Path) -> Path:
    """Write a model as llama.cpp reads one, in float32, with the tokenizer of these tests."""
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(WORDS)
    types = [gguf.TokenType.CONTROL if word in SPECIALS else gguf.TokenType.NORMAL for word in WORDS]
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_eos_token_id(END_ID)
    writer.add_bos_token_id(END_ID)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map({name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[kind], LAYERS)
    for name, tensor in model.state_dict().items():
        place, _, part = name.rpartition(".")
        values = tensor.float().numpy()
        if kind == "llama" and place.endswith(("q_proj", "k_proj")):
            values = values[turned(values.shape[0], config.head_dim)]
        writer.add_tensor(f"{names.get_name(place)}.{part}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def turned(rows: int, head: int) -> list[int]:
    """Rows in llama.cpp's order: in each head, the two that are turned together stand side by side."""
    return [
        start + half * (head // 2) + pair
        for start in range(0, rows, head)
        for pair in range(head // 2)
        for half in (0, 1)
    ]


def write_folder(model: Any, folder: Path) -> Path:
    """Write a model as transformers reads one, with the same tokenizer."""
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(WORDS) if word not in SPECIALS}
    added = [{"id": WORDS.index(word), "content": word, "special": True} for word in SPECIALS]
    fields = {"added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": [list(MERGE)]}}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


def make_adapter(
    model: Any,
    folder: Path,
    facts: BaseFacts,
    *,
    seed: int,
    rank: int = 4,
    targets: Sequence[str] = TARGETS,
    rslora: bool = False,
) -> Any:
    """Save an adapter of random weights for `model`, which PEFT wraps for good; returns PEFT's model, to be compared with."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), use_rslora=rslora, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's own
        wrapped = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.15)
    wrapped.save_pretrained(folder)
    adapters.write_manifest(folder, facts)
    return wrapped.eval()
