import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import context
from agent.context import surroundings

TEXT = st.text(st.sampled_from("ab(\n\t \x0c\u2028é𝄞"), max_size=200)


@given(TEXT, TEXT)
def test_surroundings_lose_nothing(prefix: str, suffix: str) -> None:
    around = surroundings(prefix, suffix)
    assert around.head + around.live == prefix
    assert not around.head or around.head.endswith("\n")
    assert "\n" not in around.live
    # A rest of closers loses the blank space at its end, nothing else.
    rebuilt = around.closers + around.suffix
    assert rebuilt.replace(" ", "").replace("\t", "") == suffix.replace(" ", "").replace("\t", "")


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_become_newlines(end: str) -> None:
    around = surroundings(f"a{end}b", f"c{end}d")
    assert (around.head, around.live, around.suffix) == ("a\n", "b", "c\nd")


@pytest.mark.parametrize(
    ("rest", "is_closers"),
    [
        (")", True),
        (")):", True),
        ('")', True),
        ("  )  ", True),
        ("];", True),
        ("x)", False),
        ("", False),
        (") + 1", False),
    ],
)
def test_a_rest_of_closers_is_left_out_of_the_prompt(rest: str, is_closers: bool) -> None:
    around = surroundings("f(", f"{rest}\nnext\n")
    assert bool(around.closers) == is_closers
    assert around.suffix == ("\nnext\n" if is_closers else f"{rest}\nnext\n")


def test_an_anchor_above_the_line_keeps_more_text_live() -> None:
    around = surroundings("a\nb\nc", "", anchor=2)
    assert (around.head, around.live, around.cursor_line) == ("a\n", "b\nc", "c")


@given(TEXT.filter(lambda text: len(text) > 2), st.integers(1, 50))
def test_shorter_texts_are_shorter_and_keep_what_is_near(text: str, budget: int) -> None:
    n_tokens = max(len(text), budget + 1)
    head = context.shorter_head(text, n_tokens, budget)
    assert text.endswith(head)
    assert len(head) < len(text)
    tail = context.shorter_tail(text, n_tokens, budget)
    assert text.startswith(tail)
    assert len(tail) < len(text)


def test_a_prefix_loses_whole_blocks_so_that_its_start_stays_put() -> None:
    lines = [f"line {number}\n" for number in range(100)]
    starts = set()
    for length in range(64, 80):
        text = "".join(lines[:length])
        starts.add(context.shorter_head(text, length * 4, 200).partition("\n")[0])
    assert len(starts) <= 2
    assert all(int(start.split()[1]) % context.BLOCK_LINES == 0 for start in starts)


@pytest.mark.parametrize(
    "path", [".env", "a/.env.local", "prod.env", "server.pem", "id_rsa", ".ssh/id_ed25519", "C:\\keys\\a.key", ".npmrc"]
)
def test_files_with_secrets_are_known_by_name(path: str) -> None:
    assert context.is_secret(path)


@pytest.mark.parametrize("path", ["main.py", "environment.py", "keys.py", "docs/env.md", "secret_santa.py"])
def test_other_files_are_not_taken_for_them(path: str) -> None:
    assert not context.is_secret(path)


@pytest.mark.parametrize(
    ("drawn", "wanted"),
    [
        ("def f():\n    █\n", True),
        ("def f():█\n", True),
        ("int f() {█\n", True),
        ("x = █\n", False),
        ("def f():\n    x = 1\n    █\n\ndef g():\n", True),
        ("    foo(█)\n", False),
        ("import os\n█\n", False),
        ("def f():\n    █x\n", False),
        ("def f():\n    a = 1\n    █\n    return a\n", False),
    ],
)
def test_where_a_block_is_wanted(drawn: str, wanted: bool) -> None:
    prefix, _, suffix = drawn.partition("█")
    assert context.wants_block(surroundings(prefix, suffix)) is wanted
