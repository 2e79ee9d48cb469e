"""Where a completion ends while it is still being written: pure functions over the text so far.

Knows lines and indentation, no grammar, no tokens. A stop is found as soon as the line that decides it is complete, so
that the engine is freed at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from agent.context import Surroundings, indent_of
from agent.types import StopReason

_NEARLY = 0.9
"""Similarity from which a line counts as the one that stands behind the cursor already: one character in ten."""
_TELLING_CHARS = 4
"""Shorter lines (`}`, `fi`, `end`) repeat in good code too, and tell nothing."""
_REPEATS = 3
_ENDS_BODY = re.compile(r"(?:return|raise|throw|break|continue)\b")


@dataclass(frozen=True, slots=True)
class StopRules:
    """What the text around the cursor says about where a completion must end."""

    multiline: bool
    max_lines: int
    base_indent: int | None
    """Lines with less indentation leave the block; None for less than the first line that is written."""
    closes_block: bool
    """Whether a line of closers at the header's indentation belongs to the block, and ends it."""
    next_lines: tuple[str, ...]
    """The next filled lines behind the cursor, stripped."""
    next_indent: int | None = None
    """Indentation of the next filled line behind the cursor."""
    is_statement: bool = False
    """Whether the cursor stands behind text that opens no block."""
    begins_below: bool = False
    """Whether a single line may be the next one: the cursor stands at the end of a line that may be finished."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where to cut, and why."""

    end: int
    """Characters of the text that stay."""
    reason: StopReason


def rules_for(around: Surroundings, *, multiline: bool, max_lines: int) -> StopRules:
    """Derive the rules from the text around the cursor."""
    line = around.cursor_line
    below = [text for text in around.suffix.split("\n")[1:] if text.strip()]
    opens = bool(line.strip())
    base = indent_of(line) + 1 if opens else indent_of(line)
    header = indent_of(line) if opens else base - 1
    braces = line.rstrip().endswith("{") or _header_above(around).rstrip().endswith("{")
    closed_below = bool(below) and below[0].lstrip()[0] in ")]}" and indent_of(below[0]) <= max(header, 0)
    return StopRules(
        multiline=multiline,
        max_lines=max_lines,
        # In the first column, the text brings its indentation along.
        base_indent=base if line else None,
        closes_block=braces and not closed_below,
        next_lines=tuple(text.strip() for text in below[:3]),
        next_indent=indent_of(below[0]) if below else None,
        is_statement=opens and not line.rstrip().endswith((":", "{")),
        begins_below=opens and not multiline and not around.rest.strip(),
    )


def find_stop(text: str, rules: StopRules, *, final: bool = False) -> Stop | None:
    """Return where the text must end, or None while it may go on.

    Args:
        text: All that was written so far, beginning at the cursor.
        rules: From `rules_for`.
        final: The text is complete, so that its last line is, too.
    """
    if not rules.multiline:
        return _end_of_line(text, rules)
    lines = text.split("\n")
    base = _base(lines, rules)
    complete = lines if final else lines[:-1]
    at = 0
    kept: list[str] = []
    for index, line in enumerate(complete):
        # The first line shares its row with what stands before the cursor; only the later ones have an indentation.
        stop = _ending(line, kept, rules, base) if index else None
        # In the first column, where definitions follow each other without end, one paragraph is enough.
        if not stop and kept and not base and indent_of(line) == 0 and line.strip() and not lines[index - 1].strip():
            stop = StopReason.BLOCK
        if stop:
            return Stop(at + len(line) if stop is StopReason.END else at - 1, _told(stop))
        if line.strip():
            kept.append(line.strip())
        at += len(line) + 1
        if len(kept) >= rules.max_lines and len(lines) > index + 1:
            return Stop(at - 1, StopReason.BUDGET)
    if not final and len(lines) > 1 and _leaves_already(lines[-1], rules, base):
        return Stop(at - 1, StopReason.BLOCK)
    return None


def _base(lines: Sequence[str], rules: StopRules) -> int:
    # Where the cursor's line is finished, or there is none yet, the first line of the text's own tells.
    if rules.base_indent is None or (rules.is_statement and not lines[0].strip()):
        first = indent_of(next((line for line in lines if line.strip()), ""))
        # Nothing dedented comes between a line and the one below, of the same body.
        own = (rules.base_indent or 1) - 1
        return max(first, min(own, rules.next_indent or 0))
    return rules.base_indent


def _end_of_line(text: str, rules: StopRules) -> Stop | None:
    line, newline, rest = text.partition("\n")
    if not newline:
        return None
    if line.strip() or not rules.begins_below:
        return Stop(len(line), StopReason.LINE)
    below, newline, _ = rest.partition("\n")
    if not newline:
        return None
    if not below.strip():
        return Stop(0, StopReason.LINE)  # an empty line: what follows is another matter
    if any(_alike(below.strip(), other) for other in rules.next_lines[:1]):
        return Stop(0, StopReason.SUFFIX)
    return Stop(len(line) + 1 + len(below), StopReason.LINE)


def _leaves_already(line: str, rules: StopRules, base: int) -> bool:
    # One character behind the indentation is enough to see that a line leaves the block; waiting for its end would
    # cost the time of ten tokens and more.
    stripped = line.lstrip()
    return bool(stripped) and indent_of(line) < base and not (rules.closes_block and stripped[0] in ")]}")


def whole_lines(text: str) -> str:
    """Return `text` without its last line, which the allowance of tokens cut short; all of it where it has one line."""
    shorter = text.rpartition("\n")[0]
    return shorter if shorter.strip() else text


def _ending(line: str, kept: Sequence[str], rules: StopRules, base: int) -> StopReason | None:
    stripped = line.strip()
    if not stripped:
        return None
    if indent_of(line) < base:
        closes = rules.closes_block and stripped[0] in ")]}"
        # END marks the one line that is kept although it ends the block; it is reported as BLOCK.
        return StopReason.END if closes else StopReason.BLOCK
    if any(_alike(stripped, other) for other in rules.next_lines[:1]):
        return StopReason.SUFFIX
    if kept and indent_of(line) == base == rules.next_indent and _ENDS_BODY.match(stripped):
        return StopReason.BLOCK  # what stands below could never be reached
    if _repeats([*kept, stripped]):
        return StopReason.REPETITION
    return None


def _told(reason: StopReason) -> StopReason:
    return StopReason.BLOCK if reason is StopReason.END else reason


def _alike(line: str, other: str) -> bool:
    if len(line) < _TELLING_CHARS:
        return line == other
    return Levenshtein.normalized_similarity(line, other, score_cutoff=_NEARLY) > 0


def _repeats(lines: Sequence[str]) -> bool:
    # The last line, or the last two together, for the third time in a row.
    for unit in (1, 2):
        tail = list(lines[-unit * _REPEATS :])
        if (
            len(tail) == unit * _REPEATS
            and len("".join(tail[:unit])) >= _TELLING_CHARS
            and tail == tail[:unit] * _REPEATS
        ):
            return True
    return False


def _header_above(around: Surroundings) -> str:
    if around.cursor_line.strip():
        return ""
    return next((line for line in reversed(around.head.split("\n")) if line.strip()), "")


def find_stop_string(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first of the `stops` begins in `text`, or None."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return min(places, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of one of the `stops`."""
    longest = min(len(text), max((len(stop) for stop in stops), default=1) - 1)
    return next((size for size in range(longest, 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0)
