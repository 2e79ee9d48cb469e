"""One line or several, against golden cases with the cursor drawn in the text."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent import syntax

GOLDEN = tomllib.loads((Path(__file__).parents[1] / "golden" / "syntax.toml").read_text(encoding="utf-8"))
CASES = [pytest.param(name, case, id=f"{name}: {case['name']}") for name, cases in GOLDEN.items() for case in cases]
LANGUAGES = set("python javascript javascriptreact typescript typescriptreact java go rust c cpp".split())


def wants_block(language: str, drawn: str) -> bool | None:
    prefix, cursor, suffix = drawn.partition("█")
    assert cursor, "a case draws its cursor"
    return syntax.wants_block(language, prefix, suffix)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_where_several_lines_are_wanted(name: str, case: dict[str, Any]) -> None:
    assert wants_block(case.get("language", name), case["at"]) is case["block"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_text_in_front_changes_nothing(name: str, case: dict[str, Any]) -> None:
    # More of it than is parsed, so that the piece begins somewhere within; and characters of several bytes.
    mark = "#" if name == "python" else "//"
    above = f"{mark} größer als nötig, 日本\n" * 400
    assert wants_block(case.get("language", name), above + case["at"]) is not (not case["block"])


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_ends_of_lines_make_no_difference(name: str, case: dict[str, Any]) -> None:
    assert wants_block(case.get("language", name), case["at"].replace("\n", "\r\n")) is case["block"]


def test_each_language_has_cases_of_both_kinds() -> None:
    for cases in GOLDEN.values():
        assert len(cases) >= 8
        assert {case["block"] for case in cases} == {True, False}
    others = {case["language"] for cases in GOLDEN.values() for case in cases if "language" in case}
    assert GOLDEN.keys() | others == LANGUAGES


def test_without_a_grammar_the_caller_must_decide() -> None:
    assert wants_block("haskell", "f x =\n  █") is None


def test_where_the_bracket_lies_beyond_the_piece_the_caller_must_decide() -> None:
    assert wants_block("go", "var xs = []int{\n" + "\t1,\n" * 3000 + "\t█\n}\n") is None


@pytest.mark.parametrize("drawn", ["█", "\n█", "{█", "}█{", "'█", "\ud800{█", "((((\n  █", "\0:█", "x" * 9000 + "{█"])
@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_broken_text_breaks_nothing(language: str, drawn: str) -> None:
    assert wants_block(language, drawn) in (True, False, None)
