"""An editor as far as keystrokes tell it apart: auto-indent, closers that it inserts by itself, steps of indentation.

Behaves as VS Code does with its default settings. Pure; knows neither time nor any completion.
"""

import re
from dataclasses import dataclass
from enum import Enum

_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_QUOTES = "\"'"
_BLANKS = re.compile(r"[ \t]*")
_MAY_CLOSE_BEFORE = re.compile(r"\s|[)\]}]|$")
"""What the rest of a line must begin with for a closer to be inserted."""


class Kind(Enum):
    """What a key does."""

    CHARACTER = "character"
    ENTER = "enter"
    BACKSPACE = "backspace"
    DELETE = "delete"
    """Takes the closer behind the cursor away that the editor put there and nobody wanted."""
    JUMP = "jump"
    """The cursor moves, by mouse or arrow; no keystroke that counts."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a key did to the document: the characters from `start` to `end` became `text`."""

    start: int
    end: int
    text: str


class Editor:
    """A document, a cursor, and the closers that were inserted automatically."""

    def __init__(self, text: str, step: str) -> None:
        """Open `text`, whose lines end with a line feed, with the cursor at its beginning.

        Args:
            text: The document.
            step: One step of indentation: a tab, or some spaces.
        """
        self.text = text
        self.cursor = 0
        self.step = step
        self._pairs: list[tuple[int, int]] = []
        """Offsets of openers and of the closers that came with them."""

    @property
    def line_before(self) -> str:
        """The text of the cursor's line before the cursor."""
        return self.text[self.text.rfind("\n", 0, self.cursor) + 1 : self.cursor]

    @property
    def position(self) -> tuple[int, int]:
        """Line and column of the cursor, in characters, from 0."""
        return self.text.count("\n", 0, self.cursor), len(self.line_before)

    def press(self, kind: Kind, text: str = "", to: int = 0) -> Change | None:
        """Do what a key does.

        Args:
            kind: Which key.
            text: What a CHARACTER types: one character, or a step of indentation.
            to: Where a JUMP goes.

        Returns:
            The change of the document; None where only the cursor moved.
        """
        if kind is Kind.JUMP:
            self.cursor = to
            self._forget_pairs()
            return None
        if kind is Kind.CHARACTER:
            return self._type(text)
        if kind is Kind.ENTER:
            return self._enter()
        return self._backspace() if kind is Kind.BACKSPACE else self._delete()

    def _type(self, text: str) -> Change:
        at = self.cursor
        if any(close == at for _, close in self._pairs) and self.text[at] == text:
            # As VS Code tells it to language servers: the closer is replaced by itself.
            self._pairs = [pair for pair in self._pairs if pair[1] != at]
            self.cursor = at + 1
            return Change(at, at + 1, text)
        closer = self._closer(text)
        change = self._replace(at, at, text + closer, at + len(text))
        if closer:
            self._pairs.append((at, at + 1))
        return change

    def _closer(self, text: str) -> str:
        """The closer to insert with an opener; nothing where the editor leaves it to the user."""
        if not _MAY_CLOSE_BEFORE.match(self.text, self.cursor):
            return ""
        if text in _CLOSERS:
            return _CLOSERS[text]
        before = self.text[self.cursor - 1 : self.cursor]
        is_word = before.isalnum() or before == "_"
        # Behind the very same quote stands the end of an empty text, or the third quote of a docstring's.
        return text if text in _QUOTES and not is_word and before != text else ""

    def _enter(self) -> Change:
        line = self.line_before
        found = _BLANKS.match(line)
        indent = found[0] if found else ""
        opens = line.rstrip().endswith((":", *_CLOSERS))
        inner = "\n" + indent + (self.step if opens else "")
        # Blanks that auto-indent left on an empty line go.
        start = self.cursor - (len(line) if not line.strip() else 0)
        between = _CLOSERS.get(line[-1:]) == self.text[self.cursor : self.cursor + 1] != ""
        outer = "\n" + indent if between else ""
        return self._replace(start, self.cursor, inner + outer, start + len(inner))

    def _backspace(self) -> Change:
        line, at = self.line_before, self.cursor
        width = 1
        if line and not line.strip() and line.endswith(" ") and self.step != "\t":
            spaces = len(line) - len(line.rstrip(" "))
            width = min(spaces, (len(line) - 1) % len(self.step) + 1)
        return self._replace(at - width, at, "", at - width)

    def _delete(self) -> Change:
        at, end = self.cursor, self.cursor + 1
        if self.text[at] == "\n":  # a line that is joined loses its indentation
            found = _BLANKS.match(self.text, end)
            end = found.end() if found else end
        return self._replace(at, end, "", at)

    def _replace(self, start: int, end: int, text: str, cursor: int) -> Change:
        self.text = self.text[:start] + text + self.text[end:]
        self.cursor = cursor
        moved = len(text) - (end - start)
        self._pairs = [
            (opener + moved if opener >= end else opener, close + moved if close >= end else close)
            for opener, close in self._pairs
            if not (start <= opener < end or start <= close < end)
        ]
        self._forget_pairs()
        return Change(start, end, text)

    def _forget_pairs(self) -> None:
        # A closer is typed over only as long as the cursor has stayed between it and its opener.
        self._pairs = [pair for pair in self._pairs if pair[0] < self.cursor <= pair[1]]
