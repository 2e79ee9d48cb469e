r"""The text of open documents and notebooks, and positions in it.

Lines end at "\r\n", "\n" or "\r" and at nothing else, as the protocol says; Python's splitlines() knows more, and so
does pygls's own workspace. Characters of a position count in the units that were agreed on with the client. Pure values:
a change makes a new `Document`, so that whoever holds one has a snapshot. Knows no server.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

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


@dataclass(frozen=True, slots=True)
class Document:
    """A document at one moment."""

    uri: str
    language: str
    version: int
    text: str
    units: Units = Units.UTF16
    starts: tuple[int, ...] = field(default=(), repr=False, compare=False)
    """Offset of each line's first character; filled in by `opened`."""

    @classmethod
    def opened(cls, uri: str, language: str, version: int, text: str, units: Units) -> "Document":
        """Return a document with its lines found."""
        return cls(uri, language, version, text, units, _starts(text))

    def changed(self, version: int, changes: Iterable[Change]) -> "Document":
        """Return the document after some changes, each of which sees the one before."""
        document = self
        for change in changes:
            if change.start is None or change.end is None:
                text = change.text
            else:
                start, end = sorted((document.offset(*change.start), document.offset(*change.end)))
                text = document.text[:start] + change.text + document.text[end:]
            document = Document.opened(self.uri, self.language, version, text, self.units)
        return document

    @property
    def n_lines(self) -> int:
        """Number of lines; an empty text has one."""
        return len(self.starts)

    def line(self, number: int) -> str:
        """Return a line without its end; empty beyond the text."""
        if not 0 <= number < len(self.starts):
            return ""
        return self.text[self.starts[number] : self._line_end(number)]

    def offset(self, line: int, character: int) -> int:
        """Return the offset of a position; places beyond a line or the text are moved to its end.

        A position within a character is moved to the character's beginning.
        """
        if line < 0:
            return 0
        if line >= len(self.starts):
            return len(self.text)
        start, end = self.starts[line], self._line_end(line)
        if character <= 0:
            return start
        if self.units is Units.UTF32:
            return min(start + character, end)
        text = self.text[start:end]
        if text.isascii():
            return min(start + character, end)
        return start + _characters(text, character, self.units)

    def position(self, offset: int) -> tuple[int, int]:
        """Return line and character of an offset; one within a line's end counts as the line's last place."""
        offset = max(0, min(offset, len(self.text)))
        line = bisect_right(self.starts, offset) - 1
        return line, length(self.text[self.starts[line] : min(offset, self._line_end(line))], self.units)

    def _line_end(self, number: int) -> int:
        if number + 1 == len(self.starts):
            return len(self.text)
        end = self.starts[number + 1]
        return end - 2 if self.text[end - 2 : end] == "\r\n" else end - 1


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


def _starts(text: str) -> tuple[int, ...]:
    return (0, *(found.end() for found in _LINE_END.finditer(text)))


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
