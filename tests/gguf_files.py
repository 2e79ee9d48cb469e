"""Small GGUF files: real headers, no weights worth the name."""

import struct
from collections.abc import Sequence
from pathlib import Path

from tests.fakes import SPECIALS


def string(text: str) -> bytes:
    """Return a text as GGUF writes it."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(words: Sequence[str] = SPECIALS, version: int = 3) -> bytes:
    """Return a file with two tensors of 64 bytes, an architecture, and a vocabulary."""
    entries = [
        string("general.architecture") + struct.pack("<I", 8) + string("qwen2"),
        string("qwen2.context_length") + struct.pack("<II", 4, 4096),
        string("some.numbers") + struct.pack("<IIQ", 9, 6, 3) + struct.pack("<3f", 1, 2, 3),
        string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(string, words)),
        string("tokenizer.ggml.merges") + struct.pack("<IIQ", 9, 8, 1) + string("a b"),
    ]
    names = ("output_norm.weight", "blk.0.attn_norm.weight")
    tensors = [string(name) + struct.pack("<IQIQ", 1, 16, 0, number * 64) for number, name in enumerate(names)]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries + tensors)
    return head + b"\0" * (-len(head) % 32) + bytes(range(128))


def write_gguf(path: Path) -> Path:
    """Write such a file."""
    path.write_bytes(gguf_bytes())
    return path
