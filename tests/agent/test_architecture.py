import json
import struct
from pathlib import Path
from typing import Any

import pytest

from agent import architecture, catalog
from agent.errors import ModelCorruptError, UnknownModelError
from agent.gguf_header import GgufHeader, TensorPlace
from tests.conftest import World
from tests.gguf_files import gguf_bytes, string

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
STARCODER2: dict[str, Any] = {
    "model_type": "starcoder2",
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "use_bias": True,
    "max_position_embeddings": 16384,
}
BIGCODE: dict[str, Any] = {
    "model_type": "gpt_bigcode",
    "n_embd": 2048,
    "n_head": 16,
    "n_layer": 24,
    "n_inner": 8192,
    "vocab_size": 49280,
    "n_positions": 8192,
    "multi_query": True,
}


def test_a_configuration_gives_the_catalogues_sizes() -> None:
    found = architecture.of_config("mine", QWEN)
    assert found.dimensions == catalog.entry("qwen2.5-coder-7b").dimensions
    assert (found.format, found.context_tokens) == ("safetensors", 32768)
    assert architecture.of_config("mine", STARCODER2).dimensions == catalog.entry("starcoder2-3b").dimensions


def test_names_of_older_configurations() -> None:
    size = architecture.of_config("santacoder", BIGCODE).dimensions
    assert (size.layers, size.hidden, size.heads, size.kv_heads, size.head_dim) == (24, 2048, 16, 1, 128)
    assert (size.mlp, size.mlp_matrices, size.tied, size.biases) == (8192, 2, True, "all")


def test_what_is_left_out_has_a_usual_value() -> None:
    left_out = ("num_key_value_heads", "tie_word_embeddings", "max_position_embeddings")
    config = {key: value for key, value in QWEN.items() if key not in left_out} | {"model_type": "llama"}
    found = architecture.of_config("mine", config)
    assert found.dimensions.kv_heads == 28
    assert not found.dimensions.tied
    assert found.dimensions.biases == "none"
    assert found.context_tokens == 0


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("gemma", True)])
def test_a_shared_embedding_that_is_null_is_the_familys(family: str, tied: bool) -> None:
    config = QWEN | {"model_type": family, "quantization_config": None}
    assert architecture.of_config("mine", config | {"tie_word_embeddings": None}).dimensions.tied is tied
    assert architecture.of_config("mine", config | {"tie_word_embeddings": not tied}).dimensions.tied is not tied


def test_the_heads_width_may_be_given() -> None:
    assert architecture.of_config("mine", QWEN | {"head_dim": 256}).dimensions.head_dim == 256


def test_a_model_that_sees_has_a_language_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", "text_config": QWEN}))
    assert architecture.of(str(tmp_path)).dimensions == catalog.entry("qwen2.5-coder-7b").dimensions


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"intermediate_size": [1, 2]}, r"intermediate_size is \[1, 2\]"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
        ({"num_key_value_heads": 5}, "28 heads and 5 for keys and values"),
        ({"num_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"packed already \('awq'\)"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"packed already \('gptq'\)"),
        ({"quantization_config": [4]}, "packed already"),
        ({"model_type": "mamba"}, "family 'mamba', which the planner does not know; it knows codegen, cohere"),
        ({"model_type": "t5"}, "family 't5'"),
        ({"model_type": None}, "family 'None'"),
        ({"model_type": "m" * 1000}, "family 'mmmm"),
    ],
)
def test_what_is_not_understood_is_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UnknownModelError, match=told) as caught:
        architecture.of_config("mine", QWEN | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "[" * 100_000])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelCorruptError, match=r"config\.json"):
        architecture.of(str(tmp_path))


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"cannot read .*config\.json: No such file"):
        architecture.of(str(tmp_path))


def test_an_unknown_name(world: World) -> None:
    with pytest.raises(UnknownModelError, match="unknown model 'nonesuch'"):
        architecture.of("nonesuch")


def header(**changes: Any) -> GgufHeader:
    metadata: dict[str, Any] = {
        "qwen2.block_count": 24,
        "qwen2.embedding_length": 896,
        "qwen2.feed_forward_length": 4864,
        "qwen2.attention.head_count": 14,
        "qwen2.attention.head_count_kv": 2,
        "tokenizer.ggml.tokens": 151936,
    }
    names = ("token_embd.weight", "blk.0.ffn_gate.weight", "blk.0.attn_q.bias")
    tensors = {name: TensorPlace((1,), 0, 0) for name in names}
    return GgufHeader("qwen2", 32768, frozenset(), metadata | changes, (), tensors)


def test_a_header_gives_the_catalogues_sizes() -> None:
    found = architecture.of_header("mine", header(), 400_000_000)
    assert found.dimensions == catalog.entry("starter").dimensions
    assert (found.format, found.context_tokens, found.file_bytes) == ("gguf", 32768, 400_000_000)


def test_a_header_with_a_head_of_its_own() -> None:
    own = header()
    tensors = {
        **own.tensors,
        "output.weight": TensorPlace((1,), 0, 0),
        "blk.0.attn_output.bias": TensorPlace((1,), 0, 0),
    }
    size = architecture.of_header("mine", GgufHeader("qwen2", 0, frozenset(), own.metadata, (), tensors), 1).dimensions
    assert not size.tied
    assert size.biases == "all"


def test_an_mlp_without_a_gate() -> None:
    metadata = {key.replace("qwen2", "starcoder2"): value for key, value in header().metadata.items()}
    found = architecture.of_header("mine", GgufHeader("starcoder2", 0, frozenset(), metadata), 1)
    assert found.dimensions.mlp_matrices == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"qwen2.block_count": None}, "block_count is missing"),
        (
            {"qwen2.attention.head_count_kv": 24},
            "14 heads and 24 for keys and values",
        ),  # an array's length, for layers that differ
        ({"qwen2.expert_count": 60}, "mixture of experts"),
    ],
)
def test_headers_that_are_not_understood(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UnknownModelError, match=told):
        architecture.of_header("mine", header(**change), 1)


def test_a_header_of_another_kind() -> None:
    metadata = {key.replace("qwen2", "t5"): value for key, value in header().metadata.items()}
    with pytest.raises(UnknownModelError, match="family 't5'"):
        architecture.of_header("mine", GgufHeader("t5", 0, frozenset(), metadata), 1)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(gguf_bytes())
    with pytest.raises(UnknownModelError, match=r"qwen2\.embedding_length is missing"):
        architecture.of(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("x"))
    with pytest.raises(ModelCorruptError, match=r"own\.gguf"):
        architecture.of(str(path))
