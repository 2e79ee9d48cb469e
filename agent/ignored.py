"""Which files may be read: nothing secret, nothing that git ignores, nothing that the user excludes, nothing outside.

The patterns are gitignore's, compiled by pathspec and put together here as git does it: nested files, negation, and
folders that hide all they hold. `is_ignored` is pure; `Permissions` looks at the disk. Where an ignore file cannot be
read, all that lies beside and below it counts as ignored.
"""

import logging
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agent.context import is_secret
from agent.errors import ConfigError

log = logging.getLogger(__name__)

_MAX_RULES_BYTES = 1 << 20  # the largest ignore files that people share have 50 KB
_MAX_FOLDERS = 4096  # whose rules are kept: some hundred bytes each, more than a session visits
_is_secret = lru_cache(4096)(is_secret)  # asked for every part of every path
_CHARACTER_CLASS = re.compile(r"\[[^/\]]*\[:\w+:\][^/]*?\]")


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """The compiled lines of one folder's ignore files, the last line first. Compared by identity."""

    patterns: tuple[tuple[re.Pattern[str], bool], ...]
    """What a line matches, and whether it ignores that (or takes it back)."""

    def verdict(self, path: str, *, is_folder: bool) -> bool | None:
        """Return whether a path, relative to the folder, is ignored; None where no line speaks of it."""
        name = path + "/" if is_folder else path
        for pattern, ignores in self.patterns:
            if pattern.pattern.startswith("^"):
                found = pattern.fullmatch(name) is not None
            else:  # pathspec's short forms: "." for every path, and a slash for every folder
                found = pattern.pattern == "." or is_folder
            if found:
                return ignores
        return None


def rules(lines: Iterable[str]) -> Rules:
    """Compile the lines of an ignore file. A line that is no pattern matches nothing, as with git."""
    found = [compiled for line in lines if (compiled := _compiled(line)) is not None]
    return Rules(tuple(reversed(found)))


@lru_cache(4096)
def is_ignored(parts: tuple[str, ...], chain: tuple[Rules | None, ...], *, is_folder: bool = False) -> bool:
    """Tell whether git would ignore a path.

    Args:
        parts: Names on the way from the repository's top to the file, the file's own included.
        chain: Rules of the folders on that way, as many as there are `parts`: those of the top first.
        is_folder: Whether the last part is a folder.
    """
    if len(parts) > 1 and is_ignored(parts[:-1], chain[:-1], is_folder=True):
        return True  # nothing in an ignored folder can be taken back
    for depth in range(len(chain) - 1, -1, -1):
        here = chain[depth]
        verdict = here.verdict("/".join(parts[depth:]), is_folder=is_folder) if here else None
        if verdict is not None:
            return verdict
    return False


class Permissions:
    """Knows what may be read in a workspace."""

    def __init__(self, roots: Sequence[Path], exclude: Sequence[str] = ()) -> None:
        """Take the workspace's folders.

        Args:
            roots: Folders of the workspace, absolute. Without any, nothing may be read.
            exclude: Patterns in gitignore's form, relative to each of the folders.

        Raises:
            ConfigError: A line of `exclude` is no pattern.
        """
        self.roots = tuple(dict.fromkeys(each for root in roots for each in (_lexical(root), _real(root))))
        """The folders as they were given, and what they really are."""
        for line in exclude:
            if line.strip() and not line.startswith("#") and _compiled(line) is None:
                raise ConfigError(f"the exclude list has {line!r}, which is no pattern; write it as in a .gitignore")
        self._excluded = rules(exclude)
        self._tops = {root: _repository_top(root) for root in self.roots}
        self._rules: dict[Path, tuple[object, Rules | None]] = {}

    def may_read(self, path: Path) -> bool:
        """Tell whether the text of a file may be used elsewhere. The file need not exist.

        A link is allowed only where both it and what it leads to are.
        """
        if "\0" in str(path):
            return False  # no file has such a name, and the system refuses the question
        return all(self._may_read(each) for each in dict.fromkeys((_lexical(path), _real(path))))

    def shown(self, path: Path) -> str:
        """Return a path as it is shown to the model: relative to the workspace where it lies in it."""
        path = _lexical(path)
        root = next((root for root in self.roots if path.is_relative_to(root)), None)
        return path.relative_to(root).as_posix() if root else path.name

    def _may_read(self, path: Path) -> bool:
        roots = [root for root in self.roots if path.is_relative_to(root) and path != root]
        for root in roots:
            parts = path.relative_to(root).parts
            if ".git" in parts or any(_is_secret(part) for part in parts):
                return False
            if is_ignored(parts, (self._excluded,) + (None,) * (len(parts) - 1)):
                return False
            top = self._tops[root]
            below = path.relative_to(top).parts
            folders = [top, *(top.joinpath(*below[:depth]) for depth in range(1, len(below)))]
            if is_ignored(below, tuple(self._rules_of(folder) for folder in folders)):
                return False
        return bool(roots)

    def _rules_of(self, folder: Path) -> Rules | None:
        # The repository's own exclude file is weaker than the .gitignore beside it: later lines win.
        files = (folder / ".git" / "info" / "exclude", folder / ".gitignore")
        stamp = tuple(_stamp(file) for file in files)
        known = self._rules.get(folder)
        if known is None or known[0] != stamp:
            if len(self._rules) >= _MAX_FOLDERS:
                self._rules.clear()
            known = self._rules[folder] = (stamp, _read_rules(files) if any(stamp) else None)
        return known[1]


def _compiled(line: str) -> tuple[re.Pattern[str], bool] | None:
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

    if not line.endswith("\\ "):
        line = line.rstrip()
    if _CHARACTER_CLASS.search(line):
        # "[[:alpha:]]" is not known to pathspec. Ignoring too much is safe, taking back too much is not.
        line = "" if line.startswith("!") else _CHARACTER_CLASS.sub("?", line)
    # Both match the folder itself with pathspec, which hides what negations take back below it.
    if line.endswith("/**"):
        line += "/*"
    elif line.endswith("/**/"):
        line += "*/"
    try:
        pattern = GitIgnoreSpecPattern(line)
    except (ValueError, re.error):
        return None
    if pattern.include is None or pattern.regex is None:
        return None
    return pattern.regex, pattern.include


def _read_rules(files: Iterable[Path]) -> Rules:
    lines: list[str] = []
    for file in files:
        try:
            info = file.stat()
            if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_RULES_BYTES:
                log.debug("%s is no usable ignore file: nothing below it is read", file)
                return rules(["*"])
            lines += file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            log.debug("cannot read %s (%s): nothing below it is read", file, error.strerror)
            return rules(["*"])
    return rules(lines)


def _stamp(file: Path) -> object:
    # What changes when a file does; None where there is none.
    try:
        info = os.stat(file)  # noqa: PTH116 - three times faster than Path.stat(), and asked for every folder
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.errno
    return info.st_mtime_ns, info.st_size, info.st_ino


def _repository_top(root: Path) -> Path:
    # A workspace may be a part of a repository, whose ignore files hold for it, too.
    return next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), root)


def _lexical(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - takes ".." away, which Path.absolute() leaves


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
