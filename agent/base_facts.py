"""What a model is, for adapters: an identity that all quantisations of the same weights share.

Quantising leaves the vectors of a model alone, its norms and biases: they are in every file, in float32 or as they came,
and any further training of all weights moves them. Their hash, in bfloat16, names the base. The vocabulary's hash names
the tokenizer. A quantisation that scales activations first (AWQ) folds the scales into the norms: adapters of the plain
model would compute from other values there, and so it is rightly another base. Reads GGUF files and folders of
transformers'; knows no adapter, and needs neither torch nor numpy.

What it cannot tell apart: models that differ in their matrices alone, as after an adapter was merged into a base.
"""

import hashlib
import json
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from agent import fim, gguf_header
from agent.adapters import BaseFacts
from agent.catalog import LocalModel
from agent.errors import AdapterError
from agent.fim import FimFormat

_CODES = {0: "f", 1: "e", 30: "H", "F32": "f", "F16": "e", "BF16": "H"}
"""How a vector's numbers are packed, by its kind in GGUF and in safetensors; bfloat16 is taken as it stands."""
_LAYER_VECTORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
}
"""Names of a layer's vectors, in transformers and in GGUF."""
_LAST_NORM = {"model.norm.weight": "output_norm.weight"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GGUF_NAME = re.compile(rf"blk\.\d+\.(?:{'|'.join(map(re.escape, _LAYER_VECTORS.values()))})|output_norm\.weight")
_HEADER_BYTES = 1 << 26  # of a safetensors file; the names of 10,000 tensors have 1 MB


@dataclass(frozen=True, slots=True)
class _Vector:
    path: Path
    kind: int | str
    start: int
    count: int


def prompt_format(fmt: FimFormat | None) -> str:
    """Return name and version of the prompts' layout for a model with this format."""
    return f"{fmt.name if fmt else 'none'}/{fim.PROMPT_FORMAT}"


def of(model: LocalModel, fmt: FimFormat | None) -> BaseFacts:
    """Return what a model is.

    Args:
        model: A GGUF file, or a folder of transformers'.
        fmt: The format in which it fills in the middle.

    Raises:
        AdapterError: It has no vectors or no vocabulary that are known.
        ModelError: Its file is damaged.
    """
    file = model.path if model.path.is_file() else model.path / "config.json"
    try:
        changed = file.stat().st_mtime_ns
    except OSError as error:
        raise AdapterError(f"no adapter can be held against {model.path}: {error.strerror}; check the model") from None
    base, tokenizer = _identities(model.path, changed)
    return BaseFacts(base, tokenizer, prompt_format(fmt))


@cache
def _identities(path: Path, changed: int) -> tuple[str, str]:
    del changed  # a file that was replaced is read anew
    if path.is_file():
        header = gguf_header.read(path)
        vectors = {
            name: _Vector(path, place.kind, place.start, place.shape[0])
            for name, place in header.tensors.items()
            if _GGUF_NAME.fullmatch(name) and len(place.shape) == 1
        }
        words: Mapping[int, str] = dict(enumerate(header.words))
    else:
        try:
            vectors, words = dict(_folder_vectors(path)), _folder_words(path)
        except (
            struct.error,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ):  # fields that are missing or no numbers
            raise AdapterError(f"no adapter can be held against {path}: its files are damaged; pull it again") from None
    if not vectors or not words:
        lacks = "vocabulary" if vectors else "norm"
        raise AdapterError(
            f"no adapter can be held against {path}: it has no {lacks} that is known; choose another model"
        )
    return _hash_of_vectors(vectors), _hash_of_words(words)


def _hash_of_vectors(vectors: Mapping[str, _Vector]) -> str:
    digest = hashlib.sha256()
    for name in sorted(vectors):
        words = _bfloat16(vectors[name])
        digest.update(f"{name} {len(words)}\n".encode())
        digest.update(struct.pack(f"<{len(words)}H", *words))
    return digest.hexdigest()


def _bfloat16(vector: _Vector) -> list[int]:
    """Return a vector's numbers as bfloat16: the upper halves of float32, rounded to even."""
    code = _CODES.get(vector.kind)
    if code is None:
        raise AdapterError(f"no adapter can be held against {vector.path}: it has norms of the kind {vector.kind}")
    with vector.path.open("rb") as file:
        file.seek(vector.start)
        raw = file.read(struct.calcsize(f"<{vector.count}{code}"))
    values = struct.unpack(f"<{vector.count}{code}", raw)
    if code == "H":
        return list(values)
    bits = struct.unpack(f"<{vector.count}I", struct.pack(f"<{vector.count}f", *values))
    return [((each + 0x7FFF + (each >> 16 & 1)) >> 16) & 0xFFFF for each in bits]


def _hash_of_words(words: Mapping[int, str]) -> str:
    digest = hashlib.sha256()
    for number, word in sorted(words.items()):
        # GGUF fills up its list to the size of the embeddings; a tokenizer's own files do not have these.
        if word != f"[PAD{number}]":
            digest.update(f"{number} {word}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _folder_vectors(folder: Path) -> Iterator[tuple[str, _Vector]]:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            (length,) = struct.unpack("<Q", data[:8])
            fields = _object(path, data[8 : 8 + min(length, _HEADER_BYTES)])
        for name, tensor in fields.items():
            known = _gguf_name(name)
            if known is not None and len(tensor["shape"]) == 1:
                start = 8 + length + tensor["data_offsets"][0]
                yield known, _Vector(path, tensor["dtype"], start, tensor["shape"][0])


def _gguf_name(name: str) -> str | None:
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _LAST_NORM.get(name)
    known = _LAYER_VECTORS.get(layer[2])
    return f"blk.{layer[1]}.{known}" if known else None


def _folder_words(folder: Path) -> Mapping[int, str]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    fields = _object(path, path.read_bytes())
    vocabulary = fields.get("model", {}).get("vocab", {})  # by word, or as pairs of word and score
    numbered = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((pair[0], n) for n, pair in enumerate(vocabulary))
    )
    words = {int(number): str(word) for word, number in numbered}
    return words | {int(added["id"]): str(added["content"]) for added in fields.get("added_tokens", ())}


def _object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise AdapterError(f"no adapter can be held against {path}: it is damaged; pull or copy the model again")
    return fields
