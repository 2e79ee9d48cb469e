import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import adapters
from agent.errors import AdapterError
from tests.adapter_folders import FACTS, INPUTS, MODULE, OUTPUTS, RANK, key, tensors, write_adapter

np = pytest.importorskip("numpy", reason="numpy is not installed; make train-deps")
pytest.importorskip("safetensors", reason="safetensors is not installed; make train-deps")


def refusal(folder: Path) -> str:
    """What is said of a folder that is refused: one line that names it."""
    with pytest.raises(AdapterError) as caught:
        adapters.inspect(folder, FACTS)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_a_whole_adapter_is_taken_and_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "nightly run.7")
    adapter = adapters.inspect(folder, FACTS)
    assert adapter.name.startswith("nightly-run-7-")
    assert adapter.folder == folder
    lora = adapters.load(adapter)
    assert (lora.rank, lora.alpha, lora.scaling) == (RANK, 8.0, 4.0)
    halves = lora.modules[MODULE]
    assert (halves.down == tensors()[key(MODULE, "A")]).all()
    assert (halves.up == tensors()[key(MODULE, "B")]).all()


def test_the_name_tells_weights_and_scaling_apart(tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [{}, {"seed": 2}, {"config": {"lora_alpha": 9}}, {"config": {"use_rslora": True}}]
    names = {
        adapters.inspect(write_adapter(tmp_path / f"{n}" / "same", **way), FACTS).name for n, way in enumerate(ways)
    }
    assert len(names) == len(ways)
    again = adapters.inspect(write_adapter(tmp_path / "again" / "same"), FACTS).name
    assert again in names


def test_the_root_of_the_rank_scales_where_that_was_trained(tmp_path: Path) -> None:
    adapter = adapters.inspect(write_adapter(tmp_path / "a", config={"use_rslora": True}), FACTS)
    assert adapters.load(adapter).scaling == pytest.approx(8 / RANK**0.5)


@pytest.mark.parametrize("kind", ["f2", "bf16"])
def test_shorter_numbers_are_widened_without_loss(tmp_path: Path, kind: str) -> None:
    folder = write_adapter(tmp_path / "a")
    plain = {name: np.round(value * 8) / 8 for name, value in tensors().items()}  # exact in both
    if kind == "f2":
        write_adapter(folder, weights={name: value.astype("f2") for name, value in plain.items()})
    else:
        halves = {name: (value.view("<u4") >> 16).astype("<u2") for name, value in plain.items()}
        write_bfloat16(folder / "adapter_model.safetensors", halves)
    lora = adapters.load(adapters.inspect(folder, FACTS))
    assert (lora.modules[MODULE].up == plain[key(MODULE, "B")]).all()
    assert lora.modules[MODULE].up.dtype == np.float32


def write_bfloat16(path: Path, weights: dict[str, Any]) -> None:
    """Write by hand what numpy's side of safetensors cannot."""
    header, body = {}, b""
    for name, value in weights.items():
        raw = value.tobytes()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("field", ["base", "tokenizer", "prompt_format"])
def test_a_foreign_adapter_is_refused_before_its_weights_are_read(tmp_path: Path, field: str) -> None:
    folder = write_adapter(tmp_path / "a", facts=replace(FACTS, **{field: "another"}))
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "'another'" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"base": "base-1"}', "[" * 100_000])
def test_a_record_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "tabwise.json").write_text(content)
    assert "tabwise.json" in refusal(folder)


@pytest.mark.parametrize("name", ["tabwise.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / name).unlink()
    assert name in refusal(folder)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "it has no adapter_model.safetensors" in refusal(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r is 0"),
        ({"r": 100_000}, "r is 100000"),
        ({"r": True}, "r is True"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"something_new": {"of": "a later version"}}, "something_new"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    assert says in refusal(write_adapter(tmp_path / "a", config=change))


def test_settings_without_effect_are_passed_over(tmp_path: Path) -> None:
    more = {
        "base_model_name_or_path": "/elsewhere",
        "revision": "main",
        "a_later_one": None,
        "layers_to_transform": [0],
    }
    assert adapters.inspect(write_adapter(tmp_path / "a", config=more), FACTS)


def test_every_cut_of_the_weights_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(folder)


def test_damage_to_the_header_is_refused_or_changes_nothing_but_names(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    before = adapters.inspect(folder, FACTS).name
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with suppress(AdapterError):
            assert adapters.inspect(folder, FACTS).name != before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("half", ["A", "B"])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, half: str, value: float) -> None:
    weights = tensors()
    weights[key(MODULE, half)][1, 1] = value
    assert f"lora_{half} of {MODULE}" in refusal(write_adapter(tmp_path / "a", weights=weights))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({key(MODULE, "A"): None}, "no lora_A"),
        ({key(MODULE, "B"): None}, "no lora_B"),
        ({key(MODULE, "A"): (RANK + 1, INPUTS)}, "shapes"),
        ({key(MODULE, "B"): (OUTPUTS, RANK + 1)}, "shapes"),
        ({key(MODULE, "B"): (OUTPUTS * RANK,)}, "shape"),
        ({key(MODULE, "A"): None, key(MODULE, "B"): None}, "no tensors"),
        ({"base_model.model.lm_head.lora_A.weight": (RANK, INPUTS)}, "lm_head"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": (OUTPUTS, 1)}, "magnitude"),
        ({key("model.layers.0.mlp.up_proj", "A"): (RANK, INPUTS)}, "has no lora_B"),
    ],
)
def test_tensors_that_do_not_make_an_adapter_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    weights = tensors() | {name: np.ones(shape, "f4") if shape else None for name, shape in change.items()}
    whole = {name: value for name, value in weights.items() if value is not None}
    assert says in refusal(write_adapter(tmp_path / "a", weights=whole))


def test_tensors_and_targets_must_be_the_same_modules(tmp_path: Path) -> None:
    assert "none of target_modules" in refusal(write_adapter(tmp_path / "a", config={"target_modules": ["v_proj"]}))
    both = write_adapter(tmp_path / "b", config={"target_modules": ["q_proj", "v_proj"]})
    assert "'v_proj' has no tensors" in refusal(both)
    assert adapters.inspect(write_adapter(tmp_path / "c", config={"target_modules": [MODULE]}), FACTS)


def test_integers_are_refused(tmp_path: Path) -> None:
    weights = {name: np.ones(value.shape, "i4") for name, value in tensors().items()}
    assert "I32" in refusal(write_adapter(tmp_path / "a", weights=weights))


def test_too_large_a_file_is_not_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate((1 << 30) + 1)  # sparse: takes no room
    assert "at most" in refusal(folder)


def test_an_adapter_that_changed_after_it_was_inspected_is_not_served(tmp_path: Path) -> None:
    adapter = adapters.inspect(write_adapter(tmp_path / "a"), FACTS)
    write_adapter(tmp_path / "a", seed=2)
    with pytest.raises(AdapterError, match="was changed"):
        adapters.load(adapter)
