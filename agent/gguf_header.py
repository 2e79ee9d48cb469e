"""Reads the header of a GGUF file: enough to say what it is, and that it is not cut short.

Knows the container format (version 2 and 3, little-endian), not what the numbers mean to an engine. Written here since
the `gguf` package needs numpy and takes seconds over a vocabulary of 150,000 words, and the base install is light.

Source: the GGUF specification in the ggml repository, docs/gguf.md.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.errors import ModelCorruptError, UnknownModelError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = 32  # the specification's default
_DIMENSIONS = 4  # the most that ggml's tensors have


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]
    """As GGUF writes it: the last of numpy's dimensions first."""
    kind: int
    """ggml's number of the type: 0 for float32, 1 for float16."""
    start: int
    """Byte of the file at which it begins."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    architecture: str
    context_tokens: int
    vocabulary: frozenset[str]
    metadata: dict[str, Any]
    """Scalars and strings; of arrays, their length."""
    words: tuple[str, ...] = ()
    """The vocabulary in the order of its token ids."""
    tensors: Mapping[str, TensorPlace] = field(default_factory=dict)


def read(path: Path) -> GgufHeader:
    """Read the header of the file at `path`.

    Raises:
        UnknownModelError: There is no such file, or it cannot be opened.
        ModelCorruptError: It is no GGUF file, or shorter than its header says.
    """
    try:
        if not path.stat().st_size:
            raise ModelCorruptError(f"the model {path} is empty; pull or copy it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except OSError as error:
        raise UnknownModelError(f"cannot open the model {path}: {error.strerror}; check the path") from None


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> GgufHeader:
        if self._data[:4] != _MAGIC:
            raise ModelCorruptError(
                f"{self._path} is no GGUF file (begins with {self._data[:4]!r}); choose a .gguf file"
            )
        self._at = 4
        try:
            return self._read()
        except (struct.error, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            raise self._cut() from None  # lengths, kinds or values that cannot be

    def _read(self) -> GgufHeader:
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelCorruptError(f"{self._path} has GGUF version {version}, 2 and 3 are known; convert it anew")
        n_tensors, n_entries = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        words: tuple[str, ...] = ()
        for _ in range(n_entries):
            key, kind = self._string(), self._scalar("I")
            if key == "tokenizer.ggml.tokens" and kind == _ARRAY:
                self._scalar("I")
                words = tuple(self._string() for _ in range(self._count()))
                metadata[key] = len(words)
            else:
                metadata[key] = self._value(kind)
        found: dict[str, TensorPlace] = {}
        for _ in range(n_tensors):
            name = self._string()
            n_dimensions = self._scalar("I")
            if n_dimensions > _DIMENSIONS:
                raise self._cut()
            shape = tuple(self._scalar("Q") for _ in range(n_dimensions))
            found[name] = TensorPlace(shape, self._scalar("I"), self._scalar("Q"))
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        tensors = {name: replace(place, start=start + place.start) for name, place in found.items()}
        if max((place.start for place in tensors.values()), default=start) >= len(self._data):
            raise self._cut()
        architecture = str(metadata.get("general.architecture", ""))
        context = metadata.get(f"{architecture}.context_length", 0)
        return GgufHeader(architecture, int(context), frozenset(words), metadata, words, tensors)

    def _cut(self) -> ModelCorruptError:
        return ModelCorruptError(
            f"the model {self._path} is cut or damaged ({len(self._data)} bytes, its header needs more); pull or copy it again"
        )

    def _scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        (value,) = struct.unpack("<" + code, self._data[self._at : self._at + size])
        self._at += size
        return value

    def _count(self) -> int:
        count = int(self._scalar("Q"))
        if count > len(self._data):  # every element takes a byte or more: a damaged length must not cost memory
            raise self._cut()
        return count

    def _skip(self, n_bytes: int) -> None:
        self._at += n_bytes
        if self._at > len(self._data):
            raise self._cut()

    def _string(self) -> str:
        length = self._count()
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        inner, count = self._scalar("I"), self._count()
        if inner in _SCALARS:
            self._skip(struct.calcsize("<" + _SCALARS[inner]) * count)
        else:
            for _ in range(count):
                self._value(inner)
        return count
