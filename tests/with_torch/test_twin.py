"""One tree serves, another is trained, and both read the same weights."""

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")

import torch
from peft import LoraConfig, get_peft_model

from agent.engines import loading
from agent.engines.twin import twin_of
from agent.errors import EngineError
from tests.with_torch.small_models import save, small_module

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's

IDS = [[5, 6, 7, 8, 9, 10, 11, 12]]


def storages(module: Any) -> dict[str, int]:
    """Where each tensor of a tree lies, those included that are no parameters."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found = {name: tensor.untyped_storage().data_ptr() for name, tensor in named.items()}
    for name, layer in module.named_modules():
        for part in ("CB", "SCB"):
            tensor = getattr(getattr(layer, "state", None), part, None)
            if tensor is not None:
                found[f"{name}.{part}"] = tensor.untyped_storage().data_ptr()
        constants = getattr(getattr(layer, "weight", None), "quant_state", None)
        if constants is not None:
            found[f"{name}.constants"] = id(constants)
    return found


def logits(module: Any) -> Any:
    with torch.no_grad():
        return module(torch.tensor(IDS)).logits.clone()


@pytest.mark.parametrize("quantisation", ["fp32", "bf16", "nf4", "int8"])
def test_serving_is_bit_for_bit_the_same_while_the_twin_is_trained(quantisation: str, tmp_path: Path) -> None:
    tree = loading.load(save(tmp_path), quantisation)
    serving: Any = tree.module
    twin = twin_of(serving)
    assert storages(twin) == storages(serving)
    before = logits(serving)
    assert torch.equal(logits(twin), before)

    trained: Any = get_peft_model(twin, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trained.train()
    optimizer = torch.optim.AdamW([each for each in trained.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        answer = trained(torch.tensor(IDS), labels=torch.tensor(IDS))
        assert torch.equal(logits(serving), before)  # between forward and backward
        answer.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(answer.loss.item())
        assert torch.equal(logits(serving), before)
    assert losses[1] < losses[0]
    trained.eval()
    assert not torch.equal(logits(trained), before)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), before)
    assert not any("lora" in name for name, _ in serving.named_modules())
    assert all(parameter.grad is None for parameter in serving.parameters())


def test_flags_and_casts_of_one_are_not_the_others() -> None:
    serving = small_module()
    twin = twin_of(serving)
    twin.requires_grad_(False)
    twin.to(torch.float64)
    assert all(parameter.requires_grad and parameter.dtype is torch.float32 for parameter in serving.parameters())


def test_weights_that_are_tied_stay_tied() -> None:
    twin = twin_of(small_module(tie_word_embeddings=True))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_twin_of_a_twin_is_one_too() -> None:
    serving = small_module()
    assert storages(twin_of(twin_of(serving))) == storages(serving)


def test_what_was_wrapped_is_refused() -> None:
    wrapped = get_peft_model(copy.deepcopy(small_module()), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(EngineError, match="make its twin first"):
        twin_of(wrapped)


def test_four_bits_are_never_repacked(tmp_path: Path) -> None:
    serving: Any = loading.load(save(tmp_path), "nf4").module
    layers = [layer for layer in serving.modules() if type(layer).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on a processor that has it
    twin = twin_of(serving)
    twins = [layer for layer in twin.modules() if type(layer).__name__ == "Linear4bit"]
    assert not any(layer.support_avx512bf16_for_cpu for layer in (*layers, *twins))
    layers[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(EngineError, match="repacked"):
        twin_of(serving)
