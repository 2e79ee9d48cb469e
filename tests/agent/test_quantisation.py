"""How weights are held, by what there is room for."""

import json
import struct
from pathlib import Path

import pytest

from agent.engines.quantisation import Device, Quantisation, choose, needs_of
from agent.errors import MemoryFullError, ModelCorruptError

GIB = 1 << 30
SEVEN_B = {
    Quantisation.FP32: 29 * GIB,
    Quantisation.BF16: 15 * GIB,
    Quantisation.INT8: 9 * GIB,
    Quantisation.NF4: 6 * GIB,
}


def test_what_is_asked_for_is_taken() -> None:
    for wanted in Quantisation:
        assert choose(wanted.value, Device("cuda", 0), SEVEN_B.__getitem__) is wanted


def test_auto_takes_the_best_that_fits() -> None:
    assert choose("auto", Device("cuda", 24 * GIB), SEVEN_B.__getitem__) is Quantisation.BF16
    assert choose("auto", Device("cuda", 12 * GIB), SEVEN_B.__getitem__) is Quantisation.NF4
    assert choose("auto", Device("cpu", 64 * GIB), SEVEN_B.__getitem__) is Quantisation.FP32
    assert choose("auto", Device("cpu", 20 * GIB), SEVEN_B.__getitem__) is Quantisation.BF16


def test_what_fits_in_no_way_says_so() -> None:
    with pytest.raises(MemoryFullError, match=r"needs 6\.0 GiB at least, 4\.0 GiB are free"):
        choose("auto", Device("cuda", 4 * GIB), SEVEN_B.__getitem__)


def write(file: Path, **shapes: list[int]) -> None:
    header = json.dumps(
        {name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def test_needs_by_the_headers_of_the_files(tmp_path: Path) -> None:
    million = [1000, 1000]
    write(tmp_path / "a.safetensors", **{"model.embed_tokens.weight": million, "layers.0.q_proj.weight": million})
    write(tmp_path / "b.safetensors", **{"lm_head.weight": million, "layers.0.norm.weight": [1000]})
    needs = needs_of(tmp_path, "cpu")
    empty = needs(Quantisation.FP32) - 4 * 3_001_000
    assert needs(Quantisation.BF16) - empty == 2 * 3_001_000
    assert needs(Quantisation.NF4) - empty == 2 * 2_001_000 + 516_000


def test_files_that_are_cut_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelCorruptError, match=r"no \.safetensors"):
        needs_of(tmp_path, "cpu")
    for content in (b"", b"12345678", struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"xy"):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(ModelCorruptError, match=r"a\.safetensors is cut"):
            needs_of(tmp_path, "cpu")
