import json
from dataclasses import replace
from pathlib import Path

import pytest

from agent import architecture, catalog, machine, planning, units
from agent.errors import InputError
from agent.machine import Gpu
from agent.memory import GIB, Device, Quantisation
from agent.planning import Asked, Budget, Refusal
from tests.agent.test_architecture import QWEN
from tests.conftest import World

CARD = Budget(12 * GIB, Device.CUDA, "as given")
RAM = Budget(24 * GIB, Device.CPU, "this machine's RAM")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("12GiB", 12 << 30),
        ("12 gib", 12 << 30),
        (" 11.5GiB ", 23 << 29),
        ("16000MB", 16 * 10**9),
        ("16GB", 16 * 10**9),
        ("512MiB", 512 << 20),
        ("1TiB", 1 << 40),
    ],
)
def test_amounts_of_memory(text: str, n_bytes: int) -> None:
    assert units.parse_memory(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12",
        "GiB",
        "-12GiB",
        "0GiB",
        "nanGiB",
        "1e3GiB",
        "12Gib/s",
        "12 G",
        "12QiB",
        "1kib",
        "999999999TiB",
        "١٢GiB x",
    ],
)
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InputError, match=r"--memory is") as caught:
        units.parse_memory(text)
    assert "\n" not in str(caught.value)


def test_the_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu", lambda: None)
    monkeypatch.setattr(machine, "ram_bytes", lambda: 16 * GIB)
    assert planning.budget(Asked()) == Budget(16 * GIB, Device.CPU, "this machine's RAM")
    with pytest.raises(InputError, match="no NVIDIA GPU is here"):
        planning.budget(Asked(device="cuda"))
    monkeypatch.setattr(machine, "gpu", lambda: Gpu("A card", "580.1", 12 * GIB, 11 * GIB))
    assert planning.budget(Asked()) == Budget(12 * GIB, Device.CUDA, "A card, 11.0 GiB of it free now")
    assert planning.budget(Asked(device="cpu")).device is Device.CPU
    assert planning.budget(Asked(memory="8GiB")) == Budget(8 * GIB, Device.CUDA, "as given")
    assert planning.budget(Asked(memory="8GiB", device="cpu")).device is Device.CPU


def test_what_the_driver_says() -> None:
    card = machine.parse("NVIDIA GeForce RTX 4070 Ti, 580.95.05, 12282, 11000\nAnother, 1, 1, 1\n")
    assert card == Gpu("NVIDIA GeForce RTX 4070 Ti", "580.95.05", 12282 << 20, 11000 << 20)
    for answer in ("", "No devices were found", "A card, 580.1, [N/A], [N/A]", "a, b"):
        assert machine.parse(answer) is None


def test_the_best_quantisation_that_fits_is_taken(world: World) -> None:
    asked = Asked(train=True)
    for name, held, kind in (
        ("qwen2.5-coder-7b", CARD, Quantisation.NF4),
        ("qwen2.5-coder-1.5b", CARD, Quantisation.BF16),
        ("qwen2.5-coder-1.5b", RAM, Quantisation.FP32),
        ("qwen2.5-coder-7b", RAM, Quantisation.BF16),
        ("qwen2.5-coder-7b-gguf", CARD, Quantisation.NF4),
    ):
        assert planning.plan_for(name, asked, held).plan.workload.quantisation is kind, name


