"""The sizes of a model that shall be planned for: from the catalogue, a model folder's config.json, or a GGUF file's header.

Reads no weights and needs no library for models: a name of the catalogue is enough, pulled or not. Knows how
configurations name their sizes (transformers' common names and GPT-2's); not what the sizes cost (`memory.py`).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent import catalog, gguf_header
from agent.catalog import Dimensions
from agent.errors import ModelCorruptError, UnknownModelError
from agent.gguf_header import GgufHeader

_FAMILIES = frozenset(
    {"llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "starcoder2", "phi", "phi3"}
    | {
        "cohere",
        "cohere2",
        "smollm3",
        "olmo",
        "olmo2",
        "granite",
        "helium",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "codegen",
    }
)
"""Decoders of equal layers with attention and an MLP, whose sizes config.json has under the names that are read here."""
_OTHER_KINDS = frozenset(
    {"t5", "t5encoder", "bert", "nomic-bert", "jina-bert-v2", "mamba", "mamba2", "rwkv6", "rwkv7", "jamba", "falcon-h1"}
)
"""Of GGUF files: what has an encoder, or states in place of keys and values."""
_UNGATED = frozenset(
    {"starcoder2", "phi", "phi2", "gpt2", "gpt_bigcode", "gpt_neox", "gptneox", "codegen", "starcoder"}
)
"""Families whose MLP has two matrices, by their names in config.json and in GGUF files."""
_TIED = frozenset(
    {"starcoder2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "cohere", "cohere2", "smollm3"}
)
"""Families that share the embedding with the head unless their config.json says otherwise (transformers' defaults)."""
_QKV_BIASED = frozenset({"qwen2"})
"""Families with biases at queries, keys and values that no key of config.json tells of."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LARGEST = 1 << 24  # of any size: a damaged header must not make a plan of it


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is known of a model without its weights."""

    name: str
    format: str
    """"gguf" or "safetensors"."""
    dimensions: Dimensions
    context_tokens: int
    """The most that it was made for; 0 where nothing says."""
    file_bytes: int = 0
    """Size of its GGUF file; 0 where that is not known, and for folders."""


def of(name: str) -> Architecture:
    """Return the sizes of a catalogue's model, or of a GGUF file or a model folder.

    Raises:
        UnknownModelError: Neither a name of the catalogue nor such a file or folder, or a kind that is not understood.
        ModelCorruptError: What the file says of itself cannot be read.
    """
    known = catalog.entries().get(name)
    if known is None:
        return _of_path(catalog.locate(name), name)
    found = Architecture(name, known.format, known.dimensions, known.context_tokens, known.bytes)
    path = catalog.directory(name) / known.file
    if known.format != "gguf" or not catalog.is_pulled(name) or not path.is_file():
        return found
    # Some files hold a head of their own although the model's is the embedding.
    size = replace(known.dimensions, tied="output.weight" not in gguf_header.read(path).tensors)
    return replace(found, dimensions=size, file_bytes=path.stat().st_size)


def _of_path(path: Path, name: str) -> Architecture:
    if path.is_dir():
        return of_config(name, read_config(path))
    return of_header(name, gguf_header.read(path), path.stat().st_size)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's configuration.

    Raises:
        UnknownModelError: The folder has none.
        ModelCorruptError: It is no JSON object.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownModelError(f"cannot read {file}: {error.strerror}; give a model folder or a GGUF file") from None
    except (ValueError, RecursionError):
        raise ModelCorruptError(f"{file} is no JSON; pull or copy the model again") from None
    if not isinstance(raw, dict):
        raise ModelCorruptError(f"{file} is no JSON object; pull or copy the model again")
    inner = raw.get("text_config")  # models that also see keep their language part there
    return {**raw, **inner} if isinstance(inner, dict) else raw


def of_config(name: str, config: dict[str, Any]) -> Architecture:
    """Return the sizes that a configuration of transformers' names.

    Raises:
        UnknownModelError: It is of a kind that the planner does not understand.
    """
    if any(config.get(key) for key in _EXPERTS):
        raise UnknownModelError(
            f"{name} is a mixture of experts, which the planner does not know; choose a dense model"
        )
    if packed := config.get("quantization_config"):
        kind = packed.get("quant_method", "some way") if isinstance(packed, dict) else "some way"
        raise UnknownModelError(
            f"{name} has its weights packed already ({kind!r:.40}), and the planner knows whole ones; choose the model "
            "that it was made from"
        )
    family = str(config.get("model_type", ""))
    if family not in _FAMILIES:
        raise UnknownModelError(
            f"{name} is of the family {family!r:.40}, which the planner does not know; it knows {', '.join(sorted(_FAMILIES))}"
        )
    tied = config.get("tie_word_embeddings")
    read = _Sizes(name, config)
    hidden = read.size("hidden_size", "n_embd")
    heads = read.size("num_attention_heads", "n_head")
    size = Dimensions(
        layers=read.size("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=1 if config.get("multi_query") is True else read.size("num_key_value_heads", default=heads),
        head_dim=read.size("head_dim", default=hidden // heads),
        mlp=read.size("intermediate_size", "n_inner", default=4 * hidden),
        vocabulary=read.size("vocab_size"),
        tied=family in _TIED if tied is None else bool(tied),
        mlp_matrices=2 if family in _UNGATED else 3,
        biases=_biases(config, family),
    )
    context = read.size("max_position_embeddings", "n_positions", default=0, least=0)
    return Architecture(name, "safetensors", _checked(name, size), context)


def _biases(config: dict[str, Any], family: str) -> Any:
    if config.get("mlp_bias") or config.get("use_bias") or family in _UNGATED:
        return "all"
    return "qkv" if config.get("attention_bias") or family in _QKV_BIASED else "none"


def of_header(name: str, header: GgufHeader, file_bytes: int) -> Architecture:
    """Return the sizes that a GGUF header names.

    Raises:
        UnknownModelError: It is of a kind that the planner does not understand.
    """
    kind = header.architecture
    if kind in _OTHER_KINDS:
        raise UnknownModelError(f"{name} is of the family {kind!r}, which the planner does not know; choose a decoder")
    if header.metadata.get(f"{kind}.expert_count"):
        raise UnknownModelError(
            f"{name} is a mixture of experts, which the planner does not know; choose a dense model"
        )
    read = _Sizes(name, header.metadata)
    hidden, heads = read.size(f"{kind}.embedding_length"), read.size(f"{kind}.attention.head_count")
    biased = [part for part in ("attn_q", "attn_qkv", "attn_output") if f"blk.0.{part}.bias" in header.tensors]
    # Some families (Phi-3) have gate and up in one matrix of twice the width, so that no tensor's name tells of a gate.
    gated = "blk.0.ffn_gate.weight" in header.tensors or kind not in _UNGATED
    size = Dimensions(
        layers=read.size(f"{kind}.block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=read.size(f"{kind}.attention.head_count_kv", default=heads),
        head_dim=read.size(f"{kind}.attention.key_length", default=hidden // heads),
        mlp=read.size(f"{kind}.feed_forward_length"),
        vocabulary=read.size("tokenizer.ggml.tokens", f"{kind}.vocab_size"),
        tied="output.weight" not in header.tensors,
        mlp_matrices=3 if gated else 2,
        biases="all" if "attn_output" in biased else "qkv" if biased else "none",
    )
    return Architecture(name, "gguf", _checked(name, size), header.context_tokens, file_bytes)


class _Sizes:
    """Reads sizes under their names."""

    def __init__(self, name: str, facts: dict[str, Any]) -> None:
        self._name, self._facts = name, facts

    def size(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        value = next((self._facts[key] for key in keys if self._facts.get(key) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
            what = "is missing" if value is None else f"is {value!r:.40}"
            raise UnknownModelError(
                f"{self._name}: {keys[0]} {what}, a whole number is needed; the planner knows decoders with equal layers"
            )
        return value


def _checked(name: str, size: Dimensions) -> Dimensions:
    if size.heads % size.kv_heads:
        raise UnknownModelError(
            f"{name} has {size.heads} heads and {size.kv_heads} for keys and values, which does not go up; "
            "the planner knows decoders with equal layers"
        )
    return size
