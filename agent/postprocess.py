"""What is done to a completion's text once it is whole: an ordered tuple of pure filters.

Each filter takes the text and its surroundings and returns the text that is left; an empty one means that nothing is
shown. Golden cases with the cursor drawn in the text lie in tests/golden/postprocess.toml. Knows no tokens.
"""

import re
from collections.abc import Callable

from rapidfuzz.distance import Levenshtein

from agent.context import Surroundings, indent_of

Filter = Callable[[str, Surroundings], str]

_VISIBLE_CHARS = 2
"""Fewer are not worth a flicker; one more keystroke is quicker than reading them."""
_DISTINCT_CHARS = 2
_INDENT = 4  # where the text above the cursor has no indentation to go by
_ECHO_SHARE = 0.05
"""Share of characters that may differ in an echo of the next lines."""
_OPENERS = {"(": ")", "[": "]", "{": "}"}
_TRIPLE_QUOTES = ('"""', "'''")
_MARKS = (":", "{", ";", ",")
_QUOTES = "\"'`"


def align_indent(text: str, around: Surroundings) -> str:
    """Take away blanks in front that put the line off the document's steps of indentation.

    Behind eight blanks a model may write a ninth, since " return" is one token for it. The lines below moved along with
    the first one, and move back with it. A step deeper than the cursor is left as it is.
    """
    line = around.cursor_line
    extra = len(text) - len(text.lstrip(" "))
    if not line or line.strip(" ") or not extra:
        return text
    step = min((width for width in map(indent_of, around.head.split("\n")) if width > 1), default=_INDENT)
    if len(line) % step or not (len(line) + extra) % step:
        return text
    first, *below = text.split("\n")
    moved = [one[extra:] if indent_of(one) >= len(line) + extra else one for one in below]
    return "\n".join([first[extra:], *moved])


def drop_repeating_tail(text: str, around: Surroundings) -> str:
    """Cut a tail that says one thing over and over to its first saying: 3 or more characters 5 times, 10 or more 3."""
    del around
    body = "\n" + text.rstrip()  # as if a line ended before it, so that lines are units from the first one on
    for unit_chars, times in ((3, 5), (10, 3)):
        for size in range(unit_chars, len(body) // times + 1):
            unit = body[-size:]
            # One character alone, in a number or a ruler, is a value and no loop.
            if not body.endswith(unit * times) or len(set(unit)) < _DISTINCT_CHARS:
                continue
            start = len(body)
            while start >= size and body[start - size : start] == unit:
                start -= size
            return body[1 : start + size]
    return text


def drop_echo(text: str, around: Surroundings) -> str:
    """Drop a text that repeats the next one to three lines behind the cursor, but for one character in twenty."""
    said = text.strip()
    below = [line for line in around.suffix.split("\n")[1:] if line.strip()]
    for count in (1, 2, 3):
        echo = "\n".join(below[:count]).strip()
        allowed = max(1, int(len(echo) * _ECHO_SHARE))
        if (
            echo
            and said
            and Levenshtein.distance(said, echo, score_cutoff=allowed) <= allowed
            and len(echo) > allowed + 1
        ):
            return ""
    return text


def cut_overlap(text: str, around: Surroundings) -> str:
    """Cut the end of the last line where it repeats what stands behind the cursor on the same line."""
    rest = "" if around.closers else around.rest.rstrip()
    if not rest.strip():
        return text
    head, newline, last = text.rpartition("\n")
    for size in range(min(len(last), len(rest)), 0, -1):
        # The whole rest, or a part of it that ends with a word: "a" before "as f" is no overlap.
        whole_word = size == len(rest) or not (rest[size - 1].isalnum() and rest[size].isalnum())
        if whole_word and last.endswith(rest[:size]) and not _opens(last[:-size]):
            return head + newline + last[:-size]
    return text


def _opens(text: str) -> bool:
    # Whether a bracket stays open: then what closes it is the text's own, and no overlap.
    stack: list[str] = []
    for character in text:
        if character in _OPENERS:
            stack.append(_OPENERS[character])
        elif stack and character == stack[-1]:
            stack.pop()
    return bool(stack)


def trim_end(text: str, around: Surroundings) -> str:
    """Cut blank space and blank lines at the end."""
    del around
    return text.rstrip()


def drop_invisible(text: str, around: Surroundings) -> str:
    """Drop a text of under two visible characters."""
    del around
    return text if len(re.sub(r"\s", "", text)) >= _VISIBLE_CHARS else ""


FILTERS: tuple[Filter, ...] = (align_indent, drop_repeating_tail, drop_echo, cut_overlap, trim_end, drop_invisible)
"""In the order in which they run."""


def clean(text: str, around: Surroundings, *, cut_short: bool = False) -> tuple[str, str | None]:
    """Run all filters.

    Args:
        text: The whole text.
        around: What stands around it.
        cut_short: Whether the allowance of tokens ended it. A loop never ends by itself; a text that did has its
            repetitions on purpose (`0, 0, 0, 0, 0`).

    Returns:
        The text that is left, and the name of the filter that emptied it, if one did.
    """
    for run in FILTERS:
        if run is drop_repeating_tail and not cut_short:
            continue
        if text and not (text := run(text, around)):
            return "", run.__name__
    return text, None


BEFORE_CACHE: tuple[Filter, ...] = (align_indent, drop_repeating_tail, drop_echo, trim_end, drop_invisible)
AFTER_CACHE: tuple[Filter, ...] = (cut_overlap,)


def settle(text: str, around: Surroundings, *, cut_short: bool) -> tuple[str, str | None]:
    """Run the filters before the cache."""
    for run in BEFORE_CACHE:
        if run is drop_repeating_tail and not cut_short:
            continue
        if text and not (text := run(text, around)):
            return "", run.__name__
    return text, None


def present(text: str, around: Surroundings) -> tuple[str, str | None]:
    """Run the filters after the cache."""
    for run in AFTER_CACHE:
        if text and not (text := run(text, around)):
            return "", run.__name__
    return text, None


def replaced_chars(text: str, around: Surroundings) -> int:
    """Return how many characters right of the cursor the text stands in for.

    Editors close brackets and quotes by themselves, and the rest of the line is then nothing but closers. Where the
    text closes these itself, in their order, they are to be replaced rather than doubled.
    """
    wanted = around.closers.lstrip()
    if not wanted:
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
