"""What stands on screen at each moment of a replay, and the replay itself, which is the same for every side."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from lsp.keystrokes.editor import Change, Editor
from lsp.keystrokes.figures import Recording, Step, Work
from lsp.keystrokes.trace import Key, Trace


class Screen:
    """Ghost text, and when it first came after the latest key."""

    def __init__(self) -> None:
        """Show nothing."""
        self.ghost = ""
        self.found = ""
        """Ghost text that the latest key found on screen."""
        self._pressed = time.monotonic()
        self._first_ms: float | None = None

    def show(self, ghost: str) -> None:
        """Show ghost text from now on; empty for none."""
        self.ghost = ghost
        if ghost and self._first_ms is None:
            self._first_ms = (time.monotonic() - self._pressed) * 1000

    def press(self, key: Key) -> Step:
        """Note what a key finds on screen, and clear it."""
        step = Step(key, self.ghost, self._first_ms)
        self.found = self.ghost
        self.ghost, self._first_ms, self._pressed = "", None, time.monotonic()
        return step


class Side(Protocol):
    """Something that shows ghost text."""

    screen: Screen

    async def open(self, editor: Editor) -> None:
        """Show a document, and be ready for the first key."""

    def press(self, key: Key, change: Change | None, editor: Editor) -> None:
        """Take note of a key; `editor` is what it was turned into by `change`."""

    async def finish(self) -> Work:
        """Return what was done since the document was opened."""

    async def close(self) -> None:
        """End all processes."""


async def replay(trace: Trace, side: Side, advance: Callable[[float], None]) -> Recording:
    """Press the keys of a trace, each at its time.

    Args:
        trace: What to press.
        side: What shows ghost text; it is closed at the end.
        advance: Called with the seconds that have gone by.
    """
    editor = Editor(trace.text, trace.step)
    steps = []
    try:
        await side.open(editor)
        at = time.monotonic()
        for key in trace.keys:
            # On the clock: what one key takes longer is not added to the time of those that follow.
            at += key.wait_ms / 1000
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            steps.append(side.screen.press(key))
            side.press(key, editor.press(key.kind, key.text, key.to), editor)
            advance(key.wait_ms / 1000)
        return Recording(trace, tuple(steps), await side.finish())
    finally:
        await side.close()
