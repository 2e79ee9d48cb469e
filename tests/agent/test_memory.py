from dataclasses import replace

import pytest

from agent import catalog, memory, weights
from agent.catalog import Dimensions
from agent.memory import GIB, MIB, Device, Optimizer, Quantisation, Training, Workload

WEIGHTS = {
    # As their makers' model cards and safetensors indices give them; of the embedding's second use nothing is counted.
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "qwen2.5-coder-3b": 3_085_938_688,
    "qwen2.5-coder-7b": 7_615_616_512,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "deepseek-coder-6.7b": 6_740_512_768,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codegemma-7b": 8_537_680_896,
    "mistral-7b": 7_241_732_096,
    "phi-2": 2_779_683_840,
}


def sizes(name: str) -> Dimensions:
    return catalog.entry(name).dimensions


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_counted_as_their_makers_do(name: str) -> None:
    counted = weights.parameters(sizes(name))
    # Left out: the biases of starcoder2's and phi's norms, and of phi's head.
    assert 0 <= WEIGHTS[name] - counted <= WEIGHTS[name] * 1e-4
    if name.startswith("qwen"):
        assert counted == WEIGHTS[name]


def test_the_7b_as_it_was_calculated_by_hand() -> None:
    found = memory.plan(sizes("qwen2.5-coder-7b"), Workload(training=Training()))
    assert weights.lora_parameters(sizes("qwen2.5-coder-7b"), 16) == 40_370_176
    assert found.bytes_of("layers") / GIB == pytest.approx(3.14, abs=0.01)
    assert found.base_bytes / GIB == pytest.approx(5.17, abs=0.01)
    assert found.bytes_of("trained adapter") == found.bytes_of("gradients") == 161_480_704  # 154 MiB
    assert found.bytes_of("optimizer") / MIB == pytest.approx(78, abs=1)
    assert found.kv_bytes_per_token == 56 << 10
    assert found.peaks is not None
    assert found.peaks.kept_with_checkpointing == 1024 * (
        200_704 + 7_168
    )  # each block's input, and what the last gives
    assert 7 * GIB < found.total_bytes < 8 * GIB


def test_a_plan_is_the_sum_of_its_parts() -> None:
    found = memory.plan(sizes("qwen2.5-coder-7b"), Workload(training=Training()))
    assert found.total_bytes == sum(part.bytes for part in found.parts)
    assert len({part.name for part in found.parts}) == len(found.parts)
    assert found.tensor_bytes == found.total_bytes - found.bytes_of("runtime", "fragments")
    assert found.peaks is not None
    assert found.bytes_of("training step") == max(found.peaks.logits, found.peaks.one_block)


def test_a_shared_embedding_is_held_once() -> None:
    apart = replace(sizes("qwen2.5-coder-0.5b"), tied=False)
    shared, own = (memory.plan(size, Workload()) for size in (replace(apart, tied=True), apart))
    assert shared.bytes_of("head") == 0
    assert own.base_bytes - shared.base_bytes == own.bytes_of("embeddings") == 151_936 * 896 * 2


def test_fewer_heads_for_keys_and_values_make_smaller_caches() -> None:
    one = replace(sizes("codellama-7b"), kv_heads=32)
    quarter = replace(one, kv_heads=8)
    caches = [memory.plan(size, Workload()).bytes_of("key-value caches") for size in (one, quarter)]
    assert caches[0] == 4 * caches[1]


def test_heads_may_be_wider_than_the_layers() -> None:
    size = sizes("codegemma-7b")
    assert size.heads * size.head_dim == 4096 > size.hidden
    assert memory.plan(size, Workload()).kv_bytes_per_token == 2 * 28 * 4096 * 2


def test_an_mlp_without_a_gate_keeps_half() -> None:
    gated = sizes("codellama-7b")
    plain = replace(gated, mlp_matrices=2)
    kept = []
    for size in (gated, plain):
        peaks = memory.plan(size, Workload(training=Training())).peaks
        assert peaks is not None
        kept.append(peaks.kept_without_checkpointing)
    per_token = [each // (1024 * 32) for each in kept]
    assert per_token[0] - per_token[1] == 2 * (2 * gated.mlp + 16)  # two tensors, and the gate's adapter


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"pairs": 2}, "activations"),
        ({"row_tokens": 1024}, "activations"),
        ({"scored_tokens": 512}, "training step"),
        ({"rank": 64}, "gradients"),
        ({"checkpointing": False}, "activations"),
        ({"optimizer": Optimizer.ADAM}, "optimizer"),
    ],
)
def test_more_of_anything_takes_more(more: dict[str, object], part: str) -> None:
    size = sizes("qwen2.5-coder-7b")
    less = memory.plan(size, Workload(training=Training()))
    grown = memory.plan(size, Workload(training=replace(Training(), **more)))  # type: ignore[arg-type]
    assert grown.bytes_of(part) > less.bytes_of(part)
    assert grown.total_bytes > less.total_bytes


def test_quantisations_in_their_order() -> None:
    size = sizes("qwen2.5-coder-7b")
    kinds = (Quantisation.NF4, Quantisation.INT8, Quantisation.BF16, Quantisation.FP32)
    bases = [memory.plan(size, Workload(quantisation=kind)).base_bytes for kind in kinds]
    assert bases == sorted(bases)
    assert bases[3] == 4 * WEIGHTS["qwen2.5-coder-7b"]


def test_what_is_offloaded_is_not_on_the_device() -> None:
    training = Training(optimizer=Optimizer.ADAM_OFFLOADED)
    assert memory.plan(sizes("qwen2.5-coder-7b"), Workload(training=training)).bytes_of("optimizer") == 0


def test_a_gguf_file_takes_its_bytes() -> None:
    starter = catalog.entry("starter")
    workload = Workload(quantisation=Quantisation.GGUF, device=Device.CPU, caches=7)
    known = memory.plan(starter.dimensions, workload, file_bytes=starter.bytes)
    assert known.base_bytes == starter.bytes
    assert known.bytes_of("key-value caches") == 7 * 4096 * 12_288
    # 881 MiB were measured for the starter with these settings, 70 of them vocabulary and buffers: the runtime's.
    assert known.tensor_bytes / MIB == pytest.approx(881 - 70, rel=0.02)


@pytest.mark.parametrize(("name", "gigabytes"), [("qwen2.5-coder-1.5b-gguf", 1.12), ("qwen2.5-coder-7b-gguf", 4.68)])
def test_a_gguf_file_that_is_not_here_is_estimated(name: str, gigabytes: float) -> None:
    """The files' sizes as the hub shows them."""
    assert weights.gguf_bytes(sizes(name)) / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_a_cpu_leaves_room_for_the_system() -> None:
    plan = memory.plan(sizes("starcoder2-3b"), Workload(quantisation=Quantisation.FP32, device=Device.CPU))
    assert plan.bytes_of("system") == 2 * GIB
    assert plan.bytes_of("fragments") == 0
