"""Which text goes into a prompt: pure functions over strings, under a budget of tokens.

Knows no tokenizer: whoever has one counts, and asks here for a shorter text until it fits. Prefixes lose whole blocks
of lines from their beginning, so that their start stays put while the user types and the key-value cache stays good.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath

BLOCK_LINES = 16
"""Lines that a prefix loses at a time: about 160 tokens, so that the start moves once in 16 new lines."""

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_CLOSERS_ONLY = re.compile(r"""^[ \t]*[)>}\]"'`]+[ \t]*[:{;,]?[ \t]*$""")
_SECRET_FILES = (
    "*.env",
    ".env*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.keystore",
    "*.jks",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    "_netrc",
    ".pgpass",
    ".htpasswd",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    "credentials",
    "credentials.*",
    "secrets.*",
    "*.kdbx",
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The text around a cursor, cut where the prompt needs it cut."""

    head: str
    """Lines above the anchor."""
    live: str
    """From the anchor to the cursor."""
    suffix: str
    """Behind the cursor, without `closers`."""
    closers: str
    """Rest of the line, where it holds closers only (which editors insert by themselves); else empty."""

    @property
    def cursor_line(self) -> str:
        """Text on the cursor's line, before the cursor."""
        return (self.head + self.live).rpartition("\n")[2]

    @property
    def rest(self) -> str:
        """Text on the cursor's line, behind the cursor."""
        return self.closers or self.suffix.partition("\n")[0]


@lru_cache(1024)  # asked with each key, and pathlib takes 0.2 ms to match all patterns
def is_secret(path: str) -> bool:
    """Tell whether a file's name says that it holds secrets; such text never enters a prompt."""
    name = PurePosixPath(path.replace("\\", "/")).name.lower()
    return any(PurePosixPath(name).match(pattern) for pattern in _SECRET_FILES)


def surroundings(prefix: str, suffix: str, anchor: int | None = None) -> Surroundings:
    r"""Cut the text around a cursor.

    Line ends come out as "\n", since models hardly ever saw others.

    Args:
        prefix: Text before the cursor.
        suffix: Text behind the cursor.
        anchor: Characters of `prefix` above the live text; None for the start of the cursor's line.
    """
    above = normal_newlines(prefix if anchor is None else prefix[: max(0, anchor)])
    prefix, suffix = normal_newlines(prefix), normal_newlines(suffix)
    cut = above.rfind("\n") + 1
    head, live = prefix[:cut], prefix[cut:]
    rest, newline, below = suffix.partition("\n")
    if _CLOSERS_ONLY.match(rest):
        return Surroundings(head, live, newline + below, rest.rstrip())
    return Surroundings(head, live, suffix, "")


def normal_newlines(text: str) -> str:
    r"""Return `text` with "\n" for every end of line."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def shorter_head(text: str, n_tokens: int, budget: int) -> str:
    """Return a shorter prefix that keeps the text next to the cursor.

    Args:
        text: Text of `n_tokens` tokens.
        n_tokens: More than `budget`.
        budget: Tokens that it shall have. The result may have more still: count, and ask again.

    Returns:
        The end of `text`, shorter by at least one character; whole blocks of lines are dropped while there are any.
    """
    keep = len(text) * budget // n_tokens
    lines = _LINES.findall(text)  # not splitlines(), which takes form feeds and U+2028 for ends of lines
    for step in (BLOCK_LINES, 1):
        dropped, length = 0, len(text)
        while length > keep and len(lines) - dropped > step:
            length -= sum(len(line) for line in lines[dropped : dropped + step])
            dropped += step
        if length <= keep:
            return text[len(text) - length :]
    return text[len(text) - keep :] if keep else ""


def shorter_tail(text: str, n_tokens: int, budget: int) -> str:
    """Return a shorter suffix that keeps the text next to the cursor: its beginning, whole lines where possible."""
    keep = len(text) * budget // n_tokens
    cut = text.rfind("\n", 0, keep) + 1
    return text[: cut or keep]


def wants_block(around: Surroundings) -> bool:
    """Tell whether several lines fit at the cursor: where a block begins, or at the open end of one.

    Never where something other than closers stands behind the cursor, and never in the first column, where a new
    definition would run on without end.
    """
    line = around.cursor_line
    if around.rest.strip():
        return False
    if line.strip():
        return line.rstrip().endswith((":", "{"))
    above = _last_filled(around.head)
    if above.rstrip().endswith((":", "{", "=>")):
        return True
    below = next((text for text in around.suffix.split("\n") if text.strip()), "")
    return indent_of(line) > 0 and indent_of(line) > indent_of(below)


def indent_of(line: str) -> int:
    """Return the width of a line's indentation, a tab counted to the next multiple of 8."""
    width = 0
    for character in line:
        if character == " ":
            width += 1
        elif character == "\t":
            width += 8 - width % 8
        else:
            break
    return width


def _last_filled(text: str) -> str:
    return next((line for line in reversed(text.split("\n")) if line.strip()), "")
