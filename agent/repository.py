"""Text from elsewhere in the repository that helps at the cursor: declarations, similar pieces, recent edits.

The thin shell around `declarations`, `imports`, `similar` and `ignored`: it alone reads files, as few as it can, and
keeps what it read. Made to run in a worker thread when the cursor comes to rest, not at every keystroke. Knows no
tokens: budgets are characters here, and the prompt's own budget has the last word. Files that cannot be read are
skipped. No text of theirs is logged.
"""

import logging
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Lock

from agent import imports, similar
from agent.context import is_secret, normal_newlines
from agent.declarations import Declaration, outline, render
from agent.ignored import Permissions
from agent.imports import EVERYTHING, Import
from agent.types import Snippet

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 256 << 10  # larger sources are generated or data
_MAX_NEW_BYTES = 192 << 10  # read in one call: 30 ms of parsing; the next call goes on where this one stopped
_MAX_NEW_FILES = 32  # read in one call, for disks that are slow to open files
_MAX_KEPT_FILES = 128  # kept in memory: some MB of source
_MAX_IMPORT_CHARS = 64 << 10  # of a document that are searched for imports, 10 ms of parsing; they stand at the top
_MAX_IMPORTS = 64  # of one document that are followed
_MAX_TEXTS = 24  # open documents, recent files and edits that are looked through, of each the most recent ones
_MAX_TEXT_CHARS = 256 << 10  # looked through in one call: 20 ms when all of it is new
_MAX_DETOURS = 3  # modules that pass a name on, from the import to where it is declared
_MAX_WINDOWS = 3  # similar pieces; a fourth is hardly like the cursor's text any more
_MAX_EDITS = 4
_LEAST_LINES = 3  # of a snippet that is cut to fit; what is shorter tells nothing

_SHARES = (0.5, 0.85, 1.0)
"""Of the budget that may be full after declarations, similar pieces, edits: none takes the room of all others."""
_LANGUAGES = {
    **dict.fromkeys((".py", ".pyi"), "python"),
    **dict.fromkeys((".js", ".mjs", ".cjs"), "javascript"),
    **dict.fromkeys((".ts", ".mts", ".cts"), "typescript"),
    ".jsx": "javascriptreact",
    ".tsx": "typescriptreact",
}
"""End of a file's name -> language, of the files that imports lead to."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class FileText:
    """Text that belongs to a file: an open document's, which may not be saved yet, or an edited region of it."""

    path: Path
    """Absolute."""
    text: str


class _File:
    """A file that was read, and what was found out about it."""

    def __init__(self, path: Path, text: str, stamp: object) -> None:
        self.path = path
        self.text = text
        self.stamp = stamp
        self.language = _LANGUAGES.get(path.suffix.lower(), "")

    @cached_property
    def outline(self) -> tuple[Declaration, ...]:
        return outline(self.text, self.language)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return imports.imports(self.text, self.language)


@dataclass(slots=True)
class _Visit:
    """One call: what is open, and how much may still be read."""

    open: dict[Path, str]
    left_bytes: int = _MAX_NEW_BYTES
    left_files: int = _MAX_NEW_FILES
    seen: set[tuple[Path, str]] = field(default_factory=set)
    """Modules and names that were looked for, so that modules which import each other come to an end."""


