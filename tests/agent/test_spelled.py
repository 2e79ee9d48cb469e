from hypothesis import given
from hypothesis import strategies as st

from agent import fim
from agent.engines.spelled import Spelling

MARKS = ("<|fim_prefix|>", "<|fim_middle|>")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(TEXT)
def test_ids_spell_the_text(text: str) -> None:
    spelling = Spelling(MARKS)
    tokens = spelling.tokens(text)
    assert "".join(token.text or "" for token in tokens) == text
    assert spelling.pieces([token.id for token in tokens]) == ([(text, False)] if text else [])
    assert all(0 < token.id < 1 << 60 for token in tokens)


@given(TEXT, TEXT)
def test_marks_are_one_token_and_only_where_they_are_meant(before: str, behind: str) -> None:
    spelling = Spelling(MARKS)
    (mark,) = spelling.tokens(MARKS[0], special=True)
    assert mark.id < 1 << 63
    plain = spelling.tokens(before + MARKS[0] + behind)
    assert mark.id not in [token.id for token in plain]
    ids = [*(token.id for token in spelling.tokens(before)), mark.id, *(token.id for token in spelling.tokens(behind))]
    wanted = [(before, False), (MARKS[0], True), (behind, False)]
    assert spelling.pieces(ids) == [piece for piece in wanted if piece[0]]


def test_what_is_no_mark_is_spelled_even_where_marks_are_allowed() -> None:
    spelling = Spelling(fim.SUFFIX.sentinels())
    assert len(spelling.tokens("<|fim_prefix|>", special=True)) > 1
    assert spelling.mark("<|fim_prefix|>") is None


def test_code_has_a_token_for_each_word_or_sign_or_so() -> None:
    code = "def area(width, height):\n    return width * height\n\n\nfor row in csv.DictReader(file):\n    print(row)\n"
    assert 20 <= len(Spelling(()).tokens(code)) <= 45


def test_halves_of_surrogate_pairs_do_not_break_it() -> None:
    spelling = Spelling(())
    assert spelling.pieces([token.id for token in spelling.tokens("a\ud800b")]) == [("a?b", False)]