def test_a_gguf_file_is_served_as_it_is(world: World) -> None:
    found = planning.plan_for("starter", Asked(), RAM)
    assert found.plan.workload.quantisation is Quantisation.GGUF
    assert found.plan.workload.caches == 7  # one for each slot
    assert found.plan.base_bytes == 491_400_064
    assert planning.plan_for("starter", Asked(quantisation="fp32"), RAM).plan.base_bytes > 4 * 490_000_000


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("qwen2.5-coder-7b", Asked(context_tokens=40_000), "--context is 40000, but qwen2.5-coder-7b has 32768"),
        ("qwen2.5-coder-7b", Asked(context_tokens=0), "--context is 0, it must be from 1 to 16777216"),
        ("qwen2.5-coder-7b", Asked(context_tokens=-1), "--context is -1, it must be from 1 to 16777216"),
        ("qwen2.5-coder-7b", Asked(rank=-1), "--rank is -1, it must be from 0 to 256"),
        ("starter", Asked(rank=10**30), "--rank is 10{30}, it must be from 0 to 256"),
        ("qwen2.5-coder-7b", Asked(train=True, rank=0), "--rank is 0"),
        ("qwen2.5-coder-7b", Asked(train=True, rank=1000), "--rank is 1000"),
        ("qwen2.5-coder-7b", Asked(train=True, pairs=-1), "--pairs is -1"),
        ("phi-2", Asked(train=True, row_tokens=4096), "--row-tokens is 4096, but phi-2 has 2048"),
        ("qwen2.5-coder-7b", Asked(quantisation="q4"), "--quantisation is 'q4'; give one of auto, nf4"),
        ("qwen2.5-coder-7b", Asked(quantisation="gguf"), "qwen2.5-coder-7b is no GGUF file"),
        ("starter", Asked(quantisation="gguf", train=True), "training takes nf4"),
        ("qwen2.5-coder-7b", Asked(train=True, optimizer="sgd"), "--optimizer is 'sgd'"),
    ],
)
def test_what_cannot_be_is_named(world: World, name: str, asked: Asked, told: str) -> None:
    with pytest.raises(InputError, match=told.replace(".", r"\.")) as caught:
        planning.plan_for(name, asked, CARD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [Asked(context_tokens=1 << 25), Asked(train=True, row_tokens=10**20)])
def test_where_a_folder_names_no_context_there_is_a_limit(world: World, tmp_path: Path, asked: Asked) -> None:
    config = {key: value for key, value in QWEN.items() if key != "max_position_embeddings"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="it must be from 1 to 16777216"):
        planning.plan_for(str(tmp_path), asked, CARD)
    assert planning.plan_for(str(tmp_path), Asked(context_tokens=1 << 20), CARD).plan.total_bytes > 100 * GIB


def test_a_bare_model_may_be_planned(world: World) -> None:
    found = planning.plan_for("qwen2.5-coder-7b", Asked(rank=0), CARD).plan
    assert found.bytes_of("served adapter") == 0


@pytest.mark.parametrize(
    ("asked", "cannot", "told"),
    [
        (Asked(train=True, row_tokens=5000), {"phi-2"}, "--row-tokens is 5000, but phi-2 has 2048; give another"),
        (Asked(quantisation="gguf"), {"phi-2", "mistral-7b"}, "--quantisation is gguf, but phi-2 is no GGUF file"),
    ],
)
def test_models_that_cannot_have_a_row_that_says_so(world: World, asked: Asked, cannot: set[str], told: str) -> None:
    rows = {each.model: each for each in planning.plan_all(asked, CARD)}
    assert list(rows) == list(catalog.entries())
    refused = {name for name, row in rows.items() if isinstance(row, Refusal)}
    assert cannot <= refused < set(rows)
    phi = rows["phi-2"]
    assert isinstance(phi, Refusal)
    assert told in phi.reason


@pytest.mark.parametrize(
    "asked", [Asked(context_tokens=-1), Asked(rank=-5), Asked(quantisation="q4"), Asked(train=True, pairs=0)]
)
def test_what_no_model_can_is_refused_at_once(world: World, asked: Asked) -> None:
    with pytest.raises(InputError):
        list(planning.plan_all(asked, CARD))


def test_settings_hold_where_nothing_is_said(world: World) -> None:
    world.config.write_text('[engine]\ncontext_tokens = 8192\ncompletion_slots = 2\nquantisation = "int8"\n')
    assert planning.plan_for("qwen2.5-coder-7b", Asked(), CARD).plan.workload.context_tokens == 8192
    assert planning.plan_for("phi-2", Asked(), CARD).plan.workload.context_tokens == 2048  # all that it has
    assert planning.plan_for("starter", Asked(), RAM).plan.workload.caches == 3
    for name, kind in (("phi-2", Quantisation.INT8), ("starter", Quantisation.GGUF)):
        assert planning.plan_for(name, Asked(), CARD).plan.workload.quantisation is kind
    world.config.write_text("[engine]\ncache_contexts = 5\n")
    found = planning.plan_for("qwen2.5-coder-7b", Asked(), CARD).plan
    assert found.bytes_of("key-value caches") == 5 * 4096 * found.kv_bytes_per_token
    assert planning.plan_for("starter", Asked(), RAM).plan.workload.caches == 7