class Repository:
    """The files of a workspace. May be used from several threads; calls of `snippets` wait for each other."""

    def __init__(self, roots: Sequence[Path], exclude: Sequence[str] = ()) -> None:
        """Take a workspace; reads nothing but where its repository begins.

        Args:
            roots: Folders of the workspace, absolute. Without any, nothing is read.
            exclude: What is not to be read: patterns in gitignore's form, relative to each of the folders.

        Raises:
            ConfigError: A line of `exclude` is no pattern.
        """
        self._permissions = Permissions(roots, exclude)
        self._kept: OrderedDict[Path, _File] = OrderedDict()
        self._lock = Lock()

    def may_read(self, path: Path) -> bool:
        """Tell whether a file's text may enter another document's prompt, whether the file exists or not."""
        return self._permissions.may_read(path)

    def snippets(
        self,
        document: Path,
        language: str,
        prefix: str,
        *,
        budget_chars: int,
        suffix: str = "",
        open_documents: Sequence[FileText] = (),
        recent_files: Sequence[Path] = (),
        recent_edits: Sequence[FileText] = (),
    ) -> tuple[Snippet, ...]:
        """Return what helps at the cursor, the most useful last.

        Args:
            document: File of the cursor's document, absolute.
            language: Its LSP language identifier.
            prefix: All text before the cursor, since imports stand at the top.
            budget_chars: Most characters of all snippets together.
            suffix: All text behind the cursor.
            open_documents: What the editor has open, the most recently visited last.
            recent_files: Files that were visited and closed again, the most recently visited last.
            recent_edits: Changed regions, the newest last.
        """
        document = Path(os.path.abspath(document))  # noqa: PTH100 - takes ".." away
        if is_secret(document.name) or budget_chars <= 0:
            return ()
        prefix, suffix = normal_newlines(prefix), normal_newlines(suffix)
        others = [each for each in open_documents if each.path != document and len(each.text) <= MAX_FILE_BYTES]
        others = [each for each in others[-_MAX_TEXTS:] if self.may_read(each.path)]
        with self._lock:
            # Its own text, too: what stands in its file may be older, and is never read.
            visit = _Visit({document: prefix + suffix} | {each.path: normal_newlines(each.text) for each in others})
            declared = list(self._declared(document, language, prefix, visit, int(budget_chars * _SHARES[0])))
            texts = list(self._texts(document, recent_files, visit))
        if len(prefix) + len(suffix) <= MAX_FILE_BYTES:
            texts += [(self._permissions.shown(document), part) for part in similar.far_parts(prefix, suffix)]
        alike = similar.similar(prefix, texts, limit=_MAX_WINDOWS)
        edits = [
            Snippet(self._permissions.shown(each.path), normal_newlines(each.text))
            for each in recent_edits[-_MAX_TEXTS:]
            if each.path != document and self.may_read(each.path)
        ]
        new = similar.news(edits, [each.text for each in alike], limit=_MAX_EDITS)
        return fitted((declared, alike, new), budget_chars)

    def _declared(
        self, document: Path, language: str, prefix: str, visit: _Visit, budget_chars: int
    ) -> Iterator[Snippet]:
        # What the document imports; first what is named closest to the cursor.
        near = {found.group(): place for place, found in enumerate(_WORD.finditer(similar.around(prefix)))}
        found = imports.imports(prefix[:_MAX_IMPORT_CHARS], language)[:_MAX_IMPORTS]
        found = tuple(sorted(found, key=lambda each: near.get(each.local.rpartition(".")[2], -1), reverse=True))
        wanted: dict[Path, dict[str, None]] = {}
        files: dict[Path, _File] = {}
        n_chars = 0
        for each in found:
            if n_chars >= budget_chars:
                break
            for file, name in self._find(each, document, language, visit):
                if file.path == document:
                    continue
                names = [declared.name for declared in file.outline if declared.public] if name is None else [name]
                files[file.path] = file
                wanted.setdefault(file.path, {}).update(dict.fromkeys(names))
                n_chars += len(render(file.outline, names))
        for path, found_names in wanted.items():
            text = render(files[path].outline, sorted(found_names, key=lambda name: near.get(name, -1), reverse=True))
            if text:
                yield Snippet(self._permissions.shown(path), text)

    def _find(
        self, wanted: Import, importer: Path, language: str, visit: _Visit, detours: int = _MAX_DETOURS
    ) -> list[tuple[_File, str | None]]:
        """Return where an imported name is declared; None stands for all public names."""
        file = self._module(wanted.module, importer, language, visit)
        if wanted.name is None or wanted.name == EVERYTHING:
            return [(file, None)] if file else []
        if file and any(each.name == wanted.name for each in file.outline):
            return [(file, wanted.name)]
        if language not in imports.SCRIPTS:
            inner = self._module(imports.submodule(wanted.module, wanted.name), importer, language, visit)
            if inner:
                return [(inner, None)]
        if file is None or not detours or (file.path, wanted.name) in visit.seen:
            return []
        visit.seen.add((file.path, wanted.name))
        passed_on = [each for each in file.imports if each.local == wanted.name]
        passed_on += [Import(each.module, wanted.name, wanted.name) for each in file.imports if each.name == EVERYTHING]
        ways = (self._find(each, file.path, file.language, visit, detours - 1) for each in passed_on[:_MAX_IMPORTS])
        return next((way for way in ways if way), [])

    def _module(self, module: str, importer: Path, language: str, visit: _Visit) -> _File | None:
        bases = self._bases(importer) if language == "python" else ()
        for path in imports.candidates(module, language, importer, bases):
            if (path in visit.open or os.path.isfile(path)) and self.may_read(path):  # noqa: PTH113 - takes any name
                return self._file(path, visit)
        return None

    def _bases(self, importer: Path) -> tuple[Path, ...]:
        # Where Python's modules lie: beside the importer's outermost package, in the workspace, in its "src".
        folder = importer.parent
        while os.path.isfile(folder / "__init__.py") and folder not in self._permissions.roots:  # noqa: PTH113
            folder = folder.parent
        roots = self._permissions.roots
        return tuple(dict.fromkeys((folder, *roots, *(root / "src" for root in roots))))

    def _texts(self, document: Path, recent: Sequence[Path], visit: _Visit) -> Iterator[tuple[str, str]]:
        # The most recently visited first, as many as there is time for.
        left = _MAX_TEXT_CHARS
        closed = (path for path in reversed(recent[-_MAX_TEXTS:]) if path != document and path not in visit.open)
        open_ones = (path for path in reversed(visit.open) if path != document)
        for path in islice((*open_ones, *closed), _MAX_TEXTS):
            file = self._file(path, visit) if path in visit.open or self.may_read(path) else None
            left -= len(file.text) if file else 0
            if left < 0:
                return
            if file:
                yield self._permissions.shown(path), file.text

    def _file(self, path: Path, visit: _Visit) -> _File | None:
        # Permission was asked before.
        text = visit.open.get(path)
        stamp = text if text is not None else _stamp(path)
        if stamp is None:
            return None
        known = self._kept.get(path)
        if known is None or known.stamp != stamp:
            if visit.left_files <= 0 or visit.left_bytes <= 0:
                log.debug("%s is not read: enough for one call", path)
                return None
            text = text if text is not None else _read(path)
            visit.left_files -= 1
            visit.left_bytes -= len(text)
            known = self._kept[path] = _File(path, text, stamp)
        self._kept.move_to_end(path)
        while len(self._kept) > _MAX_KEPT_FILES:
            self._kept.popitem(last=False)
        return known


