"""Filters and stop rules against golden cases, the cursor drawn in the text."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent import filters, postprocess, stopping
from agent.context import Surroundings, surroundings
from agent.types import StopReason

FOLDER = Path(__file__).parents[1] / "golden"
FILTERS = tomllib.loads((FOLDER / "postprocess.toml").read_text(encoding="utf-8"))
STOPS = tomllib.loads((FOLDER / "stopping.toml").read_text(encoding="utf-8"))
PIPELINES = (*postprocess.BEFORE_CACHE, *postprocess.AFTER_CACHE)
BLOCK_LINES = 6


def around(drawn: str) -> Surroundings:
    prefix, cursor, suffix = drawn.partition("█")
    assert cursor, "a case draws its cursor"
    return surroundings(prefix, suffix)


def cases(golden: dict[str, Any], *names: str) -> list[Any]:
    return [pytest.param(name, case, id=f"{name}: {case['name']}") for name in names for case in golden[name]]


@pytest.mark.parametrize(("name", "case"), cases(FILTERS, *(run.__name__ for run in PIPELINES)))
def test_filter(name: str, case: dict[str, Any]) -> None:
    run = getattr(filters, name)
    kept = case.get("kept", case["wrote"])
    assert run(case["wrote"], around(case["at"])) == kept
    assert run(kept, around(case["at"])) == kept, "what is left is left the next time, too"


def test_every_filter_has_eight_cases_and_some_where_it_does_nothing() -> None:
    for run in PIPELINES:
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


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in STOPS["block"] if "kept" in case])
def test_what_was_stopped_within_its_scope_is_within_it(case: dict[str, Any]) -> None:
    assert filters.limit_scope(case["kept"], around(case["at"])) == case["kept"]


def test_clean_is_both_pipelines_in_order() -> None:
    here = around("if (a) {\n  █\n}\n")
    settled, dropped_by = postprocess.settle("b()\n}  \n", here, cut_short=False)
    assert (settled, dropped_by) == ("b()\n}", None)
    assert postprocess.present(settled, here) == ("b()", None)
    assert postprocess.clean("b()\n}  \n", here) == ("b()", None)
    assert postprocess.clean("})", around("foo({\n█\n})\n")) == ("", "cut_duplicate_closers")


def test_one_text_is_shown_at_several_places() -> None:
    # The editor closes the brace, Enter puts it on a line of its own, the user types the first line.
    settled = "\n    if x {\n        y()\n    }\n}"
    for drawn, remains, shown in [
        ("func f() {█}\n", settled, "\n\tif x {\n\t\ty()\n\t}\n"),
        ("func f() {\n\t█\n}\n", settled[5:], "if x {\n\t\ty()\n\t}"),
        ("func f() {\n\tif x█\n}\n", settled[9:], " {\n\t\ty()\n\t}"),
        ("func f() {\n\tif x {\n\t\t█\n\t}\n}\n", settled[20:], "y()"),
    ]:
        assert postprocess.present(remains, around("func g() {\n\tz()\n}\n\n" + drawn)) == (shown, None)


def test_a_remainder_of_one_character_is_shown() -> None:
    assert postprocess.settle(")", around("foo(█\n"), cut_short=False) == ("", "drop_invisible")
    assert postprocess.present(")", around("foo(a█\n")) == (")", None)


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