def test_smaller_models_are_of_the_same_kind() -> None:
    names = [each.name for each in planning.smaller_than(architecture.of("codellama-13b"), Quantisation.NF4)]
    assert names[0] == "codellama-7b"  # asked with the same prompts
    assert "qwen2.5-coder-7b" in names
    assert not [name for name in names if "gguf" in name or name in ("starter", "phi-2", "mistral-7b")]
    unknown = replace(architecture.of("codellama-13b"), name="/my/folder")
    assert planning.smaller_than(unknown, Quantisation.NF4)[0].name == "codegemma-7b"  # the largest
    assert [each.name for each in planning.smaller_than(architecture.of("qwen2.5-coder-3b-gguf"), Quantisation.GGUF)][
        -1
    ] == ("starter")


def run(world: World, *arguments: str) -> str:
    done = world.run("plan", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_7b_on_a_card_of_12_gib(world: World) -> None:
    found = json.loads(run(world, "--model", "qwen2.5-coder-7b", "--memory", "12GiB", "--train", "--json"))
    assert found["fits"] is True
    assert found["base_gib"] == 5.17
    assert 7 < found["total_gib"] < 8
    assert found["total_bytes"] == sum(part["bytes"] for part in found["parts"])
    assert (found["training"]["row_tokens"], found["training"]["pairs"]) == (512, 1)
    assert found["training"]["activations_bytes_without_checkpointing"] > 5 * GIB
    assert found["changes"] == []


def test_the_13b_on_a_card_of_12_gib(world: World) -> None:
    found = json.loads(run(world, "--model", "codellama-13b", "--memory", "12GiB", "--train", "--json"))
    assert found["fits"] is False
    assert "a context of 2048 tokens" in found["changes"]
    assert found["changed"]["total_bytes"] <= found["memory_bytes"]
    text = " ".join(run(world, "--model", "codellama-13b", "--memory", "12GiB", "--train").split())
    assert "does not fit: 15.9 GiB of 12.0 GiB (as given); it would with 1 key-value cache" in text


def test_all_models_at_once(world: World) -> None:
    lines = json.loads(run(world, "--memory", "12GiB", "--train", "--json"))
    assert len(lines) == 18
    assert {line["model"] for line in lines if not line["fits"]} == {"codellama-13b"}
    lines = json.loads(run(world, "--memory", "12GiB", "--train", "--row-tokens", "5000", "--json"))
    assert len(lines) == 18
    assert {line["model"]: line["fits"] for line in lines if line["error"]}["phi-2"] is None
    text = run(world, "--memory", "12GiB", "--train", "--row-tokens", "5000")
    assert "--row-tokens is 5000, but phi-2" in " ".join(text.split())
    text = run(world, "--memory", "12GiB", "--context", "16384")
    assert "qwen2.5-coder-7b" in text
    assert "phi-2" in text


def test_without_a_memory_it_is_this_machines(world: World) -> None:
    found = json.loads(run(world, "--model", "starter", "--device", "cpu", "--json"))
    assert found["memory_source"] == "this machine's RAM"
    assert found["memory_bytes"] == machine.ram_bytes()


def test_a_folder_without_weights_will_do(world: World, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    found = json.loads(run(world, "--model", str(tmp_path), "--memory", "12GiB", "--json"))
    assert found["base_gib"] == 5.17


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "nonesuch"),
        ("--model", "/nonesuch/at/all"),
        ("--memory", "much"),
        ("--memory", "12GiB", "--model", "qwen2.5-coder-7b", "--context", "100000"),
        ("--device", "tpu"),
    ],
)
def test_errors_are_one_line(world: World, arguments: tuple[str, ...]) -> None:
    done = world.run("plan", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("tabwise: ")
    assert done.stderr.count("\n") == 1
