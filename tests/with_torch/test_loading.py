"""From files to a module: whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from agent import base_facts, catalog
from agent.catalog import LocalModel
from agent.engines import dequantised, loading, quantisation
from agent.engines.quantisation import Device, Quantisation
from agent.errors import MemoryFullError, ModelCorruptError, UnknownModelError
from tests.conftest import World
from tests.with_torch.small_models import CODE, SENTINELS, SPECIAL, WORDS, save, small_module, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("small")).path


def copied(folder: Path, to: Path) -> LocalModel:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return LocalModel("copy", to, "safetensors", None, 0, "")


def test_auto_is_float32_on_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tree = loading.load(LocalModel("small", folder, "safetensors", None, 0, ""), "auto")
    assert (tree.quantisation, str(tree.device)) == (Quantisation.FP32, "cpu")
    assert {parameter.dtype for parameter in tree.module.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in tree.module.parameters())
    assert not tree.module.training


def test_needs_can_be_told_by_somebody_else(folder: Path) -> None:
    with pytest.raises(MemoryFullError, match=r"needs 1048576\.0 GiB"):
        loading.load(LocalModel("small", folder, "safetensors", None, 0, ""), "auto", lambda _: 1 << 50)


@pytest.mark.parametrize("wanted", ["nf4", "int8"])
def test_linear_layers_are_packed_and_nothing_else(wanted: str, folder: Path) -> None:
    module: Any = loading.load(LocalModel("small", folder, "safetensors", None, 0, ""), wanted).module
    layer = module.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[wanted]
    assert layer.weight.nbytes == layer.in_features * layer.out_features // {"nf4": 2, "int8": 1}[wanted]
    assert type(module.lm_head).__name__ == "Linear"
    if wanted == "nf4":
        assert layer.weight.quant_state.nested
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.compute_dtype is torch.bfloat16


def test_a_weight_that_is_missing_is_not_made_up(folder: Path, tmp_path: Path) -> None:
    model = copied(folder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelCorruptError, match=r"lacks 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load(model, "fp32")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}"),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "nonesuch"}'),
        ("tokenizer.json", b"{}"),
    ],
)
def test_damaged_files_are_one_line(name: str, content: bytes | None, folder: Path, tmp_path: Path) -> None:
    model = copied(folder, tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    for wanted in ("fp32", "auto"):
        with pytest.raises(ModelCorruptError) as failure:
            loading.load(model, wanted)
        assert "\n" not in str(failure.value)


def test_weights_that_are_programs_are_not_read(folder: Path, tmp_path: Path) -> None:
    model = copied(folder, tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelCorruptError):
        loading.load(model, "fp32")


def test_a_device_that_is_full_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "_read", full)
    with pytest.raises(MemoryFullError, match="no memory left for the model small"):
        loading.load(LocalModel("small", folder, "safetensors", None, 0, ""), "fp32")


# --- GGUF ---

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_gguf(path: Path, module: Any, kind: gguf.GGMLQuantizationType, *, without: str = "") -> None:
    """Write a Qwen2 model and its tokenizer as llama.cpp's converter does."""
    settings, weights = module.config, module.state_dict()
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    facts = json.loads(tokenizer().backend_tokenizer.to_str())
    added = {each["id"]: each["content"] for each in facts["added_tokens"]}
    words = {number: word for word, number in facts["model"]["vocab"].items()} | added
    ordered = [words.get(number, f"[PAD{number}]") for number in range(settings.vocab_size)]
    control = {*SPECIAL, *SENTINELS}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(ordered)
    writer.add_token_types(
        [3 if word in control else 1 if number < WORDS else 5 for number, word in enumerate(ordered)]
    )
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in facts["model"]["merges"]])
    writer.add_eos_token_id(ordered.index("<|im_end|>"))
    tensors = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    for layer in range(settings.num_hidden_layers):
        tensors |= {f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}" for theirs, ours in _NAMES.items()}
    for theirs, ours in tensors.items():
        for part in ("weight", "bias"):
            if f"{ours}.{part}" not in weights or f"{theirs}.{part}" == without:
                continue
            values = weights[f"{ours}.{part}"].float().numpy()
            used = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(f"{theirs}.{part}", gguf.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packed(world: World) -> tuple[LocalModel, Any]:
    module = small_module()
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:  # down to what float16 cannot hold
            parameter.data = torch.randn_like(parameter) * (1e-6 if name.endswith("bias") else 1.0)
    file = world.root / "small.gguf"
    write_gguf(file, module, gguf.GGMLQuantizationType.Q8_0)
    return catalog.find(str(file)), module


def test_a_gguf_file_is_unpacked_once(packed: tuple[LocalModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, module = packed
    tree = loading.load(model, "fp32")
    unpacked: Any = tree.module
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"):
        original = module.state_dict()[name].numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        expected = gguf.dequantize(gguf.quantize(original, kind), kind).astype(np.float16).astype(np.float32)
        assert np.array_equal(unpacked.state_dict()[name].numpy(), expected)
    for name, vector in module.state_dict().items():
        if vector.dim() == 1:
            assert torch.equal(unpacked.state_dict()[name], vector), name
    kept = catalog.dequantised_dir(model.sha256)
    facts = [base_facts.of(each, None) for each in (model, LocalModel("kept", kept, "safetensors", None, 0, ""))]
    assert facts[0] == facts[1]  # an adapter for one fits the other
    assert model.sha256 in kept.name
    assert kept.stat().st_mode & 0o777 == 0o700
    assert [each.name for each in kept.parent.iterdir()] == [kept.name]

    monkeypatch.setattr(dequantised, "_unpack", lambda *arguments: pytest.fail("unpacked again"))
    again: Any = loading.load(model, "fp32").module
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), unpacked.parameters(), strict=True))


