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
        self._options: Mapping[str, Any] = {}
        self._changes: Mapping[str, Any] = {}
        self._settings: Settings | None = None
        self._problems: list[str] = []

    def start(self, options: object) -> None:
        """Take the options over with which the editor started us; what it configures later is laid over them."""
        self._options = self._checked(options)

    def change(self, changes: object) -> None:
        """Take over what the editor is configured with now, in place of what it was; None for nothing."""
        self._changes = self._checked(changes)

    def _checked(self, given: object) -> Mapping[str, Any]:
        self._settings, self._problems = None, []
        if isinstance(given, Mapping):
            return given
        if given is not None:
            self._problems.append(f"tabwise: settings are an object, got {given!r:.80}")
        return {}

    async def current(self) -> "Settings":
        """Return the settings that hold now."""
        if self._settings is None:
            config: Any = await asyncio.to_thread(importlib.import_module, "agent.config")
            try:
                base = config.load()
            except ConfigError as error:
                base = config.Settings()
                self._problems.append(str(error))
            started, wrong = config.overlay(base, self._options)
            self._settings, problems = config.overlay(started, self._changes)
            self._problems += wrong + problems
        return self._settings

    def take_problems(self) -> list[str]:
        """Return what was wrong, once."""
        problems, self._problems = self._problems, []
        return problems
