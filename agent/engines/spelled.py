"""Token ids for servers that take and give text alone: an id spells its text, in up to seven bytes of UTF-8.

So nothing needs to be looked up or remembered, and prompts have about as many tokens as with a real tokenizer, whose words
of code have four characters or so. Marks, which stand for special tokens and for turns of a chat, have ids of their own
that no text can spell. Pure: knows no server.
"""

import re
from collections.abc import Iterable, Sequence

from agent.engines.base import Token

_BYTES = 7  # eight would not fit into the 64 signed bits that others give an id
_FIRST_MARK = 1 << 60  # above every spelled id: those have a leading one and seven bytes, 57 bits
_WORDS = re.compile(r"\s?\w+|\s?[^\w\s]+|\s+")


class Spelling:
    """Texts as ids, and back."""

    def __init__(self, marks: Iterable[str]) -> None:
        """Have these marks."""
        self._marks = tuple(dict.fromkeys(marks))
        self._ids = {mark: _FIRST_MARK + number for number, mark in enumerate(self._marks)}

    def mark(self, text: str) -> int | None:
        """Return the id of a mark; None for any other text."""
        return self._ids.get(text)

    def tokens(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of a text; with `special`, one that is a mark is that one token."""
        if special and text in self._ids:
            return [Token(self._ids[text], text)]
        return [Token(_spell(piece), piece) for word in _WORDS.findall(text) for piece in _pieces(word)]

    def pieces(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """Return texts and marks in order, text between two marks as one; each with whether it is a mark."""
        found: list[tuple[str, bool]] = []
        text = ""
        for one in ids:
            if one < _FIRST_MARK:
                text += _read(one)
                continue
            if text:
                found.append((text, False))
            found.append((self._marks[one - _FIRST_MARK], True))
            text = ""
        return [*found, (text, False)] if text else found


def _pieces(word: str) -> list[str]:
    found, piece, size = [], "", 0
    for character in word:
        length = len(character.encode("utf-8", errors="replace"))
        if size + length > _BYTES:
            found.append(piece)
            piece, size = "", 0
        piece, size = piece + character, size + length
    return [*found, piece] if piece else found


def _spell(piece: str) -> int:
    return int.from_bytes(b"\x01" + piece.encode("utf-8", errors="replace"), "big")


def _read(one: int) -> str:
    return one.to_bytes(_BYTES + 1, "big").lstrip(b"\x00")[1:].decode("utf-8", errors="replace")
