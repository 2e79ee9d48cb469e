import struct
from contextlib import suppress
from pathlib import Path

import pytest

from agent import gguf_header
from agent.errors import ModelCorruptError, UnknownModelError
from tests.fakes import SPECIALS
from tests.gguf_files import gguf_bytes, string


def test_a_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes())
    header = gguf_header.read(path)
    assert header.architecture == "qwen2"
    assert header.context_tokens == 4096
    assert header.vocabulary == frozenset(SPECIALS)
    assert header.metadata["some.numbers"] == 3
    assert header.words == SPECIALS
    first, second = header.tensors["output_norm.weight"], header.tensors["blk.0.attn_norm.weight"]
    assert (first.shape, first.kind, second.start - first.start) == ((16,), 0, 64)
    assert path.read_bytes()[first.start : second.start] == bytes(range(64))


def test_every_cut_is_noticed_up_to_the_last_tensor(tmp_path: Path) -> None:
    whole = gguf_bytes()
    path = tmp_path / "m.gguf"
    # The last 64 bytes are the last tensor: its inside is llama.cpp's to check.
    for length in range(len(whole) - 64 + 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelCorruptError) as caught:
            gguf_header.read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damage_never_raises_anything_else(tmp_path: Path) -> None:
    whole = bytearray(gguf_bytes())
    path = tmp_path / "m.gguf"
    for place in range(4, len(whole) - 128):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with suppress(ModelCorruptError):
            gguf_header.read(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else"])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelCorruptError, match=r"m\.gguf"):
        gguf_header.read(path)


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(version=9))
    with pytest.raises(ModelCorruptError, match="version 9"):
        gguf_header.read(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="No such file"):
        gguf_header.read(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "entry",
    [
        string("general.alignment") + struct.pack("<II", 4, 0),
        string("general.alignment") + struct.pack("<I", 8) + string("x"),
        string("qwen2.context_length") + struct.pack("<I", 8) + string("many"),
        string("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000,
    ],
)
def test_values_that_cannot_be_are_damage(tmp_path: Path, entry: bytes) -> None:
    path = tmp_path / "m.gguf"
    head = (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + string("general.architecture") + struct.pack("<I", 8) + string("qwen2")
    )
    path.write_bytes(head + entry + bytes(64))
    with pytest.raises(ModelCorruptError):
        gguf_header.read(path)
