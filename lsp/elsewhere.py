"""What stands elsewhere and helps at a cursor: the workspace's files, other open documents, what was edited lately.

Keeps track of visits and edits, and asks `agent.repository`, in a thread, for what fits. What was chosen for a place
stays the same near it and for a while: a prompt begins with it, and another choice would mean to read all of it anew.
Knows no protocol and no tokens.
"""

import asyncio
import importlib
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pygls.uris import to_fs_path

from agent.errors import ConfigError
from agent.types import Snippet
from lsp.documents import Document, Place

if TYPE_CHECKING:
    from agent.repository import FileText, Repository

log = logging.getLogger(__name__)

_SAME_LINES = 64  # so far from where it was chosen a choice stands, as the text above in a prompt does
_SAME_S = 300.0
_CHOICES = 64  # documents for which the choice is kept
_VISITS = 24  # closed files that are remembered; the repository looks at no more
_EDITS = 8
_ONE_EDIT_LINES = 8  # edits that lie no further apart are one
_AROUND_EDIT_LINES = 2  # that are kept above and below, to tell where it was


@dataclass(frozen=True, slots=True)
class Edit:
    """Lines of a document that were edited one after the other."""

    document: Document
    first: int
    last: int

    def takes(self, document: Document, first: int, last: int) -> bool:
        """Tell whether another edit belongs to this one."""
        near = first <= self.last + _ONE_EDIT_LINES and last >= self.first - _ONE_EDIT_LINES
        return document.uri == self.document.uri and near

    @property
    def text(self) -> str:
        """The lines, with some around them."""
        lines = self.document.lines[max(0, self.first - _AROUND_EDIT_LINES) : self.last + 1 + _AROUND_EDIT_LINES]
        return "".join(lines)


class Edits:
    """What was edited lately, region by region. Pure."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._edits: deque[Edit] = deque(maxlen=_EDITS)

    def note(self, document: Document, first: int, last: int) -> None:
        """Lines `first` to `last` of `document`, as it is now, were written."""
        now = Edit(document, first, last)
        if self._edits and self._edits[-1].takes(document, first, last):
            before = self._edits.pop()
            grown = document.n_lines - before.document.n_lines
            now = replace(now, first=min(before.first, first), last=max(before.last + grown, last))
        # What was written there before is no text of the document's any more.
        older = [each for each in self._edits if not each.takes(document, now.first, now.last)]
        self._edits = deque((*older, now), maxlen=_EDITS)

    def forget(self, uri: str) -> None:
        """Forget what was edited in a document: it was closed, and may not have been saved."""
        self._edits = deque((each for each in self._edits if each.document.uri != uri), maxlen=_EDITS)

    def latest(self) -> tuple[Edit, ...]:
        """Return the edits, the newest last."""
        return tuple(self._edits)


@dataclass(frozen=True, slots=True)
class _Choice:
    scope: tuple[tuple[str, ...], tuple[str, ...]]
    snippets: tuple[Snippet, ...]
    line: int
    at: float


class Elsewhere:
    """The rest of one editor's workspace."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Look at nothing yet."""
        self.edits = Edits()
        self._clock = clock
        self._visited: OrderedDict[Path, None] = OrderedDict()
        self._choices: OrderedDict[str, _Choice] = OrderedDict()
        self._repository: Repository | None = None
        self._scope: tuple[tuple[str, ...], tuple[str, ...]] | None = None

    def edited(self, document: Document, first: int, last: int) -> None:
        """Lines of a document, as it is now, were written."""
        if document.uri.startswith("file:"):
            self.edits.note(document, first, last)

    def closed(self, uri: str) -> None:
        """A document was closed: it was visited."""
        self._choices.pop(uri, None)
        self.edits.forget(uri)
        path = path_of(uri)
        if path is not None:
            self._visited[path] = None
            self._visited.move_to_end(path)
            while len(self._visited) > _VISITS:
                self._visited.popitem(last=False)

    async def snippets(
        self,
        document: Document,
        place: Place,
        *,
        roots: Iterable[str],
        exclude: Iterable[str],
        others: Iterable[Document],
        budget_chars: int,
    ) -> tuple[Snippet, ...]:
        """Return what helps at a cursor, the most useful last; nothing for what is no file.

        Args:
            document: The cursor's document.
            place: The cursor.
            roots: URIs of the workspace's folders.
            exclude: What is not to be read: patterns in gitignore's form.
            others: Open documents, the most recently visited last.
            budget_chars: Most characters of all together.
        """
        path, now = path_of(document.uri), self._clock()
        if path is None:
            return ()
        scope = (tuple(roots), tuple(exclude))
        known = self._choices.get(document.uri)
        if known and known.scope == scope and abs(known.line - place.line) <= _SAME_LINES and now - known.at < _SAME_S:
            return known.snippets
        # Copied here, since the thread must not see what changes meanwhile.
        recent, edits, opened = tuple(self._visited), self.edits.latest(), tuple(others)
        repository = await self._opened(scope)
        texts = (opened, recent, edits)
        try:
            found = await asyncio.to_thread(_find, repository, document, path, place, budget_chars, *texts)
        except Exception as error:  # noqa: BLE001 - parsers and disks of all kinds; a prompt without it is none the worse
            log.error("nothing of other files is taken: %s", type(error).__name__)
            found = ()
        self._choices[document.uri] = _Choice(scope, found, place.line, now)
        self._choices.move_to_end(document.uri)
        while len(self._choices) > _CHOICES:
            self._choices.popitem(last=False)
        return found

    async def _opened(self, scope: tuple[tuple[str, ...], tuple[str, ...]]) -> "Repository":
        if self._repository is None or scope != self._scope:
            # With tree-sitter: too long for the server's start.
            module: Any = await asyncio.to_thread(importlib.import_module, "agent.repository")
            folders = [folder for folder in map(path_of, scope[0]) if folder is not None]
            try:
                self._repository = module.Repository(folders, scope[1])
            except ConfigError as error:
                log.error("nothing of other files is read: %s", error)
                self._repository = module.Repository([])
            self._scope = scope
        return self._repository


def _find(
    repository: "Repository",
    document: Document,
    path: Path,
    place: Place,
    budget_chars: int,
    opened: tuple[Document, ...],
    recent: tuple[Path, ...],
    edits: tuple[Edit, ...],
) -> tuple[Snippet, ...]:
    module: Any = importlib.import_module("agent.repository")
    texts = [(path_of(each.uri), each.text) for each in opened]
    changed = [(path_of(each.document.uri), each.text) for each in edits]
    return repository.snippets(
        path,
        document.language,
        document.between(Place(0, 0), place),
        budget_chars=budget_chars,
        suffix=document.between(place, document.end),
        open_documents=_file_texts(module.FileText, texts),
        recent_files=recent,
        recent_edits=_file_texts(module.FileText, changed),
    )


def _file_texts(kind: type["FileText"], texts: Iterable[tuple[Path | None, str]]) -> list["FileText"]:
    return [kind(path, text) for path, text in texts if path is not None]


def path_of(uri: str) -> Path | None:
    """Return the file that a URI names; None where it is no file of this machine's."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        return None
    path = to_fs_path(f"file://{parts.path}")
    if not path:
        return None
    return Path(os.path.abspath(path))  # noqa: PTH100 - takes ".." away
