"""Filters and stop rules against golden cases, the cursor drawn in the text."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent import postprocess, stopping
from agent.context import Surroundings, surroundings
from agent.types import StopReason

FOLDER = Path(__file__).parents[1] / "golden"
FILTERS = tomllib.loads((FOLDER / "postprocess.toml").read_text(encoding="utf-8"))
STOPS = tomllib.loads((FOLDER / "stopping.toml").read_text(encoding="utf-8"))
BLOCK_LINES = 6


def around(drawn: str) -> Surroundings:
    prefix, cursor, suffix = drawn.partition("█")
    assert cursor, "a case draws its cursor"
    return surroundings(prefix, suffix)


def cases(golden: dict[str, Any], *names: str) -> list[Any]:
    return [pytest.param(name, case, id=f"{name}: {case['name']}") for name in names for case in golden[name]]


@pytest.mark.parametrize(("name", "case"), cases(FILTERS, *(run.__name__ for run in postprocess.FILTERS)))
def test_filter(name: str, case: dict[str, Any]) -> None:
    run = next(run for run in postprocess.FILTERS if run.__name__ == name)
    assert run(case["wrote"], around(case["at"])) == case.get("kept", case["wrote"])


def test_every_filter_has_eight_cases_and_some_where_it_does_nothing() -> None:
    for run in postprocess.FILTERS:
        golden = FILTERS[run.__name__]
        assert len(golden) >= 8
        assert any("kept" not in case for case in golden)


@pytest.mark.parametrize(("name", "case"), cases(FILTERS, "replaced_chars"))
def test_replaced_chars(name: str, case: dict[str, Any]) -> None:
    assert postprocess.replaced_chars(case["wrote"], around(case["at"])) == case["replaced"]


@pytest.mark.parametrize(("name", "case"), cases(STOPS, "line", "block"))
def test_stop(name: str, case: dict[str, Any]) -> None:
    rules = stopping.rules_for(around(case["at"]), multiline=name == "block", max_lines=BLOCK_LINES)
    found = stopping.find_stop(case["wrote"], rules, final=case.get("final", False))
    if "reason" not in case:
        assert found is None
    else:
        assert found is not None
        assert (case["wrote"][: found.end], found.reason) == (case["kept"], StopReason(case["reason"]))


def test_clean_tells_which_filter_emptied_the_text() -> None:
    assert postprocess.clean("return total", around("█\nreturn total\n")) == ("", "drop_echo")
    assert postprocess.clean("x = 1  \n", around("█\n")) == ("x = 1", None)
    loop = "abc(1), " * 8
    assert postprocess.clean(loop, around("█\n"))[0] == loop.rstrip()
    assert len(postprocess.clean(loop, around("█\n"), cut_short=True)[0]) < 20
    assert postprocess.clean("", around("█")) == ("", None)


def test_a_stop_found_early_is_the_stop_found_late() -> None:
    # Whatever is told while the text grows must hold when it has grown: nothing that was cut comes back.
    for case in STOPS["block"]:
        rules = stopping.rules_for(around(case["at"]), multiline=True, max_lines=BLOCK_LINES)
        text = case["wrote"]
        first = next((stop for end in range(len(text) + 1) if (stop := stopping.find_stop(text[:end], rules))), None)
        whole = stopping.find_stop(text, rules)
        assert first == whole or (first and whole and first.end == whole.end)


def test_stop_strings() -> None:
    assert stopping.find_stop_string("abc END def", ["x", "END", "c E"]) == 2
    assert stopping.find_stop_string("abc", ["END", ""]) is None
    assert stopping.held_back("abc EN", ["END"]) == 2
    assert stopping.held_back("abc END", ["ENDE", "D!"]) == 3
    assert stopping.held_back("abc", ["END"]) == 0
    assert stopping.held_back("abc", []) == 0
