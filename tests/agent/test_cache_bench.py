"""When two continuations count as the same."""

from agent.cache_bench import Step, verdict


def steps(*ids: int) -> list[Step]:
    return [Step(each, {each: -0.1}) for each in ids]


def test_the_same_tokens() -> None:
    assert verdict(steps(1, 2, 3), steps(1, 2, 3)) == "same"
    assert verdict([], []) == "empty"


def test_a_near_tie_at_the_first_difference() -> None:
    one = [*steps(1), Step(2, {2: -0.70, 3: -0.73}), *steps(9, 9)]
    other = [*steps(1), Step(3, {3: -0.69, 2: -0.72}), *steps(8, 8)]
    assert verdict(one, other) == "near_tie"


def test_another_token() -> None:
    one = [*steps(1), Step(2, {2: -0.1, 3: -2.4})]
    assert verdict(one, [*steps(1), Step(3, {3: -0.2, 2: -2.5})]) == "different"
    assert verdict(one, [*steps(1), Step(3, {3: -0.2})]) == "different"  # 0.05 nats in neither
    assert verdict(one, steps(1, 4)) == "different"  # not even among the likeliest


def test_an_end_that_came_sooner() -> None:
    assert verdict(steps(1, 2), steps(1)) == "different"
