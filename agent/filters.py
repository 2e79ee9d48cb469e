r"""The filters of a completion's text, each a pure function of the text and its surroundings.

A filter returns the text that is left; an empty one means that nothing is shown. `postprocess` puts them in order. A
text may begin with "\n": the cursor then stands at the end of a finished line, and the text is the lines below it.
Golden cases with the cursor drawn in the text lie in tests/golden/postprocess.toml. Knows no tokens and no grammar.
"""

import re
from collections.abc import Sequence

from agent.context import Surroundings, indent_of

_VISIBLE_CHARS = 2
"""Fewer are not worth a flicker; one more keystroke is quicker than reading them."""
_DISTINCT_CHARS = 2
_INDENT = 4  # where the text above the cursor has no indentation to go by
_ECHO_SHARE = 0.05
"""Share of characters, and of words, that may differ in an echo of the next lines."""
_NEAR_CHARS = 8000
"""Text on either side of the cursor that is looked at at each showing: some two hundred lines, split in no time."""
_OVERLAP_MARKS = 2
"""Words and marks that the text and the rest of the line must share; more, where the text has others in between."""
_TELLING_CHARS = 10
"""A shorter line (`pop()`, `continue`) may well stand twice in a row."""
_BLOCK_LINES = 3
"""A block of so many lines says the same only by mistake when it comes twice in a row; shorter ones, the third time."""
_OPENERS = {"(": ")", "[": "]", "{": "}"}
_CLOSERS_LINE = re.compile(r"[)\]}]+[;,]?|\"\"\"|'''")
_VALUES = re.compile(r"\w+|[^\x00-\x7f]|[-+*/%<>=!&|^~@?]+")
"""What makes two lines different: words, operators, and symbols beyond ASCII, which stand for themselves in strings."""
_WORDS_AND_MARKS = re.compile(r"\w+|[^\w\s]")
_QUOTES = ("'", '"')
_MARKS = (":", "{", ";", ",")


def align_indent(text: str, around: Surroundings) -> str:
    """Take away blanks in front that put the line off the document's steps of indentation.

    Behind eight blanks a model may write a ninth, since " return" is one token for it. The lines below moved along with
    the first one, and move back with it. A step deeper than the cursor is left as it is.
    """
    line = around.cursor_line
    extra = len(text) - len(text.lstrip(" "))
    if not line or line.strip(" ") or not extra:
        return text
    step = _step(_above(around))
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
    """Drop a text that repeats the next one to three lines behind the cursor, but for one character in twenty.

    Another number, or another name or operator in a short text, is what the user may be about to write: no echo.
    """
    said = text.strip()
    below = [line for line in _below(around) if line.strip()]
    for count in (1, 2, 3):
        echo = "\n".join(below[:count]).strip()
        allowed = max(1, int(len(echo) * _ECHO_SHARE))
        is_near = len(echo) > allowed + 1 and _distance(said, echo, allowed) <= allowed
        if is_near and said and _says_the_same(said, echo):
            return ""
    return text


def _says_the_same(text: str, other: str) -> bool:
    words, others = _VALUES.findall(text), _VALUES.findall(other)
    if not others or re.findall(r"\d+", text) != re.findall(r"\d+", other):
        return text == other
    most = int(len(others) * _ECHO_SHARE)
    return _distance(words, others, most) <= most


def _distance(one: Sequence[str], other: Sequence[str], most: int) -> int:
    """Return the edit distance, or more than `most` where it is more."""
    # The language server needs other filters only, and would start 40 ms later.
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(one, other, score_cutoff=most)


def trim_end(text: str, around: Surroundings) -> str:
    """Cut blank space and blank lines at the end."""
    del around
    return text.rstrip()


def drop_invisible(text: str, around: Surroundings) -> str:
    """Drop a text of under two visible characters."""
    del around
    return text if len(re.sub(r"\s", "", text)) >= _VISIBLE_CHARS else ""


