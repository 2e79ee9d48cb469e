"""The text buffer against a reference that works on encoded bytes, and knows nothing of ours."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp.documents import Cell, Change, Document, Library, Notebook, Place, Units, length
from tests.conftest import count

CODEC = {Units.UTF8: ("utf-8", 1), Units.UTF16: ("utf-16-le", 2), Units.UTF32: ("utf-32-le", 4)}

PIECES = ["a", "b", " ", "\n", "\r", "\r\n", "\u2028", "\x0c", "\x85", "é", "語", "𝄞", "🙂"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
PLACE = st.tuples(st.integers(0, 8), st.integers(0, 14))
EDIT = st.tuples(PLACE, PLACE, TEXT)


class Reference:
    """A document as a list of lines of bytes, each with its end beside it."""

    def __init__(self, text: str, units: Units) -> None:
        self.codec, self.width = CODEC[units]
        self.units = units
        self.lines = [
            (found[1].encode(self.codec), found[2]) for found in re.finditer(r"([^\r\n]*)(\r\n|\n|\r|$)", text)
        ]
        if len(self.lines) > 1 and self.lines[-1] == (b"", "") and not self._ends_open(text):
            self.lines.pop()

    @staticmethod
    def _ends_open(text: str) -> bool:
        return text.endswith(("\n", "\r"))

    def text_before(self, line: int, character: int) -> str:
        """The text before a place, which is moved to the end of its line, or of the text, and out of characters."""
        if line >= len(self.lines):
            return self.whole()
        before = "".join(body.decode(self.codec) + end for body, end in self.lines[:line])
        part = self.lines[line][0][: character * self.width]
        return before + self._whole_characters(part)

    def _whole_characters(self, part: bytes) -> str:
        while True:
            try:
                return part.decode(self.codec)
            except UnicodeDecodeError:
                part = part[: -self.width]

    def whole(self) -> str:
        return "".join(body.decode(self.codec) + end for body, end in self.lines)


@settings(max_examples=count(3000), deadline=None)
@given(st.sampled_from(Units), TEXT, st.lists(EDIT, max_size=6))
def test_random_edits_give_what_the_reference_gives(
    units: Units, text: str, edits: list[tuple[tuple[int, int], tuple[int, int], str]]
) -> None:
    document = Document.opened("file:///a", "python", 0, text, units)
    for version, (one, other, new) in enumerate(edits):
        reference = Reference(document.text, units)
        assert reference.whole() == document.text
        start, end = sorted([one, other])
        first, last = sorted([reference.text_before(*start), reference.text_before(*end)], key=len)
        expected = first + new + document.text[len(last) :]
        document = document.changed(version, [Change(new, start, end)])
        assert document.text == expected
        assert document.version == version
        assert document.n_lines == len(Reference(expected, units).lines)


@settings(max_examples=count(3000), deadline=None)
@given(st.sampled_from(Units), TEXT)
def test_every_place_is_found_again(units: Units, text: str) -> None:
    document = Document.opened("file:///a", "python", 0, text, units)
    assert document.between(Place(0, 0), document.end) == text
    for number in range(document.n_lines):
        for column in range(len(document.line(number)) + 1):
            place = Place(number, column)
            assert document.place(number, document.character(place)) == place
            before = document.between(Place(0, 0), place)
            assert before + document.between(place, document.end) == text
            assert before == "".join(document.lines[:number]) + document.line(number)[:column]


@settings(max_examples=count(1000), deadline=None)
@given(st.sampled_from(Units), TEXT)
def test_lengths(units: Units, text: str) -> None:
    codec, width = CODEC[units]
    assert length(text, units) == len(text.encode(codec)) // width


def opened(text: str, units: Units = Units.UTF16) -> Document:
    return Document.opened("file:///a.py", "python", 1, text, units)


def test_python_knows_more_line_ends_than_the_protocol() -> None:
    document = opened("a\x0cb\u2028c\x85d\ne")
    assert document.n_lines == 2
    assert document.line(0) == "a\x0cb\u2028c\x85d"
    assert document.changed(2, [Change("X", (1, 0), (1, 1))]).text == "a\x0cb\u2028c\x85d\nX"


@pytest.mark.parametrize(("units", "character"), [(Units.UTF8, 4), (Units.UTF16, 2), (Units.UTF32, 1)])
def test_a_character_beyond_the_basic_plane(units: Units, character: int) -> None:
    document = opened("𝄞x", units)
    assert document.place(0, character) == Place(0, 1)
    assert document.character(Place(0, 1)) == character
    if character > 1:
        assert document.place(0, character - 1) == Place(0, 0)


def test_places_beyond_the_text_are_moved_to_its_end() -> None:
    document = opened("ab\r\ncd")
    assert document.place(0, 99) == Place(0, 2)
    assert document.place(1, 99) == Place(1, 2)
    assert document.place(9, 0) == Place(1, 2)
    assert document.place(-1, 5) == Place(0, 0)
    assert document.place(0, -5) == Place(0, 0)


def test_several_changes_see_one_another() -> None:
    document = opened("a\nb\n")
    changed = document.changed(7, [Change("x\n", (0, 0), (0, 0)), Change("Y", (1, 0), (1, 1))])
    assert (changed.text, changed.version) == ("x\nY\nb\n", 7)
    assert document.text == "a\nb\n"
    assert changed.changed(8, [Change("new")]).text == "new"


def library() -> Library:
    made = Library()
    cells = [
        ("one", "python", "import os\n"),
        ("two", "markdown", "# Plan\nsum it"),
        ("three", "python", "x = 1"),
        ("four", "python", "print(x)"),
    ]
    for name, language, text in cells:
        made.documents[f"c:{name}"] = Document.opened(f"c:{name}", language, 1, text, Units.UTF16)
    made.notebooks["n"] = Notebook("n", tuple(Cell(f"c:{name}", language == "python") for name, language, _ in cells))
    return made


def test_the_other_cells_are_the_text_around_a_cell() -> None:
    made = library()
    above, below = made.around(made.documents["c:three"])
    assert above == "import os\n\n# # Plan\n# sum it\n\n"
    assert below == "\n\nprint(x)\n\n"
    assert made.around(made.documents["c:one"])[0] == ""
    assert made.around(opened("x")) == ("", "")


def test_cells_come_and_go() -> None:
    book = Notebook("n", (Cell("a", True), Cell("b", True)))
    assert [cell.uri for cell in book.spliced(1, 1, [Cell("c", True), Cell("d", False)]).cells] == ["a", "c", "d"]
    assert [cell.uri for cell in book.spliced(9, 9, [Cell("e", True)]).cells] == ["a", "b", "e"]
