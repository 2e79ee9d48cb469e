"""What a piece of code defines: its kind, its name, its parameters; and which lines a definition takes.

Reads lines, indentation and brackets, so that it works for any language a little; knows no grammar. Where it finds
nothing it says so, and the explainer speaks of "this code".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from agent.context import indent_of


class Kind(StrEnum):
    """What a piece of code is."""

    FUNCTION = "function"
    CLASS = "class"
    CODE = "code"


@dataclass(frozen=True, slots=True)
class Subject:
    """What there is to explain."""

    kind: Kind
    name: str = ""
    parameters: tuple[str, ...] = ()


_MODIFIERS = (
    r"(?:(?:export|default|public|private|protected|internal|static|final|abstract|async|inline|override|virtual|"
    r"pub(?:\([^)]*\))?|unsafe|extern|const|open|sealed|partial)\s+)*"
)
_CLASS = re.compile(rf"^\s*{_MODIFIERS}(?:data\s+)?(?:class|struct|interface|enum|trait|impl)\s+([A-Za-z_$][\w$]*)")
_KEYWORD = re.compile(
    rf"^\s*{_MODIFIERS}(?:def|function\*?|fn|func|fun|sub)\s+(?:\([^)]*\)\s*)?([A-Za-z_$][\w$]*[!?]?)"
)
_ARROW = re.compile(rf"^\s*{_MODIFIERS}(?:const|let|var)\s+([A-Za-z_$][\w$]*)\s*=\s*(?:async\s*)?(?:function\b|\()")
_TYPED = re.compile(r"^\s*(?:[A-Za-z_][\w:<>,*&\[\]. ]*[\s*&])([A-Za-z_~]\w*)\s*\([^;]*$")
_BEFORE_PARAMETERS = re.compile(r"(?:= ?)?(?:async ?)?(?:function ?\w*)? ?(?:<[^()<>]*>|\[[^()]*\])? ?")
_LINE_CHARS = 400  # of a line are looked at: a longer one is data, and patterns take long over it
_NOT_NAMES = set(
    "if for while switch return catch else with new match await raise assert throw yield delete typeof go defer not and or "
    "in import from lambda case except elif del print".split()
)
_SKIPPED = {"self", "cls", "this", "&self", "&mut self", "mut self", "void"}


def subject_of(code: str) -> Subject:
    """Return what `code` defines first."""
    lines = code.split("\n")
    for number, whole in enumerate(lines):
        line = whole[:_LINE_CHARS]
        if found := _CLASS.match(line):
            return Subject(Kind.CLASS, found[1])
        for pattern in (_KEYWORD, _ARROW, _TYPED):
            found = pattern.match(line)
            if found and found[1] not in _NOT_NAMES and line.split()[0] not in _NOT_NAMES:
                rest = "\n".join([line[found.end(1) :], *lines[number + 1 :]])
                is_go = line.lstrip().startswith("func ")
                return Subject(Kind.FUNCTION, found[1], _parameters(rest, names_first=is_go))
        if line.strip() and indent_of(line) == 0 and not line.lstrip().startswith(("#", "//", "/*", "*", "@", '"""')):
            break  # code that defines nothing in its first statement
    return Subject(Kind.CODE)


def enclosing(lines: Sequence[str], line: int) -> tuple[int, int]:
    """Return the lines of the definition around a line.

    Args:
        lines: The document's lines.
        line: Index of a line.

    Returns:
        Index of its first line and of the one after its last; those of the whole document where nothing encloses it.
    """
    if not lines:
        return 0, 0
    line = min(line, len(lines) - 1)
    limit = indent_of(lines[line]) if lines[line].strip() else _indent_above(lines, line)
    for start in range(line, -1, -1):
        text = lines[start]
        if not text.strip() or (start != line and indent_of(text) >= limit and not _defines(text)):
            continue
        if _defines(text) and (start == line or indent_of(text) < limit) and _end(lines, start) > line:
            return _with_decorators(lines, start), _end(lines, start)
        if text.strip() != "{":  # on a line of its own it belongs to the header above
            limit = min(limit, indent_of(text))
    return 0, len(lines)


def _indent_above(lines: Sequence[str], line: int) -> int:
    filled = next((text for text in reversed(lines[:line]) if text.strip()), "")
    return indent_of(filled)


def _defines(line: str) -> bool:
    return subject_of(line).kind is not Kind.CODE


def _with_decorators(lines: Sequence[str], start: int) -> int:
    while start and lines[start - 1].lstrip().startswith(("@", "#[")) and lines[start - 1].strip():
        start -= 1
    return start


def _end(lines: Sequence[str], start: int) -> int:
    indent = indent_of(lines[start])
    end = start + 1
    in_header = not lines[start].rstrip().endswith((":", "{"))
    for index in range(start + 1, len(lines)):
        text = lines[index]
        if not text.strip():
            continue
        if indent_of(text) <= indent:
            closes = text.lstrip()[0] in ")]}"
            if not closes and not (in_header and text.lstrip().startswith("{")):
                break
            end = index + 1
            if closes and not text.rstrip().endswith((":", "{")):
                break
        in_header = False
        end = index + 1
    return end


def _parameters(text: str, *, names_first: bool) -> tuple[str, ...]:
    opened = text.find("(", 0, _LINE_CHARS)
    if opened < 0 or not _BEFORE_PARAMETERS.fullmatch(" ".join(text[:opened].split())):
        return ()
    parts, depth, current, quote, before = [], 0, "", "", ""
    for character in text[opened:]:
        if quote:
            quote = "" if character == quote and before != "\\" else quote
        elif character in "\"'":
            quote = character
        elif character in "([{" or (character == "<" and (before.isalnum() or before == "_")):
            depth += 1
            if depth == 1:
                before = character
                continue
        elif character in ")]}" or (character == ">" and before not in "-=" and "<" in current):
            depth -= 1
            if depth == 0:
                break
        if character == "," and depth == 1 and not quote:
            parts.append(current)
            current = ""
        else:
            current += character
        before = character
    names = (_name_of(part, names_first=names_first) for part in [*parts, current])
    return tuple(name for name in names if name)


def _name_of(part: str, *, names_first: bool) -> str:
    text = re.sub(r"#.*|//.*", "", part).strip()
    if not text or text in {"*", "/", "..."} or text in _SKIPPED:
        return ""
    before = re.split(r"=(?!=)", text)[0].strip()
    if ":" in before and "::" not in before:
        name = before.partition(":")[0].split()[-1]
    elif len(words := before.split()) > 1:
        # "count int" in Go, "int count" in C and Java.
        name = words[0] if names_first else words[-1]
    else:
        name = before
    return name.strip("*&[]?. ")
