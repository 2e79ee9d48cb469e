"""Words of a model folder's vocabulary."""

import json
from pathlib import Path

import pytest

from agent import fim
from agent.errors import ModelCorruptError
from agent.tokenizer_json import vocabulary
from tests.fakes import SPECIALS


def test_words_and_what_was_added(tmp_path: Path) -> None:
    facts = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": word} for word in SPECIALS]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    found = vocabulary(tmp_path)
    assert found == {"a", "b", *SPECIALS}
    fmt = fim.detect(found)
    assert fmt is not None
    assert fmt.name == "qwen"


def test_pairs_of_words_and_scores(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    assert vocabulary(tmp_path) == {"a", "b"}


def test_no_such_file_and_one_that_is_something_else(tmp_path: Path) -> None:
    assert vocabulary(tmp_path) == frozenset()
    for content in ("", "{}", "[]", '{"model": 1}', '{"model": {"vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelCorruptError, match=r"tokenizer\.json cannot be read"):
            vocabulary(tmp_path)
