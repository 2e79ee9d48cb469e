"""Guesses from what the text says already: which, and how long."""

from hypothesis import given
from hypothesis import strategies as st

from agent.engines.drafts import (
    LENGTHS,
    LONGEST_MATCH,
    Acceptance,
    Costs,
    Draft,
    History,
    accepted_length,
    worthwhile_length,
)


def test_what_followed_before() -> None:
    assert History([1, 2, 3, 4, 5, 1, 2]).draft(3) == Draft((3, 4, 5), 2)


def test_the_longest_match_counts_and_then_the_latest() -> None:
    assert History([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2]).draft(1) == Draft((3,), 3)  # "9 1 2", not the later "1 2"
    assert History([1, 2, 3, 7, 1, 2, 4, 7, 1, 2]).draft(1) == Draft((4,), 3)
    assert History([1, 2, 3, 8, 1, 2, 4, 9, 1, 2]).draft(1) == Draft((4,), 2)


def test_nothing_to_go_by() -> None:
    for text in ([], [1], [1, 2], [1, 2, 3, 4], [2, 2]):
        assert History(text).draft(4) == Draft()
    assert History([1, 2, 3, 1, 2]).draft(0) == Draft()


def test_a_pattern_goes_on() -> None:
    assert History([5, 1, 2, 1, 2]).draft(5).ids == (1, 2, 1, 2, 1)
    assert History([7, 7, 7]).draft(4).ids == (7, 7, 7, 7)


def test_what_stood_there_before_is_the_draft_while_it_comes_true() -> None:
    history = History([1, 2])
    history.expect([3, 4, 5])
    assert history.draft(2) == Draft((3, 4), LONGEST_MATCH)
    history.extend([3])
    assert history.draft(5) == Draft((4, 5), LONGEST_MATCH)
    history.extend([9])
    assert history.draft(5) == Draft()
    history.expect([3, 4])
    history.extend([3, 4, 5])
    assert history.draft(1) == Draft()


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6))
def test_it_is_what_a_search_of_everything_finds(text: list[int], most: int) -> None:
    best, matched = 0, 0
    for place in range(2, len(text)):
        length = 0
        while length < min(place, LONGEST_MATCH) and text[place - 1 - length] == text[len(text) - 1 - length]:
            length += 1
        if length >= max(2, matched):
            best, matched = place, length
    draft = History(text).draft(most)
    assert draft.matched == matched
    if matched:
        grown = list(text)
        for index in range(most):
            grown.append(grown[best + index])
        assert draft.ids == tuple(grown[len(text) :])


def test_how_much_of_a_draft_holds() -> None:
    assert accepted_length((1, 2, 3), (1, 2, 4, 9)) == 2
    assert accepted_length((1, 2), (1, 2, 3)) == 2
    assert accepted_length((), (1,)) == 0


def test_acceptance_is_learnt_by_the_length_of_the_match() -> None:
    acceptance = Acceptance()
    before = acceptance.rate(16)
    for _ in range(40):
        acceptance.learn(2, accepted=0, drafted=3)
    assert acceptance.rate(2) < 0.02
    assert acceptance.rate(16) == before
    for _ in range(40):
        acceptance.learn(2, accepted=3, drafted=3)
    assert acceptance.rate(2) > 0.98


def timed(**seconds: float) -> Costs:
    costs = Costs()
    for name, each in seconds.items():
        for _ in range(2):  # the first of a size is not counted
            costs.timed(int(name[1:]), each)
    return costs


def test_costs_are_ratios_and_the_first_pass_of_a_size_is_not_counted() -> None:
    costs = Costs()
    costs.timed(1, 9.0)
    costs.timed(4, 9.0)
    assert costs.ratio(4) == 1.0
    assert timed(n1=0.1, n4=0.2).ratio(4) == 2.0
    costs.timed(5, 1.0)  # no length that is drafted
    assert costs.ratio(5) == 1.0


def test_a_size_that_was_slow_is_tried_again_some_day() -> None:
    costs = timed(n1=0.1, n8=0.8)
    for _ in range(2000):
        costs.timed(1, 0.1)
    assert costs.ratio(8) < 1.1


def test_a_draft_is_as_long_as_it_pays() -> None:
    draft, acceptance = Draft(tuple(range(15)), LONGEST_MATCH), Acceptance()
    for _ in range(100):
        acceptance.learn(LONGEST_MATCH, accepted=15, drafted=15)
    assert worthwhile_length(draft, acceptance, Costs()) == 15
    # On two cores in float32: 122 ms for one token, 232 for two, 215 for four, 195 for eight, 240 for sixteen.
    costs = timed(n1=0.122, n2=0.232, n4=0.215, n8=0.195, n16=0.24)
    assert worthwhile_length(draft, acceptance, costs) == 15
    for _ in range(100):
        acceptance.learn(LONGEST_MATCH, accepted=2, drafted=15)
    assert worthwhile_length(draft, acceptance, costs) == 7
    for _ in range(100):
        acceptance.learn(LONGEST_MATCH, accepted=0, drafted=15)
    assert worthwhile_length(draft, acceptance, costs) == 0
    assert worthwhile_length(Draft(), acceptance, costs) == 0


def test_where_a_pass_costs_what_its_tokens_cost_nothing_is_drafted() -> None:
    acceptance = Acceptance()
    costs = timed(n1=0.1, **{f"n{1 + length}": 0.1 * (1 + length) for length in LENGTHS})
    assert worthwhile_length(Draft(tuple(range(15)), LONGEST_MATCH), acceptance, costs) == 0
