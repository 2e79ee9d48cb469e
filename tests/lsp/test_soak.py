"""How the memory of some processes grew."""

import pytest

from lsp.keystrokes.ours import is_stale
from lsp.keystrokes.soak import growth, holds

MIB = 1 << 20


def test_growth_is_from_when_memory_had_settled_to_the_end() -> None:
    samples = [(float(at), {1: (50 if at < 10 else 100 if at < 55 else 103) * MIB, 2: 200 * MIB}) for at in range(60)]
    assert growth(samples, 60) == {"memory_growth": 0.01, "worst_growth": 0.03, "memory_mib": 303.0, "vanished": 0}


def test_processes_that_came_or_went_are_left_out() -> None:
    samples = [(float(at), {1: 100 * MIB} | ({3: MIB} if at > 50 else {4: MIB})) for at in range(60)]
    assert growth(samples, 60)["memory_growth"] == 0.0
    assert growth(samples, 60)["vanished"] == 1
    assert growth([], 60)["memory_growth"] is None
    gone = growth([(12.0, {1: MIB, 2: MIB})], 60)
    assert (gone["memory_growth"], gone["vanished"]) == (None, 2)


GOOD = {"minutes": 30.0, "keys": 1000, "shown": 100, "memory_growth": 0.04, "unanswered": 0, "unfit": 0, "vanished": 0}


@pytest.mark.parametrize(
    "bad", [{"memory_growth": 0.06}, {"shown": 99}, {"unanswered": 1}, {"unfit": 1}, {"vanished": 1}]
)
def test_what_must_hold(bad: dict[str, float]) -> None:
    assert holds(GOOD)
    assert not holds(GOOD | bad)
    assert not holds({**GOOD, "memory_growth": None})  # not measured is not held
    assert holds({**GOOD, "minutes": 0.5, "memory_growth": 0.5, "shown": 0})


@pytest.mark.parametrize(
    ("ghost", "seen", "typed", "stale"),
    [
        ("foo", "foo", "f", True),
        ("oo", "foo", "f", False),
        ("foo", "foo", "x", False),  # asked for anew
        ("foo", "foo", "", False),
        ("---", "---", "-", False),
        ("", "foo", "f", False),
    ],
)
def test_text_from_before_the_key_is_stale(ghost: str, seen: str, typed: str, stale: bool) -> None:
    assert is_stale(ghost, seen, typed) is stale
