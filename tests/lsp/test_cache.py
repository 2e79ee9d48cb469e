"""What a cache knows of texts that are typed through, grow, and are gone back from."""

from hypothesis import given
from hypothesis import strategies as st

from lsp.cache import Cache, Key

KEY: Key = ("import os\n", "\n")


def known(cache: Cache, live: str, text: str, key: Key = KEY) -> None:
    entry = cache.add(key, live)
    entry.settle(len(live), text)
    entry.growing = False


@given(st.text("ab\n", max_size=4), st.text("ab\n", min_size=1, max_size=12))
def test_every_rest_of_a_text_is_found(live: str, text: str) -> None:
    cache = Cache()
    known(cache, live, text)
    for typed in range(len(text)):
        entry = cache.find(KEY, live + text[:typed])
        assert entry is not None
        assert entry.piece(live + text[:typed]) == text[typed:]


def test_what_was_typed_otherwise_or_elsewhere_is_not_found() -> None:
    cache = Cache()
    known(cache, "x = ", "foo(1)")
    assert cache.find(KEY, "x = bar") is None
    assert cache.find(KEY, "x = foo(1) ") is None
    assert cache.find(("import re\n", "\n"), "x = ") is None
    assert cache.find(("import os\n", "\nfoo"), "x = ") is None


def test_text_that_was_deleted_is_not_offered_again() -> None:
    cache = Cache()
    known(cache, "x = ", "foo(1)")
    assert cache.find(KEY, "x =") is None


def test_a_slip_is_gone_back_from() -> None:
    cache = Cache()
    known(cache, "x = ", "foo(1)")
    known(cache, "x = fi", "nd()")
    entry = cache.find(KEY, "x = f")
    assert entry is not None
    assert entry.piece("x = f") == "oo(1)"


def test_the_text_asked_for_last_counts() -> None:
    cache = Cache()
    known(cache, "x = ", "foo(1)")
    known(cache, "x = fo", "rm()")
    entry = cache.find(KEY, "x = fo")
    assert entry is not None
    assert entry.piece("x = fo") == "rm()"


def test_pieces_are_shown_one_after_the_other() -> None:
    cache = Cache()
    entry = cache.add(KEY, "x = ")
    entry.settle(4, "1", "\ny = 2")
    assert entry.piece("x = ") == "1"
    assert entry.piece("x = 1") == "\ny = 2"
    entry.settle(len(entry.text), "\nz = 3")
    assert entry.piece("x = 1\ny = 2") == "\nz = 3"
    assert entry.piece("x = 1\ny") == " = 2"


def test_a_growing_text_is_joined_by_what_is_typed_ahead_of_it() -> None:
    entry = Cache().add(KEY, "x = ")
    assert entry.fits("x = fo")
    assert not entry.is_settled("x = ")
    entry.text += "f"
    assert entry.fits("x = fo")
    assert not entry.fits("x = bar")
    entry.growing = False
    assert not entry.fits("x = fo")


def test_entries_move_with_the_anchor() -> None:
    cache = Cache()
    known(cache, "a = 1\nb = ", "2")
    known(cache, "q", "r")
    below: Key = ("import os\na = 1\n", "\n")
    cache.move(KEY, below, "a = 1\n")
    entry = cache.find(below, "b = ")
    assert entry is not None
    assert entry.piece("b = ") == "2"
    assert cache.find(below, "q") is None


def test_old_places_and_texts_are_forgotten() -> None:
    cache = Cache()
    for number in range(100):
        known(cache, "x", "y", (str(number), ""))
        known(cache, f"{number} ", "y")
    assert cache.find(("0", ""), "x") is None
    assert cache.find(("99", ""), "x") is not None
    assert cache.find(KEY, "0 ") is None
    assert cache.find(KEY, "99 ") is not None
