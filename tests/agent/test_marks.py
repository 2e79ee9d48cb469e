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
    "<end_of_turn>",
    "<fim-prefix>",
    "<fim_pad>",
    "<reponame>",
    "<PRE>",
    "<EOT>",
    "[SUFFIX]",
    "[PREFIX]",
    "[MIDDLE]",
    "<tool_call>",
    "</tool_call>",
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
        "std::vector<size_t> v; std::map<uint64_t, std::vector<my_type_t>> m; static_cast<ssize_t>(n)",
        "int buf[N]; buf[MAX_SIZE] = table[ROWS][COLS]; grid[A][B_C]",
        "let b: Box<[u8]> = x; fn f<K, V>() -> Vec<my_type> { a::<[u8]>(b) } const X: &[T] = &[];",
        "List<K> ks; Map<KEY, VALUE> m; List<? extends E> es; Class<END> c;",
        "const a: Array<string> = []; type P = Promise<snake_case>; x[KEY] as Record<K, V>; Set<EOD>",
        "#include <sys_types.h>\n#include <my_header>",
        "<my_component></my_component><Foo/>",
        "if [[ $A == B ]]; then echo ${A[I]} [OPTIONS]; fi",
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
