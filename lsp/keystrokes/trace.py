"""How a person would type some regions of a file that exists: keys, and the time before each.

A trace begins with the file without these regions; when all keys are pressed, the file is what it was. The typist goes
from region to region in the file's order, mistypes a letter now and then, and cleans up behind the editor's automatic
brackets. Pure and seeded: the same file and seed give the same trace. Knows no completion.

Rhythm: times between keys are log-normal. Median 190 ms and sigma 0.45 give a mean of 210 ms; with the pauses, which are
drawn apart, it comes to 243 ms on the files of a package. Dhakal et al. 2018, "Observations on Typing from 136 Million
Keystrokes", found 239 ms.
"""

import itertools
import math
import random
import re
from collections import Counter
from dataclasses import dataclass

from agent.errors import InputError
from lsp.keystrokes.editor import Editor, Kind

_MEDIAN_MS, _SIGMA = 190.0, 0.45
_FASTEST_MS = 40.0  # below, two keys are one stroke of the hand
_PAUSE_MEDIAN_MS, _PAUSE_SIGMA = 900.0, 0.6
PAUSE_MS, _LONGEST_PAUSE_MS = 400.0, 3000.0
_PAUSE_AT_LINE, _PAUSE_AT_WORD, _PAUSE_ELSEWHERE = 0.35, 0.08, 0.01  # one thinks where something new begins
_AFTER_JUMP_MS, _AFTER_JUMP_SIGMA = 1000.0, 0.2  # eyes and hands come back from the mouse
_TYPO = 0.02
_NOTICED_AFTER = 2  # most keys until a typo is noticed
_REGIONS = 3
_REGION_KEYS = 50  # least keys for which it is worth to jump: two or three lines
_LINE_SLACK = 120  # a region is cut at the end of a line, and lines are not longer than that where people type them
_SPARE = 1.05  # a closer that is skipped costs no keystroke: some more lines make up for it
_STEPS = (2, 4, 8)

_INDENT = re.compile(r"[ \t]*")
_BLANK_LINE = re.compile(r"^[ \t]+$", re.MULTILINE)
_OWN_LINE_CLOSER = re.compile(r"\n[ \t]*[)\]}]")
_OPENERS = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key."""

    kind: Kind
    wait_ms: float
    """Time between the key before and this one."""
    text: str = ""
    """What is typed: one character, or a step of indentation; empty but for CHARACTER."""
    to: int = 0
    """Offset in the document to which a JUMP goes."""
    region: int = 0
    """Number of the region that is being typed."""
    done: int = 0
    """Characters of the region that stand before the cursor."""
    astray: bool = False
    """Whether what stands before the cursor is not yet, or this key does not make it, what the file says."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Keys, and the document on which they are pressed."""

    text: str
    step: str
    regions: tuple[str, ...]
    keys: tuple[Key, ...]

    def wanted(self, key: Key) -> str:
        """The text that is going to be typed from this key on; empty in the middle of a typo."""
        return "" if key.astray else self.regions[key.region][key.done :]

    def first(self, keystrokes: int) -> "Trace":
        """This trace, ended after so many keystrokes."""
        counted = itertools.accumulate(key.kind is not Kind.JUMP for key in self.keys)
        kept = tuple(key for key, count in zip(self.keys, counted, strict=True) if count <= keystrokes)
        return Trace(self.text, self.step, self.regions, kept)


def normal(text: str) -> str:
    """A text with line feeds only, and without blanks on lines that hold nothing else: editors take those away."""
    return _BLANK_LINE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def make(text: str, keystrokes: int, seed: int, name: str) -> Trace:
    """Choose regions of a file and type them.

    Args:
        text: The file, `normal`.
        keystrokes: About how many there shall be; a few more, since regions consist of whole lines.
        seed: With `name`, decides everything that is drawn by chance.
        name: The file's.

    Raises:
        InputError: The file has too few lines that a person could have typed.
    """
    rng = random.Random(f"{seed}:{name}")
    spans = _regions(text, keystrokes, rng, name)
    start = list(text)
    for first, after in reversed(spans):
        del start[first:after]
    step = step_of(text)
    typist = _Typist(Editor("".join(start), step), rng)
    targets = tuple(text[first:after] for first, after in spans)
    for (first, _), target in zip(spans, targets, strict=True):
        typist.type_region(first, target)
    return Trace("".join(start), step, targets, tuple(typist.keys))


def step_of(text: str) -> str:
    """One step of indentation of a file: the commonest difference between a line and a deeper one behind it."""
    indents = [line[: len(line) - len(line.lstrip(" \t"))] for line in text.split("\n") if line.strip()]
    if sum(indent.startswith("\t") for indent in indents) * 2 > sum(indent != "" for indent in indents):
        return "\t"
    deeper = Counter(len(b) - len(a) for a, b in itertools.pairwise(indents) if len(b) - len(a) in _STEPS)
    return " " * (deeper.most_common(1)[0][0] if deeper else 4)


