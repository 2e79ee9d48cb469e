"""What the features of one language server share. Values and helpers, no protocol handlers."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from agent import types as agent_types
from lsp.agent_link import AgentLink
from lsp.documents import Document, Library, Units
from lsp.requests import Latest
from lsp.settings import EditorSettings

WINDOW_LINES = 64
"""The text before the cursor begins at a multiple of so many lines, so that its beginning moves rarely."""
_WINDOW_BEFORE_CHARS = 24_000  # four times what the largest usual budget of tokens takes
_WINDOW_BEHIND_CHARS = 8_000


@dataclass(slots=True)
class State:
    """One editor's documents, settings and work in progress."""

    library: Library = field(default_factory=Library)
    units: Units = Units.UTF16
    link: AgentLink = field(default_factory=AgentLink)
    settings: EditorSettings = field(default_factory=EditorSettings)
    completions: Latest = field(default_factory=Latest)
    roots: list[str] = field(default_factory=list)
    """URIs of the workspace's folders."""
    last_change: float = 0.0
    """When a document last changed, on the monotonic clock; 0 for never."""
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the background, and keep it from being collected."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def activity_ms(self) -> int:
        """Return the time since the last change of a document."""
        return int((time.monotonic() - self.last_change) * 1000) if self.last_change else 0

    def describe(self, document: Document) -> agent_types.Document:
        """Return what the daemon is told of a document."""
        return agent_types.Document(document.uri, document.version, self.path_of(document.uri), document.language)

    def path_of(self, uri: str) -> str:
        """Return a document's path as it is shown to the model: relative to the workspace where it lies in it."""
        path = unquote(urlsplit(uri).path)
        for root in self.roots:
            folder = unquote(urlsplit(root).path)
            if PurePosixPath(path).is_relative_to(folder):
                return str(PurePosixPath(path).relative_to(folder))
        return PurePosixPath(path).name

    def window(self, document: Document, offset: int) -> tuple[str, str]:
        """Return the text before and behind a place, as much as a prompt may need."""
        line = document.position(offset)[0]
        first = line - line % WINDOW_LINES
        while first > 0 and offset - document.starts[first - WINDOW_LINES] <= _WINDOW_BEFORE_CHARS:
            first -= WINDOW_LINES
        start = max(document.starts[first], offset - _WINDOW_BEFORE_CHARS)
        above, below = self.library.around(document)
        prefix = document.text[start:offset]
        if start == 0:
            prefix = above[-_WINDOW_BEFORE_CHARS:] + prefix
        suffix = document.text[offset : offset + _WINDOW_BEHIND_CHARS]
        if offset + _WINDOW_BEHIND_CHARS >= len(document.text):
            suffix += below[:_WINDOW_BEHIND_CHARS]
        return prefix, suffix
