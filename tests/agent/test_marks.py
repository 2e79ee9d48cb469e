import pytest

from agent import fim
from agent.engines import marks

TEMPLATES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "<s>",
    "</s>",
    "<start_of_turn>",
)
ALL = sorted(
    {
        *TEMPLATES,
        *(mark for fmt in fim.FORMATS.values() if fmt is not fim.SUFFIX for mark in (*fmt.sentinels(), *fmt.stops)),
    }
)


@pytest.mark.parametrize("mark", ALL)
def test_every_known_mark_is_broken(mark: str) -> None:
    text = f"a{mark}b {mark}{mark}\n{mark}"
    broken = marks.broken(text)
    assert mark.removeprefix("▁") not in broken
    assert broken.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    "code",
    [
        "x = [INSTANCES[0]] + a[i][j] < b > c",
        "<div class='a'><p>text</p></div>",
        "std::vector<int> v; Map<String, List<T>> m;",
        "a <| b |> c; if (x < y || y > z) {}",
        "use std::io; fn f<'a, T>(x: &'a T) -> Option<T> {}",
        "cat <file >out; echo <<EOF",
    ],
)
def test_code_is_left_as_it_stands(code: str) -> None:
    assert marks.broken(code) == code


def test_a_text_is_cut_within_its_marks_and_nowhere_else() -> None:
    assert marks.parts("a<|x|>b<|x|>", "<|x|>") == ["a<", "|x|>b<", "|x|>"]
    assert marks.parts("nothing", "<|x|>") == ["nothing"]
    assert marks.parts("<|x|", " <|x|> ") == ["<|x|"]


@pytest.mark.parametrize(
    ("token", "may_be"),
    [
        ("<|im_end|>", True),
        (" <s>", True),
        ("[INST]", True),
        ("<div>", True),
        ("[i]", False),
        (" <", False),
        ("->", False),
        ("<>", False),
    ],
)
def test_tokens_that_look_like_marks(token: str, may_be: bool) -> None:
    assert marks.may_be_special(token) is may_be
