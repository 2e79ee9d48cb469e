"""Declarations of modules against golden cases, and on texts that are no such thing."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import grammars
from agent.declarations import declarations, outline

GOLDEN = tomllib.loads((Path(__file__).parents[1] / "golden" / "declarations.toml").read_text(encoding="utf-8"))
CASES = [
    pytest.param(language, case, id=f"{language}: {case['name']}") for language in GOLDEN for case in GOLDEN[language]
]
LANGUAGES = ["python", "javascript", "javascriptreact", "typescript", "typescriptreact"]


@pytest.mark.parametrize(("language", "case"), CASES)
def test_declarations(language: str, case: dict[str, Any]) -> None:
    assert declarations(case["text"], language, case.get("names")) == case["told"].strip("\n")


@pytest.mark.parametrize("language", LANGUAGES)
def test_comments_and_bodies_never_appear(language: str) -> None:
    text = "\n".join(case["text"] for case in GOLDEN[language]) + Path(__file__).read_text(encoding="utf-8")
    told = declarations(text, language)
    assert told
    assert "return" not in told
    assert "/*" not in told


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LANGUAGES), st.data())
def test_a_text_cut_anywhere_breaks_nothing(language: str, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(GOLDEN[language]))["text"]
    cut, more = data.draw(st.integers(0, len(text))), data.draw(st.text(max_size=20))
    for declared in outline(text[:cut] + more, language):
        assert declared.name
        assert declared.text


@pytest.mark.parametrize("language", LANGUAGES)
def test_deep_nesting_comes_to_an_end(language: str) -> None:
    blocks = "".join(" " * depth + "if x:\n" for depth in range(2000)) if language == "python" else "if (x) {" * 5000
    assert declarations(blocks, language) == ""
    assert len(declarations("f = " + "(" * 20_000, language)) < 1000


def test_a_long_default_is_cut() -> None:
    told = declarations(f"def f(a={list(range(1000))}): return a", "python")
    assert len(told) < 500
    assert told.startswith("def f(a=[0, 1, 2")


def test_half_a_surrogate_is_no_trouble() -> None:
    assert declarations("x = '\ud800'\ndef é(a='\ud800'): pass", "python") == "x = ...\ndef é(a='?'): ..."


@pytest.mark.parametrize("language", [*LANGUAGES, "java", "go", "rust", "c", "cpp"])
def test_every_grammar_parses(language: str) -> None:
    parser = grammars.parser(language)
    assert parser is not None
    assert parser.parse(b"").root_node.child_count == 0
    assert grammars.parser(language) is not parser  # one for each thread that asks


def test_no_grammar() -> None:
    assert grammars.parser("cobol") is None
