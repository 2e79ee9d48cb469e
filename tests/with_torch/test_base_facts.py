import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; make train-deps")

from agent import base_facts  # noqa: E402
from agent.adapters import BaseFacts  # noqa: E402
from agent.catalog import LocalModel  # noqa: E402
from agent.errors import AdapterError  # noqa: E402
from agent.fim import FORMATS  # noqa: E402
from tests.with_torch import tiny  # noqa: E402


def facts_of(path: Path) -> BaseFacts:
    kind = "gguf" if path.is_file() else "safetensors"
    return base_facts.of(LocalModel("tiny", path, kind, "qwen", 512, ""), FORMATS["qwen"])


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_all_forms_of_a_base_are_one(tmp_path: Path, kind: str) -> None:
    model = tiny.make_model(kind)
    found = {
        facts_of(tiny.write_gguf(model, kind, tmp_path / "m.gguf")),
        facts_of(tiny.write_folder(model, tmp_path / "float32")),
        facts_of(tiny.write_folder(model.bfloat16(), tmp_path / "bfloat16")),
    }
    assert len(found) == 1
    assert found.pop().prompt_format == "qwen/line-anchored-1"


def test_another_base_is_another(tmp_path: Path) -> None:
    one = facts_of(tiny.write_folder(tiny.make_model("qwen2", seed=0), tmp_path / "one"))
    other = facts_of(tiny.write_folder(tiny.make_model("qwen2", seed=1), tmp_path / "other"))
    assert one.base != other.base
    assert one.tokenizer == other.tokenizer


def test_another_vocabulary_is_another(tmp_path: Path) -> None:
    folder = tiny.write_folder(tiny.make_model("qwen2"), tmp_path / "one")
    before = facts_of(folder)
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"]["ba"] = fields["model"]["vocab"].pop("ab")
    path.write_text(json.dumps(fields))
    (folder / "config.json").touch()
    assert facts_of(folder).base == before.base
    assert facts_of(folder).tokenizer != before.tokenizer


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", b"{}"), ("tokenizer.json", b"["), ("model.safetensors", b"cut")]
)
def test_a_folder_that_tells_nothing_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    folder = tiny.write_folder(tiny.make_model("qwen2"), tmp_path / "one")
    (folder / name).write_bytes(content)
    with pytest.raises(AdapterError, match="no adapter can be held against"):
        facts_of(folder)
