import pytest

from agent.context import surroundings
from lsp.triggers import Patience, Rhythm, Shown, is_in_the_way

KEY = ("", "")


@pytest.mark.parametrize(
    ("drawn", "in_the_way"),
    [
        ("x = █\ny", False),
        ("foo(█)", False),
        ("foo(█):  ", False),
        ("foo(█, b)", False),
        ("fo█o", True),
        ("█x", True),
        ("x = █ + 1", False),
        ("x = █ if long else other", True),
        ("d[█]", False),
        ("█\nfoo", False),
    ],
)
def test_places_where_ghost_text_would_be_in_the_way(drawn: str, in_the_way: bool) -> None:
    prefix, _, suffix = drawn.partition("█")
    assert is_in_the_way(surroundings(prefix, suffix)) is in_the_way


def test_an_idle_engine_is_not_waited_for() -> None:
    rhythm = Rhythm()
    now = 0.0
    for _ in range(50):
        now += 0.2
        rhythm.key(now)
        rhythm.first_text(0.1)
    assert rhythm.wait_s() == 0


def test_a_busy_engine_is_asked_in_pauses_only() -> None:
    rhythm = Rhythm()
    now = 0.0
    for _ in range(50):
        now += 0.2
        rhythm.key(now)
        rhythm.first_text(2.0)
    assert rhythm.wait_s() == pytest.approx(0.2, abs=0.01)
    now += 100
    rhythm.key(now)  # a pause is no rhythm
    assert rhythm.wait_s() == pytest.approx(0.2, abs=0.01)


def test_patience_grows_with_rejections_and_comes_back() -> None:
    patience = Patience()
    assert patience.wait_s(0) == 0
    patience.rejected("x", "1", 0)
    assert patience.wait_s(0) == 0  # one may be a matter of taste
    for _ in range(4):
        patience.rejected("x", "1", 0)
    held = patience.wait_s(0)
    assert 0.03 < held <= 0.06
    assert patience.wait_s(3600) < 0.01
    for _ in range(8):
        patience.accepted(3600)
    assert patience.wait_s(3600) == 0


def test_what_was_rejected_is_remembered_for_its_place_and_for_a_while() -> None:
    patience = Patience()
    patience.rejected("x = ", "foo", 0)
    assert patience.was_rejected("x = ", "foo")
    assert not patience.was_rejected("y = ", "foo")
    assert not patience.was_rejected("x = ", "bar")
    for number in range(20):
        patience.rejected("z", str(number), 0)
    assert not patience.was_rejected("x = ", "foo")


@pytest.mark.parametrize(
    ("live", "after_s", "fate"),
    [
        ("x = foo", 2, True),
        ("x = foo(1)", 2, True),
        ("x = fo", 2, None),
        ("x = b", 2, False),
        ("x = b", 0.2, None),  # not read yet
        ("x =", 2, None),
        ("x = ", 2, None),
    ],
)
def test_the_fate_of_a_text(live: str, after_s: float, fate: bool | None) -> None:
    assert Shown(KEY, "x = ", "foo", 10).fate(KEY, live, 10 + after_s) is fate
    assert Shown(KEY, "x = ", "foo", 10).fate(("other", ""), live, 10 + after_s) is None
