"""Writes a PEFT adapter as a GGUF file, so that llama.cpp serves the very same one.

Knows three architectures: Llama (to which Mistral, DeepSeek-Coder, CodeLlama and Mellum belong in GGUF), Qwen2 and Qwen3.
llama.cpp turns pairs of neighbouring rows of a Llama's queries and keys, transformers the two halves of a head: there the
rows are put into llama.cpp's order, as they are in the base's own file. Files are kept under the adapter's hash in our data
directory, never in the adapter's folder, and appear there only whole. Knows no server.

Source: the GGUF specification (docs/gguf.md in the ggml repository) and the names that llama.cpp's LoRA loader asks for.
"""

import contextlib
import hashlib
import logging
import math
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import adapters, gguf_header, paths
from agent.adapters import Halves, Lora
from agent.engines.base import Adapter
from agent.errors import AdapterError, ModelError
from agent.gguf_header import GgufHeader

if TYPE_CHECKING:
    from agent.adapters import Matrix

log = logging.getLogger(__name__)

_TURNS_PAIRS = {"llama": True, "qwen2": False, "qwen3": False}
"""The architectures that are known, and whether llama.cpp turns neighbouring rows in them."""
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEADS = {"self_attn.q_proj": "attention.head_count", "self_attn.k_proj": "attention.head_count_kv"}
_FORMAT = "1"  # changes whenever the same adapter is written differently
_KEPT = 8  # exports; one of a 7B model's adapters has 160 MB


def exported(adapter: Adapter, base: GgufHeader) -> Path:
    """Return a GGUF file with the contents of an adapter, written now if it was not before.

    Args:
        adapter: As it was inspected.
        base: Header of the file that it will be served with.

    Raises:
        AdapterError: The adapter was changed, does not fit the base, or cannot be written.
    """
    folder = paths.private_dir(paths.data_dir() / "adapters-gguf")
    shape = f"{_FORMAT} {base.architecture} {[_heads(base, kind) for kind in _HEADS]}"
    path = folder / f"{adapter.name}-{hashlib.sha256(shape.encode()).hexdigest()[:8]}.gguf"
    with contextlib.suppress(ModelError):  # not there, or damaged since
        gguf_header.read(path)
        os.utime(path)
        return path
    temporary = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        write(adapters.load(adapter), base, temporary, str(adapter.folder))
        temporary.replace(path)
    except OSError as error:
        raise AdapterError(f"cannot write {path}: {error.strerror}; make room on the disk") from None
    finally:
        temporary.unlink(missing_ok=True)
    _forget(folder.glob("*.gguf"))
    return path


def write(lora: Lora, base: GgufHeader, path: Path, name: str) -> None:
    """Write an adapter's contents to a GGUF file.

    Args:
        lora: The contents.
        base: Header of the base's file.
        path: File to write.
        name: What to call the adapter in messages.

    Raises:
        AdapterError: It does not fit the base.
    """
    import gguf  # with numpy, and only needed where an adapter is served

    if base.architecture not in _TURNS_PAIRS:
        known = ", ".join(_TURNS_PAIRS)
        raise AdapterError(f"the adapter {name} is refused: llama.cpp's {base.architecture} is none of {known}")
    writer = gguf.GGUFWriter(path, base.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / rank.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.scaling * lora.rank)
    for module, halves in sorted(lora.modules.items()):
        tensor, placed = _placed(module, halves, base, name)
        writer.add_tensor(f"{tensor}.lora_a", placed.down)
        writer.add_tensor(f"{tensor}.lora_b", placed.up)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())  # before it gets its name


def _placed(module: str, halves: Halves, base: GgufHeader, name: str) -> tuple[str, Halves]:
    """Return the name of a module's tensor in GGUF, and its halves with rows as llama.cpp has them."""
    _, _, layer, kind = module.split(".", 3)
    tensor = f"blk.{layer}.{_TENSORS[kind]}.weight"
    shape = (halves.down.shape[1], halves.up.shape[0])
    place = base.tensors.get(tensor)
    if place is None or place.shape != shape:
        has = f"{place.shape[0]} to {place.shape[1]} values" if place and len(place.shape) == 2 else "no such matrix"
        raise AdapterError(
            f"the adapter {name} is refused: made for {shape[0]} to {shape[1]} values at {module}, the model has {has}; "
            "choose the model it was made for"
        )
    if not _TURNS_PAIRS[base.architecture] or kind not in _HEADS:
        return tensor, halves
    heads = _heads(base, kind)
    if shape[1] != heads * _head_values(base):
        raise AdapterError(
            f"the adapter {name} is refused: {shape[1]} values at {module} are no {heads} heads of the model's"
        )
    return tensor, Halves(halves.down, _in_pairs(halves.up, heads))


def _in_pairs(up: "Matrix", heads: int) -> "Matrix":
    """Return rows (heads x 2 x pairs) in the order (heads x pairs x 2)."""
    pairs = up.shape[0] // heads // 2
    return up.reshape(heads, 2, pairs, up.shape[1]).swapaxes(1, 2).reshape(up.shape)


def _heads(base: GgufHeader, kind: str) -> int:
    found: Any = base.metadata.get(f"{base.architecture}.{_HEADS[kind]}")
    if found is None:  # as many heads for keys as for queries
        found = base.metadata.get(f"{base.architecture}.attention.head_count", 0)
    return int(found)


def _head_values(base: GgufHeader) -> int:
    found = base.metadata.get(f"{base.architecture}.attention.key_length")
    width = int(base.metadata.get(f"{base.architecture}.embedding_length", 0))
    return int(found) if found else width // max(1, _heads(base, "self_attn.q_proj"))


def _forget(files: Iterable[Path]) -> None:
    """Delete the exports that were not used for longest."""
    used = sorted(files, key=lambda path: _age(path), reverse=True)
    for path in used[_KEPT:]:
        path.unlink(missing_ok=True)  # a server that has it open keeps it
        log.info("forgot the export %s", path.name)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -math.inf  # gone already
