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
from lsp.completions import Asked, Completions
from lsp.documents import Document, Library, Units
from lsp.elsewhere import Elsewhere
from lsp.requests import Latest
from lsp.settings import EditorSettings

_TOKEN_CHARS = 4  # that a token of code has on average, paths and names included; the daemon counts


@dataclass(slots=True)
class State:
    """One editor's documents, settings and work in progress."""

    library: Library = field(default_factory=Library)
    units: Units = Units.UTF16
    link: AgentLink = field(default_factory=AgentLink)
    settings: EditorSettings = field(default_factory=EditorSettings)
    completions: Completions = field(init=False)
    requests: Latest = field(default_factory=Latest)
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    roots: list[str] = field(default_factory=list)
    """URIs of the workspace's folders."""
    last_change: float = 0.0
    """When a document last changed, on the monotonic clock; 0 for never."""
    deleted: bool = False
    """Whether the last change took text away, and put none in its place."""
    refreshes: bool = False
    """Whether the client asks again when it is told that a text has grown."""
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Give the completions their line to the daemon, and to the rest of the workspace."""
        self.completions = Completions(self.link, elsewhere=self._snippets)

    async def _snippets(self, asked: Asked) -> tuple[agent_types.Snippet, ...]:
        settings = (await self.settings.current()).completion
        budget_chars = _TOKEN_CHARS * await self.link.snippet_tokens()
        if not budget_chars:
            return ()
        return await self.elsewhere.snippets(
            asked.document,
            asked.place,
            roots=self.roots,
            exclude=settings.exclude,
            others=self.library.documents.values(),
            budget_chars=budget_chars,
        )

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
