"""Which pieces of other texts are like the text at the cursor, and which edits are news. Pure; knows no files.

Likeness is the share of identifiers that two pieces have in common (Jaccard). What is nearly the same as the cursor's
surroundings is left out: a model that sees it copies it.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from agent.types import Snippet

WINDOW_STEP = 12  # lines; half a window, so that what one window cuts, the next one holds
WINDOW_LINES = 2 * WINDOW_STEP  # about 250 tokens: a function with its surroundings
AROUND_LINES = 20  # before the cursor: what the user works on, without what lies far above
LEAST_LIKENESS = 0.15  # below that, files of one project share little but the names of the standard library
MOST_LIKENESS = 0.5  # above that, completions become copies (llama.vim's limit for the same)
NEAR_LINES = 256  # of the same document, on both sides of the cursor: the prompt may hold them anyway
SAME_EDIT = 85  # percent likeness of two edits' characters, above which the older one tells nothing
MAX_EDIT_LINES = 24  # of an edit; a longer one is a paste or a reformatted file

_WORD = re.compile(r"[^\W\d]\w+")
_COMMON = frozenset(
    """self this cls super return def class function func fn const let var if elif else for while in of is not and or
    import from export default async await yield try except catch finally raise throw with as pass break continue new
    None True False null undefined true false public private static void int str bool string number type""".split()
)
"""Words that say nothing about what a text is about."""


@dataclass(frozen=True, slots=True)
class _Window:
    likeness: float
    path: str
    source: str
    """The text that it is a part of."""
    start: int
    """Number of its first line, from 0."""
    words: frozenset[str]

    @property
    def text(self) -> str:
        lines = self.source.split("\n")[self.start : self.start + WINDOW_LINES]
        return "\n".join(lines).strip("\n")

    def repeats(self, other: "_Window") -> bool:
        overlaps = self.source is other.source and abs(self.start - other.start) < WINDOW_LINES
        return overlaps or likeness(self.words, other.words) > MOST_LIKENESS


def words(text: str) -> frozenset[str]:
    """Return the identifiers of a text, without those that are common to all."""
    # Interned, since the same identifiers stand in many windows, and those of many texts are kept.
    return frozenset(map(sys.intern, set(_WORD.findall(text)) - _COMMON))


def around(prefix: str) -> str:
    """Return the last lines before the cursor, those to which other texts are compared."""
    return "\n".join(prefix.rsplit("\n", AROUND_LINES)[-AROUND_LINES:])


def far_parts(prefix: str, suffix: str) -> tuple[str, str]:
    """Return what stands far above and far below the cursor, in which similar pieces may be looked for, too.

    The cuts lie at every `NEAR_LINES`th line, so that the parts stay the same while the user types.
    """
    above, below = prefix.split("\n"), suffix.split("\n")
    line = len(above) - 1
    far = max(0, line // NEAR_LINES - 1) * NEAR_LINES
    near = (line // NEAR_LINES + 2) * NEAR_LINES - line
    return "\n".join(above[:far]), "\n".join(below[near:])


@lru_cache(64)  # texts: as many documents as people have open; most stay as they are between two calls
def windows(text: str) -> tuple[frozenset[str], ...]:
    """Return the words of each window of a text: the first begins at line 0, each other `WINDOW_STEP` lines later."""
    lines = text.split("\n")
    halves = [words("\n".join(lines[at : at + WINDOW_STEP])) for at in range(0, len(lines), WINDOW_STEP)]
    return tuple(first | second for first, second in pairwise(halves)) or tuple(halves)


def similar(prefix: str, texts: Iterable[tuple[str, str]], *, limit: int) -> list[Snippet]:
    """Return the pieces that are most like the text before the cursor, the likest first.

    Args:
        prefix: Text before the cursor.
        texts: Paths and texts to look through.
        limit: Most pieces; they never overlap, and none is nearly the same as another.
    """
    wanted = words(around(prefix))
    found = [
        _Window(likeness(wanted, each), path, text, place * WINDOW_STEP, each)
        for path, text in texts
        for place, each in enumerate(windows(text))
    ]
    found = [each for each in found if LEAST_LIKENESS <= each.likeness <= MOST_LIKENESS]
    chosen: list[_Window] = []
    for each in sorted(found, key=lambda each: each.likeness, reverse=True):
        if len(chosen) == limit:
            break
        if not any(each.repeats(other) for other in chosen):
            chosen.append(each)
    return [Snippet(each.path, each.text) for each in chosen]


def likeness(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the share of words that both have, of all words that either has; 0 where there are none."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if both else 0.0


def news(edits: Sequence[Snippet], known: Sequence[str] = (), *, limit: int) -> list[Snippet]:
    """Return the latest edits, newest first, without those that say again what a newer one says.

    Args:
        edits: Changed regions, the newest last.
        known: Texts that are shown anyway.
        limit: Most edits.
    """
    from rapidfuzz import fuzz

    chosen: list[Snippet] = []
    for edit in reversed(edits):
        text = edit.text.strip("\n")
        if len(chosen) == limit:
            break
        if not text.strip() or text.count("\n") >= MAX_EDIT_LINES:
            continue
        shown = [*known, *(each.text for each in chosen)]
        if not any(text in other or fuzz.ratio(text, other, score_cutoff=SAME_EDIT) for other in shown):
            chosen.append(Snippet(edit.path, text))
    return chosen