def test_the_tokens_are_those_of_the_file(packed: tuple[LocalModel, Any]) -> None:
    vocabulary = loading.load(packed[0], "fp32").vocabulary
    text = CODE + "# 日本語 <|fim_prefix|>\n"
    tokens = vocabulary.tokenize(text)
    assert b"".join(vocabulary.bytes_of(token.id) for token in tokens) == text.encode()
    specials = {vocabulary.tokenize(word, special=True)[0].id for word in (*SPECIAL, *SENTINELS)}
    assert len(specials) == len((*SPECIAL, *SENTINELS))
    assert not specials & {token.id for token in tokens}


def test_removing_the_model_removes_what_was_unpacked(packed: tuple[LocalModel, Any]) -> None:
    model, _ = packed
    folder = dequantised.folder_of(model)
    catalog.remove(str(model.path))
    assert not folder.exists()
    assert model.path.exists()  # the user's own


def test_unpacking_that_fails_leaves_nothing(world: World) -> None:
    file = world.root / "cut.gguf"
    write_gguf(file, small_module(), gguf.GGMLQuantizationType.F16, without="blk.1.ffn_up.weight")
    with pytest.raises(ModelCorruptError, match=r"lacks 1 tensors \(model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load(catalog.find(str(file)), "fp32")
    assert list((world.root / "data" / "dequantised").iterdir()) == []


def test_wider_weights_stay_as_wide(world: World) -> None:
    module = small_module()
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16):
        file = world.root / f"{kind.name}.gguf"
        write_gguf(file, module, kind)
        loaded: Any = loading.load(catalog.find(str(file)), "fp32").module
        expected = module.lm_head.weight.detach()
        if kind is gguf.GGMLQuantizationType.BF16:
            expected = expected.bfloat16().float()
        assert torch.equal(loaded.lm_head.weight, expected)


def test_headers_tell_what_the_loader_holds(folder: Path) -> None:
    needs = quantisation.needs_of(folder, "cpu")
    module: Any = loading.load(LocalModel("small", folder, "safetensors", None, 0, ""), "fp32").module
    held = sum(parameter.nbytes for parameter in module.parameters())
    assert needs(Quantisation.FP32) - held == 1 << 29
    assert quantisation.choose("auto", Device("cpu", held + (1 << 29)), needs) is Quantisation.FP32


def test_a_kind_of_model_that_cannot_be_cropped_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from agent.config import EngineSettings
    from agent.engines.transformers import _load

    MambaForCausalLM(MambaConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4)).save_pretrained(
        tmp_path
    )
    tokenizer().save_pretrained(tmp_path)
    model = LocalModel("mamba", tmp_path, "safetensors", None, 0, "")
    with pytest.raises(UnknownModelError, match="cannot be taken back"):
        _load(model, EngineSettings(), None, drafts=True)


def test_nothing_connects_anywhere(folder: Path) -> None:
    program = f"""
import socket
class Refused(socket.socket):
    def connect(self, address):
        raise SystemExit(f"connects to {{address}}")
socket.socket = Refused
from pathlib import Path
from agent.catalog import LocalModel
from agent.config import EngineSettings
from agent.engines.transformers import _load
_load(LocalModel("small", Path({str(folder)!r}), "safetensors", None, 0, ""), EngineSettings(), None, drafts=True)
import huggingface_hub.constants as hub
assert hub.HF_HUB_OFFLINE and hub.HF_HUB_DISABLE_TELEMETRY
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