def normalise_indent(text: str, around: Surroundings) -> str:
    """Indent with tabs or with blanks, as most lines around the cursor do."""
    rows = text.split("\n")
    own = 1 if around.cursor_line.strip() else 0  # from this row on, indentation is the text's
    indents = [row[: len(row) - len(row.lstrip(" \t"))] for row in rows[own:]]
    if not any(indents):
        return text
    lines = [*_above(around), around.cursor_line, *_below(around)]
    tabs = sum(line.startswith("\t") for line in lines)
    blanks = sum(line.startswith("  ") for line in lines)
    if tabs > blanks:
        widths = [len(indent) for indent in indents if "\t" not in indent and len(indent) > 1]
        # By neither: aligned to something, rather than indented.
        old, new = " " * next((step for step in (4, 2) if all(not width % step for width in widths)), 0), "\t"
    else:
        old, new = "\t", " " * _step(lines)
    if tabs == blanks or not old or not any(old in indent for indent in indents):
        return text
    # A tab with blanks behind it is alignment within a document of tabs.
    moved = (indent if "\t" in indent and new == "\t" else indent.replace(old, new) for indent in indents)
    return "\n".join([*rows[:own], *(new_ + row.lstrip(" \t") for new_, row in zip(moved, rows[own:], strict=True))])


def drop_repeated_block(text: str, around: Surroundings) -> str:
    """Cut a block of lines that comes again at once, and drop a text that repeats the lines above the cursor.

    A block of three or more lines is cut when it comes the second time, a shorter one the third. The lines above the
    cursor count along, so that what was cut stays cut while the user types through the text; but where the text begins
    with lines from above and goes on differently, it is the user's own pattern.
    """
    rows, starts = _filled_rows(text, around)
    line = around.cursor_line.strip()
    above = [row.strip() for row in _above(around) if row.strip()]
    if line and text.startswith("\n"):
        above.append(line)
    known = above[-len(rows) :] if rows else []
    cut = _repeated_from([*known, *rows], len(known) + 1) - len(known)
    rows_left = rows[:cut]
    is_fresh = not line or text.startswith("\n")
    if is_fresh and rows_left and known[-len(rows_left) :] == rows_left and _tells(rows_left):
        return ""
    return text if cut >= len(rows) else text[: starts[cut]].rstrip()


def _repeated_from(rows: list[str], first: int) -> int:
    # Where the last saying of a block begins, not before the row `first`; the number of rows where none repeats.
    for start in range(first, len(rows)):
        for size in range(1, len(rows) - start + 1):
            unit = rows[start : start + size]
            before = 1 if size >= _BLOCK_LINES else 2
            begin = start - size * before
            if begin >= 0 and rows[begin] == unit[0] and rows[begin:start] == unit * before and _tells(unit):
                return start
    return len(rows)


def _tells(rows: list[str]) -> bool:
    # Closers, and numbers in a table, repeat in good code.
    said = "".join(rows)
    opens = said[0] not in ")]}" and not said.startswith("</")
    return len(said) >= _TELLING_CHARS and any(map(str.isalpha, said)) and (opens or len(rows) > 1)


def _filled_rows(text: str, around: Surroundings) -> tuple[list[str], list[int]]:
    # The filled rows, stripped, the first one with what stands before the cursor; and where each begins in the text.
    rows, starts, at = [], [], 0
    for number, row in enumerate(text.split("\n")):
        if row.strip():
            rows.append(row.strip() if number else (around.cursor_line + row).strip())
            starts.append(at)
        at += len(row) + 1
    return rows, starts


def limit_scope(text: str, around: Surroundings) -> str:
    """Cut where a line is less indented than the cursor's; a line of closers ends the block, and stays.

    `stopping` does so while a text is written. This is for texts that were written elsewhere, and are shown deeper in.
    Where a text begins on the next line, that line may be less indented, an `else` for example, and is what counts.
    """
    first, *below = text.split("\n")
    base = indent_of(around.cursor_line) if first.strip() else None
    at = len(first)
    for row in below:
        if row.strip() and base is None:
            base = indent_of(row)
        elif row.strip() and base is not None and indent_of(row) < base:
            return text[: at + 1 + len(row)] if row.lstrip()[0] in ")]}" else text[:at].rstrip()
        at += len(row) + 1
    return text


