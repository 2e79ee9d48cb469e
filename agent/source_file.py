"""Reads a source file for the command line, and finds a place in it. Lines and columns count from 1.

Knows files and text; complains in one line about what cannot be completed or explained.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from agent.errors import InputError

_PLACE = re.compile(r"^(?P<file>.+):(?P<line>\d{1,9}):(?P<column>\d{1,9})$")
_SPAN = re.compile(r"^(?P<file>.+?):(?P<start>\d{1,9})(?:-(?P<end>\d{1,9}))?$")
_LINE_END = re.compile(r"\r\n|\n|\r")
_MAX_BYTES = 16 << 20  # no source that a person edits is larger; a data file would only fill the memory

_LANGUAGES = {
    ".py": "python",
    ".pyi": "python",
    ".ts": "typescript",
    ".tsx": "typescriptreact",
    ".js": "javascript",
    ".jsx": "javascriptreact",
    ".java": "java",
    ".go": "go",
    ".rs": "rust",
    ".c": "c",
    ".h": "c",
    ".cc": "cpp",
    ".cpp": "cpp",
    ".hpp": "cpp",
    ".cs": "csharp",
    ".rb": "ruby",
    ".php": "php",
    ".sh": "shellscript",
    ".lua": "lua",
    ".kt": "kotlin",
    ".swift": "swift",
    ".html": "html",
    ".css": "css",
    ".json": "json",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".md": "markdown",
    ".sql": "sql",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A text file, whole."""

    path: Path
    text: str

    @property
    def language(self) -> str:
        """Its LSP language identifier, by the end of its name; "plaintext" where that says nothing."""
        return _LANGUAGES.get(self.path.suffix.lower(), "plaintext")

    def split_at(self, line: int, column: int) -> tuple[str, str]:
        """Return the text before and behind a place.

        Raises:
            InputError: The place lies outside of the text.
        """
        starts = [0, *(found.end() for found in _LINE_END.finditer(self.text))]
        if not 1 <= line <= len(starts):
            raise InputError(f"{self.path} has {len(starts)} lines, there is no line {line}; lines count from 1")
        start = starts[line - 1]
        found = _LINE_END.search(self.text, start)
        length = (found.start() if found else len(self.text)) - start
        if not 1 <= column <= length + 1:
            raise InputError(
                f"line {line} of {self.path} has {length} characters, there is no column {column}; columns count from 1"
            )
        place = start + column - 1
        return self.text[:place], self.text[place:]

    def lines(self, start: int, end: int) -> str:
        """Return the lines `start` to `end`, both included.

        Raises:
            InputError: There are no such lines.
        """
        lines = _LINE_END.split(self.text)
        if not 1 <= start <= end <= len(lines):
            raise InputError(f"{self.path} has {len(lines)} lines, {start}-{end} is no part of it; lines count from 1")
        return "\n".join(lines[start - 1 : end])


def read(path: Path) -> SourceFile:
    """Read a text file.

    Raises:
        InputError: It is missing, no file, too large, or no text.
    """
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise InputError(f"{path} is a directory; give a file")
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path} is a device or a pipe; give a file")
        if info.st_size > _MAX_BYTES:
            raise InputError(f"{path} has {info.st_size} bytes, at most {_MAX_BYTES} are read; give a source file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from None
    if b"\0" in data:
        raise InputError(f"{path} is a binary file (a zero byte at {data.index(0)}); give a text file")
    try:
        return SourceFile(path, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def parse_place(text: str) -> tuple[Path, int, int]:
    """Take `FILE:LINE:COL` apart.

    Raises:
        InputError: It has another form.
    """
    found = _PLACE.match(text)
    if not found:
        raise InputError(f"{text!r} is no place; write FILE:LINE:COL, both counting from 1")
    return Path(found["file"]), int(found["line"]), int(found["column"])


def parse_span(text: str) -> tuple[Path, int | None, int | None]:
    """Take `FILE[:START[-END]]` apart; None for what is not given. A file of that very name wins."""
    found = _SPAN.match(text)
    if not found or os.path.exists(text):  # noqa: PTH110 - Path.exists() raises on a name that is too long
        return Path(text), None, None
    return Path(found["file"]), int(found["start"]), int(found["end"]) if found["end"] else None
