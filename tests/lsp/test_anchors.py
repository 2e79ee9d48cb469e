"""Anchors: what is typed makes the live text longer, and nothing else moves."""

import random

import pytest

from lsp.anchors import LIVE_CHARS, Anchor, Around, Window, anchored
from lsp.documents import Change, Document, Place, Units


def opened(text: str) -> Document:
    return Document.opened("file:///a.py", "python", 1, text, Units.UTF16)


def drawn(text: str) -> tuple[Document, Place]:
    before, _, behind = text.partition("█")
    lines = before.split("\n")
    return opened(before + behind), Place(len(lines) - 1, len(lines[-1]))


def typed(document: Document, place: Place, text: str) -> tuple[Document, Place]:
    at = (place.line, place.column)
    after = document.changed(document.version + 1, [Change(text, at, at)])
    *above, last = text.split("\n")
    return after, Place(place.line + len(above), len(last) + (0 if above else place.column))


def test_typing_and_new_lines_only_append_to_the_live_text() -> None:
    document, place = drawn("import os\n\n\ndef f():\n    █\n\nprint(f())\n")
    first, cut = anchored(document, place, (), Around(), Window())
    assert (cut.head, cut.live, cut.suffix) == ("import os\n\n\ndef f():\n", "    ", "\n\nprint(f())\n")
    anchor = first
    for text in ("return", " 1", "\n    ", "x"):
        document, place = typed(document, place, text)
        anchor, cut = anchored(document, place, (anchor,), Around(), Window())
    assert anchor is first
    assert cut.live == "    return 1\n    x"


def test_what_is_typed_in_a_long_document_leaves_the_end_of_the_text_behind_where_it_is() -> None:
    below = "".join(f"value_{number} = compute({number})\n" for number in range(400))
    document, place = drawn(f"import os\n\n    total = first + second█\n{below}")
    first, cut = anchored(document, place, (), Around(), Window())
    assert 1000 < len(cut.suffix) < len(below) // 2
    for text in ("\n    ", "x = ", "f(y)", "\n", "\n    return"):
        document, place = typed(document, place, text)
        assert anchored(document, place, (first,), Around(), Window())[0] is first


def test_the_first_anchor_that_holds_is_kept() -> None:
    document = opened("\n".join(f"line {number}" for number in range(200)))
    here, _ = anchored(document, Place(100, 3), (), Around(), Window())
    there, _ = anchored(document, Place(20, 7), (), Around(), Window())
    document, place = typed(document, Place(20, 7), "\nx")
    assert anchored(document, place, (here, there), Around(), Window())[0] is there


def test_cells_below_stand_behind_whole_text_only() -> None:
    document, place = drawn("█\n" + "x" * 5000)
    _, cut = anchored(document, place, (), Around(below="cells below"), Window())
    assert "cells below" not in cut.suffix


def test_closers_that_the_editor_inserted_leave_the_anchor_where_it_is() -> None:
    document, place = drawn("x = foo█\ny = 2\n")
    first, _ = anchored(document, place, (), Around(), Window())
    document, place = typed(document, place, "()")
    anchor, cut = anchored(document, Place(place.line, place.column - 1), (first,), Around(), Window())
    assert anchor is first
    assert (cut.live, cut.closers, cut.suffix) == ("x = foo(", ")", "\ny = 2\n")


def test_the_anchor_moves_with_jumps_changes_and_long_texts() -> None:
    text = "\n".join(f"line {number}" for number in range(200))
    document = opened(text)
    first, _ = anchored(document, Place(100, 8), (), Around(), Window())
    assert first.line == 100
    assert anchored(document, Place(90, 0), (first,), Around(), Window())[0].line == 90
    changed = document.changed(2, [Change("X", (80, 0), (80, 1))])
    assert anchored(changed, Place(100, 3), (first,), Around(), Window())[0] is not first
    changed = document.changed(2, [Change("X", (101, 0), (101, 1))])
    assert anchored(changed, Place(100, 3), (first,), Around(), Window())[0] is not first
    grown, place = typed(document, Place(100, 8), "\n" + "y" * LIVE_CHARS)
    assert anchored(grown, place, (first,), Around(), Window())[0] is not first


def test_a_long_line_keeps_its_anchor() -> None:
    document, place = drawn("word " * 300 + "█\nx = 1\n")
    first, _ = anchored(document, place, (), Around(), Window())
    document, place = typed(document, place, "more")
    assert anchored(document, place, (first,), Around(), Window())[0] is first


def test_nothing_is_glued_to_a_line_that_was_cut() -> None:
    document, place = drawn("█" + "x" * 5000 + "\ny = 1\n")
    assert "y" not in anchored(document, place, (), Around(), Window())[1].suffix


def test_head_and_live_text_are_the_text_before_the_cursor_wherever_it_is() -> None:
    rng = random.Random(5)
    document = opened("\r\n".join("a" * rng.randrange(40) for _ in range(300)))
    earlier: tuple[Anchor, ...] = ()
    for _ in range(200):
        place = document.place(rng.randrange(300), rng.randrange(40))
        anchor, cut = anchored(document, place, earlier, Around("cells above\n", "cells below"), Window())
        before = ("cells above\n" + document.between(Place(0, 0), place)).replace("\r\n", "\n")
        assert before.endswith(cut.head + cut.live)
        behind = (document.between(place, document.end) + "cells below").replace("\r\n", "\n")
        assert (cut.closers + cut.suffix).startswith(behind[: len(cut.suffix)])
        document, _ = typed(document, place, rng.choice(["x", "\r\n", "()", ""]))
        earlier = (anchor, *earlier[:1])


@pytest.mark.parametrize("width", [20, 40, 70, 90, 150, 400])
@pytest.mark.parametrize("window", [Window(), Window.of(128, 128), Window.of(1024, 512)])
def test_the_text_above_fills_the_window_wherever_the_cursor_is(width: int, window: Window) -> None:
    document = opened(("x" * (width - 1) + "\n") * 600)
    for line in (1, 63, 64, 65, 192, 194, 200, 255, 256, 599):
        _, cut = anchored(document, Place(line, 0), (), Around(), window)
        assert len(cut.head) >= min(line * width, window.above_chars)
        assert len(cut.suffix) >= min((599 - line) * width, window.behind_chars)
        assert len(cut.head) <= window.above_chars + 64 * width


def test_a_window_is_as_large_as_the_prompt() -> None:
    small, large = Window.of(16, 16), Window.of(2048, 1024)
    assert (small.above_chars, small.behind_chars) == (2000, 2000)
    assert (large.above_chars, large.behind_chars) == (24_576, 12_288)


def test_cells_of_a_notebook_stand_above_and_below() -> None:
    document, place = drawn("x = █\n")
    _, cut = anchored(document, place, (), Around("import os\n\n", "\n\nprint(x)\n"), Window())
    assert (cut.head, cut.live, cut.suffix) == ("import os\n\n", "x = ", "\n\n\nprint(x)\n")
