"""Adapters in a transformers model: PEFT's real layers on tiny models, in the precisions that serve."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; make train-deps")

from peft.tuners.lora import LoraLayer  # noqa: E402

from agent import adapters  # noqa: E402
from agent.adapters import BaseFacts  # noqa: E402
from agent.engines.base import Adapter  # noqa: E402
from agent.engines.lora import AdapterSwitch  # noqa: E402
from agent.errors import AdapterError  # noqa: E402
from tests.with_torch import tiny  # noqa: E402

FACTS = BaseFacts("tiny", "tiny", "qwen/line-anchored-1")
PROMPT = tuple(b"def add(ab")  # a token for each byte

Make = Callable[[], Any]


def made(folder: Path, seed: int, make: Make | None = None, **how: Any) -> Adapter:
    tiny.make_adapter(make() if make else tiny.make_model("qwen2"), folder, FACTS, seed=seed, **how)
    return adapters.inspect(folder, FACTS)


def logits(model: Any) -> Any:
    return model(torch.tensor([PROMPT])).logits


def apart(one: Any, other: Any) -> float:
    return float((one.float() - other.float()).abs().max())


def float32() -> Any:
    return tiny.make_model("qwen2")


def bfloat16() -> Any:
    return tiny.make_model("qwen2").bfloat16()


def quantised(folder: Path, **how: Any) -> Any:
    """A tiny model as transformers and bitsandbytes load it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; make train-deps")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.write_folder(tiny.make_model("qwen2"), folder)
    config = BitsAndBytesConfig(**how)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