def _regions(text: str, keystrokes: int, rng: random.Random, name: str) -> list[tuple[int, int]]:
    """Choose spans, each from the end of a line to the end of a later one, one in each part of the file."""
    lines = text.split("\n")
    effort = list(itertools.accumulate((len(line.strip()) + 1 for line in lines), initial=0))
    ends = list(itertools.accumulate(len(line) + 1 for line in lines))
    most = max(1, min(_REGIONS, keystrokes // _REGION_KEYS))
    for count in range(most, 0, -1):
        bounds = [len(lines) * part // count for part in range(count + 1)]
        chosen: list[tuple[int, int]] = []
        left = keystrokes * _SPARE
        for part, (low, high) in enumerate(itertools.pairwise(bounds)):
            found = _spans_of_lines(lines, effort, max(1, low), high, left / (count - part))
            if not found:
                break
            first, last = rng.choice(found)
            chosen.append((ends[first - 1] - 1, ends[last] - 1))
            left -= effort[last + 1] - effort[first]
        else:
            return chosen
    raise InputError(
        f"{name} has no lines for {keystrokes} keystrokes of typing ({len(lines)} lines, {len(text)} characters); "
        "give a longer file of ordinary lines, or fewer --keys"
    )


def _spans_of_lines(lines: list[str], effort: list[int], low: int, high: int, share: float) -> list[tuple[int, int]]:
    """All first and last lines of regions within [low, high) that take about `share` keystrokes."""
    found = []
    last = low
    for first in range(low, high):
        if not lines[first].strip():
            continue
        last = max(last, first)
        while last < high and effort[last + 1] - effort[first] < share:
            last += 1
        if last == high:
            break
        if effort[last + 1] - effort[first] <= share + _LINE_SLACK and lines[last].strip():
            found.append((first, last))
    return found


class _Typist:
    """Presses keys until a region stands in the document."""

    def __init__(self, editor: Editor, rng: random.Random) -> None:
        self.keys: list[Key] = []
        self._editor = editor
        self._rng = rng
        self._region = -1
        self._done = 0
        self._jumped = False

    def type_region(self, start: int, target: str) -> None:
        """Type `target`, which begins with the end of a line, at the offset `start`."""
        self._region += 1
        self._done = 0
        behind = len(self._editor.text) - start
        self._press(Kind.JUMP, to=start)
        self._jumped = True
        while True:
            # What the editor put between the cursor and the file's true rest.
            automatic = self._editor.text[self._editor.cursor : len(self._editor.text) - behind]
            rest = target[self._done :]
            skipped = _OWN_LINE_CLOSER.match(automatic)
            if automatic and not _is_wanted(automatic, rest):
                self._press(Kind.DELETE, astray=True)
            elif not rest:
                return
            elif skipped and rest.startswith(skipped[0]) and self._editor.line_before.strip():
                self._press(Kind.JUMP, to=self._editor.cursor + len(skipped[0]))
                self._done += len(skipped[0])
            elif rest[0] == "\n":
                self._new_line(target)
            else:
                self._character(rest)

    def _new_line(self, target: str) -> None:
        self._press(Kind.ENTER)
        self._done += 1
        found = _INDENT.match(target, self._done)
        indent = found[0] if found else ""
        if target[self._done : self._done + 1] in ("\n", ""):
            return  # the blanks of auto-indent go with the next Enter
        while not indent.startswith(self._editor.line_before):
            self._press(Kind.BACKSPACE, astray=True)
        have = len(self._editor.line_before)
        self._done += have
        step = self._editor.step
        while have < len(indent):
            blanks = step if indent.startswith(step, have) else indent[have]
            self._press(Kind.CHARACTER, blanks)
            self._done += len(blanks)
            have += len(blanks)

    def _character(self, rest: str) -> None:
        right = rest[0]
        if right.isascii() and right.islower() and self._rng.random() < _TYPO:
            wrong = self._rng.choice([letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter != right])
            word = re.match(r"\w*", rest[1:])
            more = word[0][: self._rng.randint(0, _NOTICED_AFTER)] if word else ""
            for character in wrong + more:
                self._press(Kind.CHARACTER, character, astray=True)
            for _ in wrong + more:
                self._press(Kind.BACKSPACE, astray=True)
        self._press(Kind.CHARACTER, right)
        self._done += 1

    def _press(self, kind: Kind, text: str = "", to: int = 0, *, astray: bool = False) -> None:
        key = Key(kind, self._wait_ms(text), text, to, self._region, self._done, astray)
        self._editor.press(kind, text, to)
        self._jumped = False
        self.keys.append(key)

    def _wait_ms(self, text: str) -> float:
        draw = self._rng.lognormvariate
        if self._jumped:
            return draw(math.log(_AFTER_JUMP_MS), _AFTER_JUMP_SIGMA)
        if self._rng.random() < self._pause_probability(text):
            pause = draw(math.log(_PAUSE_MEDIAN_MS), _PAUSE_SIGMA)
            return min(_LONGEST_PAUSE_MS, max(PAUSE_MS, pause))
        return max(_FASTEST_MS, draw(math.log(_MEDIAN_MS), _SIGMA))

    def _pause_probability(self, text: str) -> float:
        before = self._editor.line_before
        if text.strip() and not before.strip():
            return _PAUSE_AT_LINE
        begins = re.match(r"\w", text) and not re.search(r"\w$", before)
        return _PAUSE_AT_WORD if begins else _PAUSE_ELSEWHERE


def _is_wanted(automatic: str, rest: str) -> bool:
    """Tell whether the first closer that the editor put behind the cursor has its place in what is still to be typed."""
    if automatic[0] in "\"'":
        return automatic[0] in rest.split("\n", 1)[0]
    own_line = _OWN_LINE_CLOSER.match(automatic)
    closer = own_line[0][-1] if own_line else automatic[0]
    if closer not in _OPENERS:
        return False
    depth = 0
    for place, character in enumerate(rest):
        if character == _OPENERS[closer]:
            depth += 1
        elif character == closer and depth:
            depth -= 1
        elif character == closer:
            return own_line is None or rest[: place + 1].endswith(own_line[0])
    return False
