"""What is done to a completion's text once it is whole: two ordered tuples of pure filters.

`BEFORE_CACHE` runs once. What it leaves may be kept, and shown again when the user has typed a part of it; then
`AFTER_CACHE` runs on what remains, with the surroundings of that moment. Golden cases with the cursor drawn in the text
lie in tests/golden/postprocess.toml. Knows no tokens.
"""

from collections.abc import Callable, Iterable

from agent.context import Surroundings
from agent.filters import (
    align_indent,
    cut_duplicate_closers,
    cut_overlap,
    drop_echo,
    drop_invisible,
    drop_repeated_block,
    drop_repeating_tail,
    limit_scope,
    normalise_indent,
    trim_end,
)

Filter = Callable[[str, Surroundings], str]

_TRIPLE_QUOTES = ('"""', "'''")
_MARKS = (":", "{", ";", ",")
_QUOTES = "\"'`"
_OPENERS = {"(": ")", "[": "]", "{": "}"}

BEFORE_CACHE: tuple[Filter, ...] = (align_indent, drop_repeating_tail, drop_echo, trim_end, drop_invisible)
"""In the order in which they run. None of them looks at the closers behind the cursor."""

AFTER_CACHE: tuple[Filter, ...] = (
    normalise_indent,  # first, since the next ones compare indentations
    drop_repeated_block,
    limit_scope,
    cut_duplicate_closers,
    cut_overlap,
)
"""In the order in which they run; all of them are cheap."""


def settle(text: str, around: Surroundings, *, cut_short: bool) -> tuple[str, str | None]:
    """Run what runs once, before a text is kept.

    Args:
        text: The whole text.
        around: What stands around it.
        cut_short: Whether the allowance of tokens ended it. A loop never ends by itself; a text that did has its
            repetitions on purpose (`0, 0, 0, 0, 0`).

    Returns:
        The text that is left, and the name of the filter that emptied it, if one did.
    """
    return _run((run for run in BEFORE_CACHE if cut_short or run is not drop_repeating_tail), text, around)


def present(text: str, around: Surroundings) -> tuple[str, str | None]:
    """Run what runs each time before a text is shown.

    Args:
        text: A text from `settle`, or what remains of it behind what the user typed meanwhile.
        around: What stands around it now.

    Returns:
        The text that is left, and the name of the filter that emptied it, if one did.
    """
    return _run(AFTER_CACHE, text, around)


def clean(text: str, around: Surroundings, *, cut_short: bool = False) -> tuple[str, str | None]:
    """Run all filters, for a text that is shown where it was written; see `settle` and `present`."""
    text, dropped_by = settle(text, around, cut_short=cut_short)
    return (text, dropped_by) if dropped_by else present(text, around)


def _run(filters: Iterable[Filter], text: str, around: Surroundings) -> tuple[str, str | None]:
    for run in filters:
        if text and not (text := run(text, around)):
            return "", run.__name__
    return text, None


def replaced_chars(text: str, around: Surroundings) -> int:
    """Return how many characters right of the cursor the text stands in for.

    Editors close brackets and quotes by themselves, and the rest of the line is then nothing but closers. Where the
    text closes these itself, in their order, they are to be replaced rather than doubled. Only its first line counts,
    but for triple quotes; those of a text that begins on the next line are cut instead.
    """
    wanted = around.closers.lstrip()
    if not wanted or text.startswith("\n"):
        return 0
    line = text.partition("\n")[0]
    blank = len(around.closers) - len(wanted)
    covered = 0
    if wanted[:3] in _TRIPLE_QUOTES:
        # The closing three are looked for in the whole text; what stands behind them is closed in its own right.
        said, closed, line = text.rpartition(wanted[:3])
        if not closed or wanted[:3] in said:
            return 0
        rest = wanted[3:].strip()
        return len(around.closers) if rest and line.strip() == rest else blank + 3
    for character in _closers_of(around.cursor_line, line, wanted):
        if covered < len(wanted) and character == wanted[covered]:
            covered += 1
    mark = wanted[covered:].strip()
    if covered and mark in _MARKS and line.rstrip().endswith(mark):
        covered = len(wanted)  # the mark behind the closers is written as well
    return covered + blank if covered else 0


def _closers_of(before: str, text: str, wanted: str) -> str:
    # The brackets and quotes in `text` that close something opened in `before`, or nothing at all, in order.
    stack: list[tuple[str, bool]] = []  # what will close it, and whether it was opened in `before`
    found: list[str] = []
    for index, character in enumerate(before + text):
        outer = index < len(before)
        if index == len(before) and stack and stack[-1][0] in _QUOTES and stack[-1][0] != wanted[0]:
            stack = [item for item in stack if item[0] not in _QUOTES]  # an apostrophe in prose, no open string
        quote = stack[-1][0] if stack and stack[-1][0] in _QUOTES else ""
        if quote and character != quote:
            continue
        if quote or character in _OPENERS.values():
            opened_before = stack.pop()[1] if stack and stack[-1][0] == character else True
            if opened_before and not outer:
                found.append(character)
        elif character in _QUOTES:
            stack.append((character, outer))
        elif character in _OPENERS:
            stack.append((_OPENERS[character], outer))
    return "".join(found)