@pytest.fixture(params=["float32", "bfloat16", "nf4", "int8"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Make the same base again and again, in one of the precisions."""
    nf4 = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    ways: dict[str, Make] = {
        "float32": float32,
        "bfloat16": bfloat16,
        "nf4": lambda: quantised(tmp_path / "base", **nf4),
        "int8": lambda: quantised(tmp_path / "base", load_in_8bit=True),
    }
    return ways[request.param]


def test_every_precision_serves_adapters_and_the_bare_model(make: Make, tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", 1), made(tmp_path / "two", 2, rslora=True)
    model = make()
    with torch.no_grad():
        bare = logits(model)
        wanted = []
        for adapter in (one, two):
            alone = make()
            switch = AdapterSwitch(alone)
            switch.attach([adapter])
            switch.select(adapter.name)
            wanted.append(logits(alone))
        switch = AdapterSwitch(model)
        switch.attach([one, two])
        assert torch.equal(logits(model), bare)
        for _ in range(2):
            for adapter, alone in zip((one, two), wanted, strict=True):
                switch.select(adapter.name)
                assert torch.equal(logits(model), alone)
                assert apart(alone, bare) > 0.1
                switch.select(None)
                assert torch.equal(logits(model), bare)


def test_float32_is_what_peft_itself_computes(tmp_path: Path) -> None:
    wrapped = tiny.make_adapter(float32(), tmp_path / "one", FACTS, seed=1)
    model = float32()
    switch = AdapterSwitch(model)
    adapter = adapters.inspect(tmp_path / "one", FACTS)
    switch.attach([adapter])
    switch.select(adapter.name)
    with torch.no_grad():
        assert torch.equal(logits(model), logits(wrapped))


def test_the_base_is_neither_copied_nor_changed(tmp_path: Path) -> None:
    model = float32()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    switch = AdapterSwitch(model)
    one, two = made(tmp_path / "one", 1), made(tmp_path / "two", 2, targets=["q_proj"])
    for wanted in ([one], [two, one], [two], [one], []):
        switch.attach(wanted)
        assert switch.names == tuple(each.name for each in wanted) or set(switch.names) == {
            each.name for each in wanted
        }
        switch.select(wanted[0].name if wanted else None)
        assert not any(value.requires_grad for value in model.parameters())
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            logits(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]) for name, value in after.items()
    )
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert not hasattr(model, "peft_config")


def test_a_module_that_no_adapter_has_is_the_bases_own_again(tmp_path: Path) -> None:
    model = float32()
    switch = AdapterSwitch(model)
    wide, narrow = made(tmp_path / "wide", 1), made(tmp_path / "narrow", 2, targets=["q_proj"])
    switch.attach([wide, narrow])
    switch.attach([narrow])
    wrapped = {path for path, module in model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == {f"model.layers.{layer}.self_attn.q_proj" for layer in range(tiny.LAYERS)}


def test_what_is_selected_stays_so_while_others_come_and_go(tmp_path: Path) -> None:
    model = float32()
    switch = AdapterSwitch(model)
    one, two = made(tmp_path / "one", 1), made(tmp_path / "two", 2)
    switch.attach([one])
    switch.select(one.name)
    with torch.no_grad():
        wanted = logits(model)
        switch.attach([two, one])
        assert torch.equal(logits(model), wanted)
        switch.attach([one])
        assert torch.equal(logits(model), wanted)
        switch.attach([two])
        assert torch.equal(logits(model), logits(float32()))  # it is gone: the bare model, and no other adapter


def test_an_unknown_name_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = float32()
    switch = AdapterSwitch(model)
    one = made(tmp_path / "one", 1)
    with pytest.raises(AdapterError, match="attached are: none"):
        switch.select(one.name)
    switch.attach([one])
    switch.select(one.name)
    with torch.no_grad():
        wanted = logits(model)
        with pytest.raises(AdapterError, match=one.name):
            switch.select("another")
        assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("first", [True, False])
def test_what_does_not_fit_is_refused_and_leaves_everything_as_it_was(tmp_path: Path, first: bool) -> None:
    model = float32()
    switch = AdapterSwitch(model)
    good, other = made(tmp_path / "good", 1), made(tmp_path / "other", 2)
    bad = made(tmp_path / "bad", 3, lambda: tiny.make_model("qwen2", kv_heads=4))
    attached = [] if first else [good]
    switch.attach(attached)
    switch.select(None if first else good.name)
    with torch.no_grad():
        wanted = logits(model)
        with pytest.raises(AdapterError, match=r"bad is refused: made for 64 to 64 values at .*[kv]_proj"):
            switch.attach([other, bad])
        assert switch.names == tuple(each.name for each in attached)
        assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("broken", [0, 5, 13])
@pytest.mark.parametrize("place", ["torch.tensor", "peft.tuners.lora.layer.LoraLayer.update_layer"])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, broken: int, place: str
) -> None:
    model = float32()
    modules = {name: id(module) for name, module in model.named_modules()}
    switch = AdapterSwitch(model)
    good, other = made(tmp_path / "good", 1), made(tmp_path / "other", 2)
    if not first:
        switch.attach([good])
        switch.select(good.name)
    real = {"tensor": torch.tensor, "update_layer": LoraLayer.update_layer}[place.rpartition(".")[2]]
    calls = 0

    def failing(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > broken:
            raise torch.cuda.OutOfMemoryError("no memory left")
        return real(*arguments, **more)

    with torch.no_grad():
        wanted = logits(model)
        monkeypatch.setattr(place, failing)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            switch.attach([good, other])
        monkeypatch.undo()
        assert torch.equal(logits(model), wanted)
        assert switch.names == (() if first else (good.name,))
        if first:
            assert {name: id(module) for name, module in model.named_modules()} == modules
        switch.attach([good, other])
        switch.select(good.name)
        alone = float32()
        switch = AdapterSwitch(alone)
        switch.attach([good])
        switch.select(good.name)
        assert torch.equal(logits(model), logits(alone))


def test_an_adapter_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    one = made(tmp_path / "one", 1)
    made(tmp_path / "one", 2)
    switch = AdapterSwitch(float32())
    with pytest.raises(AdapterError, match="was changed"):
        switch.attach([one])
    assert switch.names == ()