def fitted(kinds: Iterable[Sequence[Snippet]], budget_chars: int) -> tuple[Snippet, ...]:
    """Choose what fits into a budget.

    Args:
        kinds: Declarations, similar pieces, edits, each the most useful first.
        budget_chars: Most characters of all together, paths included.

    Returns:
        The chosen ones, the most useful last. What is too long loses lines at its end.
    """
    chosen: list[Snippet] = []
    left = budget_chars
    for kind, share in zip(kinds, _SHARES, strict=True):
        keep = budget_chars - int(budget_chars * share)  # for the kinds to come
        for snippet in kind:
            room = left - keep - len(snippet.path) - 2  # each stands on lines of its own
            text = snippet.text if len(snippet.text) <= room else _first_lines(snippet.text, room)
            if text:
                chosen.append(Snippet(snippet.path, text))
                left -= len(snippet.path) + len(text) + 2
    return tuple(reversed(chosen))


def _first_lines(text: str, n_chars: int) -> str:
    lines = text[: max(0, n_chars) + 1].split("\n")[:-1]
    while lines and lines[-1].lstrip().startswith("@"):
        lines.pop()  # a decorator without what it decorates
    return "\n".join(lines) if len(lines) >= _LEAST_LINES else ""


def _stamp(path: Path) -> object:
    # What changes when a file does; None where it is nothing to read.
    try:
        info = path.stat()
    except OSError as error:
        log.debug("%s is not read: %s", path, error.strerror)
        return None
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE_BYTES:
        log.debug("%s is not read: no file, or larger than %d bytes", path, MAX_FILE_BYTES)
        return None
    return info.st_mtime_ns, info.st_size


def _read(path: Path) -> str:
    # Empty where it is no text: that is kept, too, and not read again until it changes.
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)  # it may have grown meanwhile
        if b"\0" in data or len(data) > MAX_FILE_BYTES:
            log.debug("%s is not read: binary, or larger than %d bytes", path, MAX_FILE_BYTES)
            return ""
        return normal_newlines(data.decode("utf-8-sig"))
    except OSError as error:
        log.debug("%s is not read: %s", path, error.strerror)
    except UnicodeDecodeError as error:
        log.debug("%s is not read: no UTF-8 text (byte %d)", path, error.start)
    return ""
