from agent import healing
from agent.engines.base import Alternative, Token
from agent.healing import Healed


def tokens(*texts: str | None) -> list[Token]:
    return [Token(number, text) for number, text in enumerate(texts)]


def test_the_word_is_taken_back_and_then_the_last_token_alone() -> None:
    assert healing.candidates(tokens("   ", " ret", "ur")) == (Healed((0,), " retur"), Healed((0, 1), "ur"))
    assert healing.candidates(tokens("x", " =", " ")) == (Healed((0, 1), " "),)
    assert healing.candidates(tokens("foo", "(")) == (Healed((0,), "("),)
    assert healing.candidates(tokens("self", ".na")) == (Healed((0,), ".na"),)
    assert healing.candidates([]) == ()


def test_a_long_word_is_taken_back_by_its_last_token_alone() -> None:
    assert healing.candidates(tokens(" a", "b", "c", "d", "e")) == (Healed((0, 1, 2, 3), "e"),)


def test_a_token_that_is_no_text_stays() -> None:
    assert healing.candidates(tokens("a", None)) == ()
    assert healing.candidates(tokens(None, "b")) == (Healed((0,), "b"),)


def test_the_likeliest_way_is_taken() -> None:
    others = [
        Alternative(1, "x", -0.1),
        Alternative(2, "", -0.2),
        Alternative(3, "u", -0.3),
        Alternative(4, "ur", -0.4),
    ]
    assert healing.way_to("ur", "", others) == others[2]
    assert healing.way_to("ur", "u", others) is None
    assert healing.way_to("ur", "u", [Alternative(5, "rn x", -1)]) is not None
