"""Where a prompt is anchored: the line up to which text above the cursor is head, and behind which it is live.

The engine keeps a prompt's beginning computed up to the live text. So the anchor stays where it is for as long as
possible: typing, new lines included, only makes the live text longer. It moves when the cursor goes above it, when the
text above or behind changes, and when the live text has grown too long. The text behind begins with the rest of the
cursor's line and ends at a place that does not depend on that line. Pure: knows documents, no engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agent.context import Surroundings, normal_newlines, surroundings
from agent.types import Snippet
from lsp.documents import Document, Place

WINDOW_LINES = 64
"""The text above begins at a multiple of so many lines, so that its beginning moves rarely."""
LIVE_CHARS = 800
"""Most characters of live text, 200 tokens or so: as much again as a suffix, so that a prompt never doubles."""
_LINE_CHARS = (
    12_000  # of the cursor's line before the cursor, longer ones the daemon refuses; and of a block of lines above it
)
_BUDGET_CHARS = 12  # a token, at most: the daemon cuts longer texts before it counts, so that more is sent in vain
_LEAST_CHARS = 2_000  # rules and grammars look at the text, too, however small the budget of a prompt is


@dataclass(frozen=True, slots=True)
class Anchor:
    """An anchor in one document."""

    top: int
    """First line of the text above."""
    line: int
    """First line of the live text."""
    head: str
    """The lines from `top` to `line`, as a prompt has them."""
    suffix: str
    """The text behind the cursor, as a prompt has it."""
    brief: bool = True
    """Whether prompts are short here: the engine has not read the long one yet."""
    snippets: tuple[Snippet, ...] = ()
    """What stands elsewhere and helps here; nothing while prompts are short."""

    def is_at(self, other: "Anchor") -> bool:
        """Tell whether both have the same text around them."""
        return (self.head, self.suffix) == (other.head, other.suffix)


@dataclass(frozen=True, slots=True)
class Window:
    """How much of a document around the cursor is looked at, at least where there is as much; each key sends it to the daemon."""

    above_chars: int = 384 * _BUDGET_CHARS
    behind_chars: int = _LEAST_CHARS

    @classmethod
    def of(cls, prefix_tokens: int, suffix_tokens: int) -> "Window":
        """Return the window that fills a prompt with so many tokens before and behind the cursor."""
        above, behind = (max(_LEAST_CHARS, _BUDGET_CHARS * n_tokens) for n_tokens in (prefix_tokens, suffix_tokens))
        return cls(above, behind)


@dataclass(frozen=True, slots=True)
class Around:
    """A document's text, cells of its notebook included, that lies beyond its ends."""

    above: str = ""
    below: str = ""


def anchored(
    document: Document, place: Place, before: Sequence[Anchor], around: Around, window: Window
) -> tuple[Anchor, Surroundings]:
    """Return the anchor for a cursor, the first from before that still holds, and the text around it.

    Args:
        document: The document now.
        place: The cursor.
        before: Earlier anchors in this document; a new one is made where none of them holds.
        around: What lies beyond the document's ends.
        window: How much is looked at.
    """
    for anchor in before:
        if anchor.line <= place.line < document.n_lines:
            kept = _cut(document, place, anchor.top, anchor.line, around, window)
            # A single line may be as long as it likes: another anchor would not make the live text shorter.
            fits = len(kept.live) <= LIVE_CHARS or anchor.line == place.line
            if fits and (kept.head, kept.suffix) == (anchor.head, anchor.suffix):
                return anchor, kept
    return anew(document, place, around, window)


def anew(document: Document, place: Place, around: Around, window: Window) -> tuple[Anchor, Surroundings]:
    """Return an anchor at the cursor's line, and the text around it."""
    top = _top(document, place, window)
    cut = _cut(document, place, top, place.line, around, window)
    return Anchor(top, place.line, cut.head, cut.suffix), cut


def _cut(document: Document, place: Place, top: int, line: int, around: Around, window: Window) -> Surroundings:
    head = "".join(document.lines[top:line])[-(window.above_chars + _LINE_CHARS) :]  # lines may be as long as they like
    if top == 0:
        head = around.above[-window.above_chars :] + head
    live = document.between(Place(line, 0), place)[-_LINE_CHARS:]
    rest = document.lines[place.line][place.column :]
    # Counted from the next line on: what is typed on the cursor's line would move the end of the text behind it.
    lines, n_chars, most = [], 0, window.behind_chars
    for following in document.lines.since(place.line + 1):
        if n_chars >= most:
            break
        lines.append(following)
        n_chars += len(following)
    ends = place.line + 1 + len(lines) == document.n_lines
    below = "".join(lines) + (around.below if ends else "")
    behind = rest + below[:most] if len(rest) <= most else rest[:most]
    head = normal_newlines(head)
    return surroundings(head + live, behind, len(head))


def _top(document: Document, place: Place, window: Window) -> int:
    # Whole blocks until the window is full: with only those that fit, long lines would leave hardly any text above.
    top = place.line - place.line % WINDOW_LINES
    n_chars = sum(map(len, document.lines[top : place.line]))
    while top > 0 and n_chars < window.above_chars:
        n_chars += sum(map(len, document.lines[top - WINDOW_LINES : top]))
        top -= WINDOW_LINES
    return top
