"""Drives llama.cpp's `/infill` the way the plug-in llama.vim does: what it asks, when, and what it shows.

A description in Python of the plug-in's behaviour (autoload/llama.vim), quirks included: each movement of the cursor
first looks for a cached answer, up to 128 characters back, shows it, and asks ahead for what would follow it; then it
asks for the place itself, unless that very text was asked before. Only one request runs; while it does, the latest wish
is tried again every 100 ms, and nothing is aborted.

Different here: temperature 0 is added to its samplers, since ours is greedy, too; no chunks of other places are sent
(`ring_n_chunks = 0`), which a CPU would read anew again and again. `t_max_prompt_ms` is sent as it sends it, and
llama.cpp ignores it; `t_max_predict_ms` ends an answer at a line's end.

Source: github.com/ggml-org/llama.vim. Knows no process and no socket: `Ask` is whatever answers a request.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

PREFIX_LINES, SUFFIX_LINES = 256, 64
MAX_LINE_SUFFIX = 8
CACHE_KEYS = 250
LOOK_BACK = 128
RETRY_S = 0.1
_TRIMMED_KEYS = 3  # an answer is stored under the prefix without its first one, two, three lines as well
_MAX_PROMPT_MS = 500
_MAX_PREDICT_MS, _MAX_PREDICT_AHEAD_MS = 250, 1000
_SEPARATOR = "Î"

Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class _Context:
    prefix: str
    middle: str
    suffix: str
    indent: int
    line_suffix: str

    @property
    def key(self) -> str:
        return self.prefix + self.middle + _SEPARATOR + self.suffix


@dataclass(slots=True)
class Count:
    """What the server did."""

    prompt_tokens: int = 0
    decoded_tokens: int = 0


class LlamaVim:
    """One buffer in insert mode."""

    def __init__(self, ask: Ask, show: Callable[[str], None], new_tokens: int) -> None:
        """Begin with an empty buffer.

        Args:
            ask: Sends the body of an `/infill` request and returns the answer.
            show: Called with the ghost text that is on screen from now on, empty for none.
            new_tokens: Most tokens of an answer.
        """
        self.typing, self.ahead = Count(), Count()
        self.requests = 0
        self._ask = ask
        self._show = show
        self._new_tokens = new_tokens
        self._lines: list[str] = [""]
        self._line = self._column = 0
        self._cache: OrderedDict[str, str] = OrderedDict()
        self._job: asyncio.Task[None] | None = None
        self._jobs: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._shown: list[str] | None = None
        self._can_accept = False
        self._indent_last = -1

    def moved(self, lines: list[str], line: int, column: int, *, typed: bool) -> None:
        """Take note of a document and a cursor that changed; `typed` where a keystroke did it."""
        self._lines, self._line, self._column = lines, line, column
        if typed and len(self._context(line, column).line_suffix) <= MAX_LINE_SUFFIX:
            self.requests += 1
        self._shown, self._can_accept = None, False
        self._show("")
        self._try_hint()
        self._complete(None, typed=typed)

    async def close(self) -> None:
        """Do nothing any more, once the running request is answered; raises what requests raised."""
        try:
            await asyncio.gather(*self._jobs)
        finally:
            if self._timer:
                self._timer.cancel()

    def _context(self, line: int, column: int, accepted: Sequence[str] = ()) -> _Context:
        """The text around a place, as if `accepted` had been inserted there."""
        current = self._lines[line] if line < len(self._lines) else ""
        above = self._lines[max(0, line - PREFIX_LINES + max(0, len(accepted) - 1)) : line]
        below = self._lines[line + 1 : line + 1 + SUFFIX_LINES]
        if not accepted:
            before, behind, indent = current[:column], current[column:], len(current) - len(current.lstrip())
            if not current.strip():
                before, behind, indent = "", "", 0
        else:
            whole = [current + accepted[0], *accepted[1:]]
            above += whole[:-1]
            before, behind, indent = whole[-1], "", self._indent_last
        prefix = "\n".join(above) + "\n"
        suffix = behind + "\n" + "\n".join(below) + "\n"
        return _Context(prefix, before, suffix, indent, behind)

    def _complete(self, place: tuple[int, int] | None, accepted: Sequence[str] = (), *, typed: bool = True) -> None:
        """Ask for a completion at a place; at the cursor, wherever it then is, if None."""
        if self._job:
            if self._timer:
                self._timer.cancel()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(RETRY_S, lambda: self._complete(place, accepted, typed=typed))
            return
        context = self._context(*(place or (self._line, self._column)), accepted)
        if len(context.line_suffix) > MAX_LINE_SUFFIX:
            return
        keys, prefix = [context.key], context.prefix
        for _ in range(_TRIMMED_KEYS):
            prefix = prefix.partition("\n")[2]
            if not prefix:
                break
            keys.append(prefix + context.middle + _SEPARATOR + context.suffix)
        if any(self._cached(key) is not None for key in keys):
            return
        self._indent_last = context.indent
        count = self.typing if typed and not accepted else self.ahead
        body = self._body(context, _MAX_PREDICT_AHEAD_MS if accepted else _MAX_PREDICT_MS)
        self._job = asyncio.create_task(self._run(body, keys, count))
        self._jobs.append(self._job)

    def _body(self, context: _Context, max_predict_ms: int) -> dict[str, Any]:
        return {
            "id_slot": 0,
            "input_prefix": context.prefix,
            "input_suffix": context.suffix,
            "input_extra": [],
            "prompt": context.middle,
            "n_predict": self._new_tokens,
            "stop": [],
            "n_indent": context.indent,
            "top_k": 40,
            "top_p": 0.90,
            "samplers": ["top_k", "top_p", "infill", "temperature"],
            "temperature": 0.0,
            "stream": False,
            "cache_prompt": True,
            "t_max_prompt_ms": _MAX_PROMPT_MS,
            "t_max_predict_ms": max_predict_ms,
        }

    async def _run(self, body: dict[str, Any], keys: Sequence[str], count: Count) -> None:
        try:
            answer = await self._ask(body)
            count.prompt_tokens += answer["timings"]["prompt_n"]
            count.decoded_tokens += answer["timings"]["predicted_n"]
            for key in keys:
                self._store(key, answer["content"])
            if self._shown is None or not self._can_accept:
                self._try_hint()
        finally:
            self._job = None

    def _store(self, key: str, content: str) -> None:
        if len(self._cache) > CACHE_KEYS - 1:
            self._cache.popitem(last=False)
        self._cache[key] = content
        self._cache.move_to_end(key)

    def _cached(self, key: str) -> str | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _try_hint(self) -> None:
        context = self._context(self._line, self._column)
        content = self._cached(context.key)
        if content is None:
            content = self._looked_back(context)
        if content is None:
            return
        self._shown, ghost = self._rendered(content)
        self._can_accept = bool("".join(self._shown).strip())
        self._show(ghost if self._can_accept else "")
        self._complete((self._line, self._column), self._shown)

    def _looked_back(self, context: _Context) -> str | None:
        """What is left of an answer for a place before this one; of several, (nearly always) the longest."""
        typed = context.prefix + context.middle
        found, best = None, 0
        for width in range(1, min(LOOK_BACK, len(typed)) + 1):
            content = self._cached(typed[:-width] + _SEPARATOR + context.suffix)
            if not content or not content.startswith(typed[-width:]):
                continue
            left = content[width:]
            if left and found is None:
                found = left
            elif len(left) > best:
                found, best = left, len(left)
        return found

    def _rendered(self, raw: str) -> tuple[list[str], str]:
        """Return an answer as it is accepted, by lines, and the ghost text that is seen of it."""
        content = raw.split("\n")
        while content and not content[-1]:
            content.pop()
        content = content or [""]
        line = self._lines[self._line]
        if not line.strip():
            blanks = len(content[0]) - len(content[0].lstrip())
            lead = min(blanks, len(line))
            line, content[0] = content[0][:lead], content[0][lead:]
        before, behind = line[: self._column], line[self._column :]
        if self._repeats(content, before, behind):
            content = [""]
        ghost = "\n".join(content)
        return [*content[:-1], content[-1] + behind], ghost

    def _repeats(self, content: Sequence[str], before: str, behind: str) -> bool:
        """Tell whether an answer only says again what stands behind the cursor."""
        lines, here = self._lines, self._line
        if len(content) > 1 and not content[0] and list(content[1:]) == lines[here + 1 : here + len(content)]:
            return True
        if len(content) == 1 and content[0] == behind:
            return True
        place = here + 1
        while place < len(lines) - 1 and re.fullmatch(r"\s*", lines[place]):
            place += 1
        if place >= len(lines) or before + content[0] != lines[place]:
            return False
        following = lines[place + 1 : place + len(content)]
        if len(content) == 2:
            return bool(following) and following[0].startswith(content[1])
        return list(content[1:]) == following
