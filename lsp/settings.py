"""The settings that hold in one editor: the file's, with the editor's own laid over them.

Imports the settings' model late, like `agent_link`. Knows no protocol; says what is wrong, and leaves the telling to
others.
"""

import asyncio
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent.errors import ConfigError

if TYPE_CHECKING:
    from agent.config import Settings


class EditorSettings:
    """Settings that may change while the server runs."""

    def __init__(self) -> None:
        """Hold nothing until the first `current`."""
        self._changes: Mapping[str, Any] = {}
        self._settings: Settings | None = None
        self._problems: list[str] = []

    def change(self, changes: object) -> None:
        """Take the editor's settings over; they are read at the next `current`."""
        if isinstance(changes, Mapping):
            self._changes, self._problems = changes, []
        else:
            self._changes = {}
            self._problems = [] if changes is None else [f"tabwise: settings are an object, got {changes!r:.80}"]
        self._settings = None

    async def current(self) -> "Settings":
        """Return the settings that hold now."""
        if self._settings is None:
            config: Any = await asyncio.to_thread(importlib.import_module, "agent.config")
            try:
                base = config.load()
            except ConfigError as error:
                base = config.Settings()
                self._problems.append(str(error))
            self._settings, problems = config.overlay(base, self._changes)
            self._problems += problems
        return self._settings

    def take_problems(self) -> list[str]:
        """Return what was wrong, once."""
        problems, self._problems = self._problems, []
        return problems
