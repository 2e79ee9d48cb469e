"""When a completion is asked for by itself, and when not. Pure: is told what time it is.

With an idle engine there is nothing to wait for: a request costs a token, and the next keystroke cancels it. What is
left are places where a completion would be in the way, and reasons to wait for the user to pause. Asking by key is never
held up. Sources: the rules that the notes of Copilot, llama.vim and Tabby describe.
"""

import re
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from agent.context import Surroundings

_FAR_CHARS = 8
"""More characters than this right of the cursor mean that the line is finished (llama.vim)."""
_AFTER_DELETION_S = 0.25  # who deletes is about to type something else; longer than between two strokes of a key
_REJECT, _ACCEPT, _HALF_LIFE_S = 1.5, 0.8, 600.0  # Copilot's
_MOST = 8.0
_PATIENCE_FROM = 2.0  # two rejections in a row and no acceptance
_PATIENCE_S = 0.01
"""For each unit above. Measured with 100 ms and a limit of 400: the share of keys with ghost text fell from 0.64 to 0.23,
and pauses, where text disturbs least, got it last."""
_SEEN_S = 0.6
"""A text that was on screen for less was not read, and is not rejected by who types on."""
_REMEMBERED = 20  # rejections; Copilot's
_SMOOTHING = 0.2
_ANSWERS = 5  # of which the middle one counts: a prompt that was cold may take seconds, and says nothing of the next
_LONGEST_WAIT_S = 0.4


def is_in_the_way(around: Surroundings) -> bool:
    """Tell whether ghost text at the cursor would stand within a word, or before much other text."""
    rest = around.suffix.partition("\n")[0]
    if around.closers or not rest.strip():
        return False
    return bool(re.match(r"\w", rest)) or len(rest.strip()) > _FAR_CHARS


@dataclass(slots=True)
class Rhythm:
    """How fast the user types, and how fast the engine answers: what is seldom in time is asked for later."""

    key_s: float = 0.3
    _last: float | None = None
    _answers_s: deque[float] = field(default_factory=lambda: deque(maxlen=_ANSWERS))

    def key(self, now: float) -> None:
        """A key was struck."""
        if self._last is not None and now - self._last < 1.0:
            self.key_s += _SMOOTHING * (now - self._last - self.key_s)
        self._last = now

    def first_text(self, took_s: float) -> None:
        """An engine's first text came so long after it was asked."""
        self._answers_s.append(took_s)

    def gave_up(self, waited_s: float) -> None:
        """No text had come after so long: that tells something only where it is longer than usual."""
        if waited_s > self._usual_s():
            self._answers_s.append(waited_s)

    def wait_s(self) -> float:
        """Return how long to wait before the engine is asked: not at all unless it is busy.

        Where its first text comes later than the second next key, most requests are cancelled unseen; then only a pause
        asks.
        """
        return min(_LONGEST_WAIT_S, self.key_s) if self._usual_s() > 2 * self.key_s else 0.0

    def _usual_s(self) -> float:
        return sorted(self._answers_s)[_ANSWERS // 2] if len(self._answers_s) == _ANSWERS else 0.0


@dataclass(slots=True)
class Patience:
    """Grows with each rejection, shrinks with each acceptance and with time."""

    factor: float = 1.0
    _at: float = 0.0
    _rejected: deque[tuple[Hashable, str]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def rejected(self, place: Hashable, text: str, now: float) -> None:
        """A text was seen and something else typed."""
        self.factor = min(_MOST, self._now(now) * _REJECT)
        self._rejected.append((place, text))

    def accepted(self, now: float) -> None:
        """A text was taken, or typed to its end."""
        self.factor = max(1.0, self._now(now) * _ACCEPT)

    def was_rejected(self, place: Hashable, text: str) -> bool:
        """Tell whether this text was rejected at this place."""
        return (place, text) in self._rejected

    def wait_s(self, now: float) -> float:
        """Return how long to wait before the engine is asked."""
        return max(0.0, (self._now(now) - _PATIENCE_FROM) * _PATIENCE_S)

    def _now(self, now: float) -> float:
        self.factor = 1 + (self.factor - 1) * 0.5 ** (max(0.0, now - self._at) / _HALF_LIFE_S)
        self._at = now
        return self.factor


@dataclass(frozen=True, slots=True)
class Shown:
    """A text on screen."""

    key: tuple[str, str]
    live: str
    text: str
    at: float

    def fate(self, key: tuple[str, str], live: str, now: float) -> bool | None:
        """Tell what became of it by what stands before the cursor now.

        Returns:
            True where it was accepted, False where it was rejected, None where that is open or cannot be told.
        """
        if key != self.key or not live.startswith(self.live) or len(live) == len(self.live):
            return None
        typed = live[len(self.live) :]
        if typed.startswith(self.text):
            return True
        if self.text.startswith(typed) or now - self.at < _SEEN_S:
            return None
        return False


def wait_after_deletion_s(deleted: bool) -> float:
    """Return how long to wait before the engine is asked, after the last change was a deletion."""
    return _AFTER_DELETION_S if deleted else 0.0