def cut_duplicate_closers(text: str, around: Surroundings) -> str:
    """Cut closers at the end that stand below the cursor already, at the same indentation, or behind it.

    Of those that the editor put behind the cursor, only the row is taken: the newline before them stays, so that they
    come to stand where the text has them.
    """
    rows = text.split("\n")
    own = 1 if around.cursor_line.strip() else 0
    lines = [around.cursor_line + rows[0], *rows[1:]]
    closing = 0
    while closing < len(rows) - own and _CLOSERS_LINE.fullmatch(lines[-1 - closing].strip()):
        closing += 1
    below = [row for row in _below(around) if row.strip()]
    for size in range(min(closing, len(below)), 0, -1):
        kept = "\n".join(rows[:-size])
        if not _opens(kept) and all(map(_closes_like, lines[-size:], below)):
            return kept.rstrip()
    last, kept = lines[-1], "\n".join(rows[:-1])
    marks = last.strip().rstrip(";,")
    is_own = _opens(kept) or (marks[:1] in _QUOTES and marks in kept)  # opened by the text itself
    if closing and kept.strip() and around.closers.strip().startswith(marks) and not is_own:
        return kept + "\n" + last[: len(last) - len(last.lstrip())]
    return text


def _closes_like(line: str, other: str) -> bool:
    return indent_of(line) == indent_of(other) and other.strip().startswith(line.strip().rstrip(";,"))


def cut_overlap(text: str, around: Surroundings) -> str:
    """Cut what stands behind the cursor on the same line already, where it is more than closers.

    At the end of the last line that is the rest of the cursor's line, or its beginning. At the end of the first line it
    is the rest also where blanks differ, or where the text has more in between: `x in sorted(xs):` before ` in xs:`.
    """
    rest = "" if around.closers else around.rest.rstrip()
    if not rest.strip():
        return text
    head, newline, last = text.rpartition("\n")
    for size in range(min(len(last), len(rest)), 0, -1):
        # The whole rest, or a part of it that ends with a word: "a" before "as f" is no overlap.
        whole_word = size == len(rest) or not (rest[size - 1].isalnum() and rest[size].isalnum())
        if not whole_word or not last.endswith(rest[:size]):
            continue
        kept = last[:-size]
        line = kept if newline else around.cursor_line + kept
        # A bracket that the text opens is closed by the rest of the line only where all of it then fits together.
        if not _opens(kept) or not _unmatched(line + rest):
            return head + newline + kept
    first = text.partition("\n")[0]
    start = _rest_within(first, rest)
    if start is None:
        return text
    return first[:start].rstrip() if rest[0].isspace() else first[:start]


def _rest_within(line: str, rest: str) -> int | None:
    # Where the words and marks of `rest` begin, which come in their order at the end of `line`.
    found = list(_WORDS_AND_MARKS.finditer(line))
    wanted = _WORDS_AND_MARKS.findall(rest)
    if found and wanted[-1] in _MARKS and found[-1][0] != wanted[-1]:
        wanted.pop()  # the text may leave out the mark that ends the line
    if len(wanted) < _OVERLAP_MARKS or not found or found[-1][0] != wanted[-1]:
        return None
    at = len(found)
    for word in reversed(wanted):
        at = next((index for index in range(at - 1, -1, -1) if found[index][0] == word), -1)
        if at < 0:
            return None
    start, extra = found[at].start(), len(found) - at - len(wanted)
    if extra and (len(wanted) <= _OVERLAP_MARKS or extra > len(wanted)):
        return None  # too little in common: `a + c * b` before ` + b` is a sum of three
    if _opens(line[:start]) or _unmatched(line[start:]) != _unmatched("".join(wanted)):
        return None  # another call's closers
    return start


def _unmatched(text: str) -> str:
    # The brackets in `text` without a partner.
    stack = ""
    for character in text:
        if stack and _OPENERS.get(stack[-1]) == character:
            stack = stack[:-1]
        elif character in _OPENERS or character in _OPENERS.values():
            stack += character
    return stack


def _opens(text: str) -> bool:
    # Whether a bracket stays open: then what closes it is the text's own.
    return any(character in _OPENERS for character in _unmatched(text))


def _step(lines: list[str]) -> int:
    return min((width for width in map(indent_of, lines) if width > 1), default=_INDENT)


def _above(around: Surroundings) -> list[str]:
    # The lines above the cursor's, as far as they are near.
    near = (around.head[-_NEAR_CHARS:] + around.live)[-_NEAR_CHARS:].split("\n")[:-1]
    return near[1:] if len(around.head) + len(around.live) > _NEAR_CHARS else near


def _below(around: Surroundings) -> list[str]:
    # The lines below the cursor's, as far as they are near.
    return around.suffix[:_NEAR_CHARS].split("\n")[1:]
