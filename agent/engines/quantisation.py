"""In how many bits a model's weights are held: as the settings say, or as the device has room for.

Pure: knows devices as names and bytes. What a model needs is asked of a function, since the memory planner knows more
of that than a loader does.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from agent.errors import MemoryFullError, ModelCorruptError


class Quantisation(StrEnum):
    """How weights are held."""

    NF4 = "nf4"
    """Four bits, normal floats, with quantised constants; computed in bfloat16. Dettmers et al., arXiv 2305.14314."""
    INT8 = "int8"
    """Eight bits, with the outliers in sixteen. Dettmers et al., arXiv 2208.07339."""
    BF16 = "bf16"
    FP32 = "fp32"


@dataclass(frozen=True, slots=True)
class Device:
    """What computes."""

    kind: str
    """"cuda" or "cpu"."""
    free_bytes: int
    """Memory that can be had now."""


Needs = Callable[[Quantisation], int]
"""Bytes that a model needs on its device when it is held so."""

PREFERRED = {
    "cuda": (Quantisation.BF16, Quantisation.NF4),
    # Without the AVX-512 kinds of instructions, bfloat16 decodes seven times slower than float32 on a CPU (measured
    # with the 0.5B on AVX2), and four bits twenty times: there the slow one is for models that fit in no other way.
    "cpu": (Quantisation.FP32, Quantisation.BF16),
}
"""What `auto` tries, the best first. Eight bits are for who asks for them: they decode slower than four."""

_LINEAR_BYTES = {Quantisation.NF4: 0.516, Quantisation.INT8: 1.003, Quantisation.BF16: 2.0, Quantisation.FP32: 4.0}
"""A weight of a linear layer, its share of the constants included (calculated: NF4 0.5 + 1/64 + 4/(64 · 256) bytes)."""
_OTHER_BYTES = {Quantisation.NF4: 2.0, Quantisation.INT8: 2.0, Quantisation.BF16: 2.0, Quantisation.FP32: 4.0}
"""Any other weight: embeddings, the head, norms."""
HEADROOM_BYTES = {"cuda": 1 << 30, "cpu": 1 << 29}
"""For what comes on top: kernels and their workspace on a GPU, and keys, values and activations on both."""

CHUNK_TOKENS = {"cuda": 512, "cpu": 64}
"""Prompt tokens in one pass. A cancel waits for one: a third of a second on two cores with the 0.5B (measured), and a GPU is
left idle by small ones (not measured)."""


def choose(wanted: str, device: Device, needs: Needs) -> Quantisation:
    """Return how to hold a model's weights.

    Args:
        wanted: A `Quantisation`, which is taken as it is, or "auto".
        device: Where the model is to run.
        needs: What it needs there.

    Raises:
        MemoryFullError: It is "auto", and the model fits in no way.
    """
    if wanted != "auto":
        return Quantisation(wanted)
    for quantisation in PREFERRED[device.kind]:
        if needs(quantisation) <= device.free_bytes:
            return quantisation
    least = min(needs(quantisation) for quantisation in PREFERRED[device.kind])
    raise MemoryFullError(
        f"the model needs {least / 2**30:.1f} GiB at least, {device.free_bytes / 2**30:.1f} GiB are free; "
        "close other programs or choose a smaller model in model.name"
    )


def needs_of(folder: Path, kind: str) -> Needs:
    """Return what a folder of safetensors needs on a device of that kind, by the headers of its files.

    Raises:
        ModelCorruptError: A file has no such header, or there is none.
    """
    linear, other = _count_weights(folder)

    def needs(quantisation: Quantisation) -> int:
        weights = linear * _LINEAR_BYTES[quantisation] + other * _OTHER_BYTES[quantisation]
        return int(weights) + HEADROOM_BYTES[kind]

    return needs


def _count_weights(folder: Path) -> tuple[int, int]:
    """Return how many weights linear layers have, and all others."""
    linear = other = 0
    # Some models come with the same weights a second time, in a file for other programs.
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelCorruptError(f"{folder} has no .safetensors file; pull or copy the model again")
    for file in files:
        for name, tensor in _header(file).items():
            if name == "__metadata__":
                continue
            size = math.prod(tensor["shape"])
            if len(tensor["shape"]) == 2 and "embed" not in name and "lm_head" not in name:
                linear += size
            else:
                other += size
    return linear, other


def _header(file: Path) -> dict[str, dict[str, list[int]]]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError
            found: dict[str, dict[str, list[int]]] = json.loads(stream.read(length))
            return found
    except (ValueError, struct.error):
        raise ModelCorruptError(f"{file} is cut or damaged; pull or copy the model again") from None
