"""What a replay saw, and the figures that follow from it. Pure; the same for every side.

`covered`           share of keystrokes before which ghost text beginning with that very key was on screen
`p50_ms`, `p90_ms`  at pauses of 400 ms and more: time from the key that began the pause to the first ghost text; a pause
                    without any counts at its full length
`tokens_per_key`    prompt tokens evaluated for each keystroke that asked for ghost text. Caches, the server's and the
                    client's, make it small: requests that they answer count in the denominator
`decoded_per_key`, `ahead_tokens_per_key`, `ahead_decoded_per_key`
                    the same for new tokens, and for what is done in advance
`cpu_s_per_key`     CPU seconds, user and system, of all processes of a side, for each keystroke
`saved_per_1000`    characters that need not be typed, of 1,000 that are: walking through the trace, ghost text is
                    accepted wherever the first line of it begins as the text that is wanted there does, for as far as
                    they agree, at the price of one key; what auto-indent would have typed anyway is not counted
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lsp.keystrokes.editor import Kind
from lsp.keystrokes.trace import PAUSE_MS, Key, Trace

_TYPED = (Kind.CHARACTER, Kind.ENTER)


@dataclass(frozen=True, slots=True)
class Step:
    """A key that was pressed."""

    key: Key
    ghost: str
    """Ghost text on screen just before; empty for none."""
    first_ms: float | None
    """Time from the key before to the first ghost text; None where none came."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a side did for a trace."""

    cpu_s: float
    requests: int
    """Keystrokes that asked for ghost text."""
    prompt_tokens: int
    decoded_tokens: int
    ahead_prompt_tokens: int
    ahead_decoded_tokens: int
    unfit: int
    """Items that do not fit the text that they are for."""
    unanswered: int
    """Requests that were never answered."""


@dataclass(frozen=True, slots=True)
class Recording:
    """The replay of one trace on one side."""

    trace: Trace
    steps: tuple[Step, ...]
    work: Work


def figures(recordings: Sequence[Recording]) -> dict[str, Any]:
    """Return the figures over some recordings of one side together."""
    strokes = [step for one in recordings for step in one.steps if step.key.kind is not Kind.JUMP]
    pauses = sorted(ms for one in recordings for ms in _pauses(one.steps))
    work = [one.work for one in recordings]
    asked = sum(one.requests for one in work)
    typed = sum(step.key.kind in _TYPED for step in strokes)
    return {
        "covered": _ratio(sum(_covers(step) for step in strokes), len(strokes), 4),
        "p50_ms": _quantile(pauses, 0.5),
        "p90_ms": _quantile(pauses, 0.9),
        "tokens_per_key": _ratio(sum(one.prompt_tokens for one in work), asked, 2),
        "cpu_s_per_key": _ratio(sum(one.cpu_s for one in work), len(strokes), 4),
        "saved_per_1000": _ratio(1000 * sum(_saved(one) for one in recordings), typed, 1),
        "decoded_per_key": _ratio(sum(one.decoded_tokens for one in work), asked, 2),
        "ahead_tokens_per_key": _ratio(sum(one.ahead_prompt_tokens for one in work), asked, 2),
        "ahead_decoded_per_key": _ratio(sum(one.ahead_decoded_tokens for one in work), asked, 2),
        "keystrokes": len(strokes),
        "pauses": len(pauses),
        "requests": asked,
        "unfit": sum(one.unfit for one in work),
        "unanswered": sum(one.unanswered for one in work),
    }


def _covers(step: Step) -> bool:
    if step.key.kind is Kind.ENTER:
        return step.ghost.startswith("\n")
    return step.key.kind is Kind.CHARACTER and step.ghost.startswith(step.key.text)


def _pauses(steps: Sequence[Step]) -> list[float]:
    """Times to ghost text at pauses that a keystroke began; behind a jump nothing was typed that could be completed."""
    found = []
    for before, step in itertools.pairwise(steps):
        length = step.key.wait_ms
        if before.key.kind is not Kind.JUMP and length >= PAUSE_MS:
            found.append(length if step.first_ms is None else min(length, step.first_ms))
    return found


def _saved(recording: Recording) -> int:
    saved = 0
    free = (0, 0)  # region and place in it from which on nothing was accepted yet
    for number, step in enumerate(recording.steps):
        key = step.key
        if key.kind is Kind.JUMP or (key.region, key.done) < free:
            continue
        agreed = _agreed(step.ghost, recording.trace.wanted(key))
        if agreed:
            free = (key.region, key.done + agreed)
            saved += _typed_until(recording.steps[number:], free) - 1
    return saved


def _agreed(ghost: str, wanted: str) -> int:
    """Length of what the first line of ghost text has in common with the text that is wanted."""
    end = ghost.find("\n", 1)  # text that begins with a new line is accepted with the line behind it
    line = ghost if end < 0 else ghost[:end]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(line, wanted, strict=False))
    return sum(1 for _ in same)


def _typed_until(steps: Sequence[Step], free: tuple[int, int]) -> int:
    """Characters that the keys type up to a place; at least 1."""
    characters = 0
    for step in steps:
        key = step.key
        width = len(key.text) or 1
        if (key.region, key.done + width) > free:
            break
        if not key.astray and key.kind in _TYPED:
            characters += width
    return max(1, characters)


def _ratio(part: float, whole: float, digits: int) -> float:
    return round(part / whole, digits) if whole else 0.0


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    """The smallest value that is not below a share `q` of all; None of none."""
    return round(ordered[max(0, math.ceil(q * len(ordered)) - 1)], 1) if ordered else None
