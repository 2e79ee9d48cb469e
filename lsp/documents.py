r"""The text of open documents and notebooks, and positions in it.

Lines end at "\r\n", "\n" or "\r" and at nothing else, as the protocol says; Python's splitlines() knows more, and so
does pygls's own workspace. Characters of a position count in the units that were agreed on with the client. Pure values:
a change makes a new `Document`, so that whoever holds one has a snapshot. Knows no server.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from lsp.lines import Lines

_LINE_END = re.compile(r"\r\n|\n|\r")


class Units(StrEnum):
    """What a position's character counts; the protocol's names."""

    UTF8 = "utf-8"
    UTF16 = "utf-16"
    UTF32 = "utf-32"


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a document's text."""

    text: str
    start: tuple[int, int] | None = None
    """Line and character where the replaced text begins; None where the whole text is replaced."""
    end: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A place in a document: a line, and characters of it, both from 0."""

    line: int
    column: int
    """Characters of Python's, whatever the client counts in."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document at one moment.

    Held as lines, so that a change in a long document copies references and not its text.
    """

    uri: str
    language: str
    version: int
    lines: Lines = field(repr=False)
    """Each with its end; the last one has none. Never empty."""
    units: Units = Units.UTF16

    @classmethod
    def opened(cls, uri: str, language: str, version: int, text: str, units: Units) -> "Document":
        """Return a document with its lines found."""
        return cls(uri, language, version, Lines(_split(text)), units)

    def changed(self, version: int, changes: Iterable[Change]) -> "Document":
        """Return the document after some changes, each of which sees the one before."""
        document = self
        for change in changes:
            if change.start is None or change.end is None:
                lines = Lines(_split(change.text))
            else:
                start, end = sorted((document.place(*change.start), document.place(*change.end)))
                lines = document._spliced(start, end, change.text)
            document = Document(self.uri, self.language, version, lines, self.units)
        return document

    @property
    def text(self) -> str:
        """The whole text; takes as long as the text is."""
        return "".join(self.lines)

    @property
    def n_lines(self) -> int:
        """Number of lines; an empty text has one."""
        return len(self.lines)

    @property
    def end(self) -> Place:
        """The place behind the last character."""
        return Place(len(self.lines) - 1, len(self.lines[-1]))

    @property
    def newline(self) -> str:
        """The end of the first line, which new ones shall have, too."""
        return "\r\n" if self.lines[0].endswith("\r\n") else "\n"

    def line(self, number: int) -> str:
        """Return a line without its end; empty beyond the text."""
        return self.lines[number].rstrip("\r\n") if 0 <= number < len(self.lines) else ""

    def between(self, start: Place, end: Place) -> str:
        """Return the text between two places."""
        if start.line == end.line:
            return self.lines[start.line][start.column : end.column]
        inner = self.lines[start.line + 1 : end.line]
        return "".join((self.lines[start.line][start.column :], *inner, self.lines[end.line][: end.column]))

    def place(self, line: int, character: int) -> Place:
        """Return the place of a position; one beyond a line or the text is moved to its end.

        A position within a character is moved to the character's beginning.
        """
        if line < 0:
            return Place(0, 0)
        if line >= len(self.lines):
            return self.end
        text = self.line(line)
        if character <= 0:
            return Place(line, 0)
        if self.units is Units.UTF32 or text.isascii():
            return Place(line, min(character, len(text)))
        return Place(line, _characters(text, character, self.units))

    def character(self, place: Place) -> int:
        """Return a place's character, in the client's units."""
        return length(self.lines[place.line][: place.column], self.units)

    def _spliced(self, start: Place, end: Place, text: str) -> Lines:
        first, last = start.line, end.line
        middle = self.lines[first][: start.column] + text + self.lines[last][end.column :]
        # "\r" and "\n" of two lines that came together are one end.
        if first and self.lines[first - 1].endswith("\r"):
            first -= 1
            middle = self.lines[first] + middle
        if middle.endswith("\r") and last + 1 < len(self.lines):
            last += 1
            middle += self.lines[last]
        changed = _split(middle)
        if last + 1 < len(self.lines):
            changed = changed[:-1]  # the empty line behind the last end is the line that follows
        return self.lines.replaced(first, last + 1, changed)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a notebook; its text is the document of its URI."""

    uri: str
    is_code: bool


@dataclass(frozen=True, slots=True)
class Notebook:
    """The order of a notebook's cells at one moment."""

    uri: str
    cells: tuple[Cell, ...]

    def spliced(self, start: int, delete_count: int, cells: Sequence[Cell]) -> "Notebook":
        """Return the notebook with some cells replaced."""
        kept = self.cells
        start = max(0, min(start, len(kept)))
        return Notebook(self.uri, (*kept[:start], *cells, *kept[start + max(0, delete_count) :]))


@dataclass(slots=True)
class Library:
    """All that is open in one editor."""

    documents: dict[str, Document] = field(default_factory=dict)
    notebooks: dict[str, Notebook] = field(default_factory=dict)

    def notebook_of(self, uri: str) -> Notebook | None:
        """Return the notebook that has a cell of that URI."""
        return next((book for book in self.notebooks.values() if any(cell.uri == uri for cell in book.cells)), None)

    def around(self, document: Document) -> tuple[str, str]:
        """Return the text of a notebook's cells above and below a cell; nothing for other documents.

        Code stands as it is, prose as comments, each cell followed by an empty line, so that the whole reads like one
        file.
        """
        book = self.notebook_of(document.uri)
        if book is None:
            return "", ""
        place = next(index for index, cell in enumerate(book.cells) if cell.uri == document.uri)
        above = "".join(self._cell_text(cell, document.language) for cell in book.cells[:place])
        below = "".join(self._cell_text(cell, document.language) for cell in book.cells[place + 1 :])
        return above, below and f"\n\n{below}"

    def _cell_text(self, cell: Cell, language: str) -> str:
        document = self.documents.get(cell.uri)
        text = document.text.strip("\r\n") if document else ""
        if not text.strip() or document is None:
            return ""
        if not cell.is_code:
            mark = "//" if language in _SLASHES else "#"
            text = "\n".join(f"{mark} {line}".rstrip() for line in _LINE_END.split(text))
        elif document.language != language:
            return ""
        return text + "\n\n"


_SLASHES = {"javascript", "typescript", "java", "go", "rust", "c", "cpp", "csharp", "kotlin", "swift", "scala"}


def length(text: str, units: Units) -> int:
    """Return the length of `text` in `units`."""
    if units is Units.UTF32 or text.isascii():
        return len(text)
    if units is Units.UTF8:
        return len(text.encode("utf-8", "surrogatepass"))
    return len(text) + sum(1 for character in text if character > "\uffff")


def _split(text: str) -> tuple[str, ...]:
    ends = [0, *(found.end() for found in _LINE_END.finditer(text)), len(text)]
    return tuple(text[start:end] for start, end in pairwise(ends))


def _characters(text: str, units_wanted: int, units: Units) -> int:
    # How many whole characters lie before the place.
    seen = 0
    for index, character in enumerate(text):
        code = ord(character)
        if units is Units.UTF16:
            seen += 2 if code > 0xFFFF else 1
        else:
            seen += 1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4
        if seen > units_wanted:
            return index
    return len(text)
