"""From a request to a completion: prompt, engine, stop rules, filters.

Knows the order of these steps, and nothing of HTTP or of the editor. Streams what is sure to stay; the `Completion` at
the end is what counts, since filters see the whole text only then.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from enum import StrEnum

from agent import base_facts, context, filters, fim, healing, postprocess, stopping, syntax
from agent.config import CompletionSettings
from agent.context import Surroundings
from agent.engines.base import Decoded, Finished, GenerationRequest, Prefilled, Token
from agent.errors import EngineError
from agent.loaded import LoadedModel
from agent.types import Completion, CompletionRequest, Generation, Snippet, Source, StopReason, Timing, Trigger

_TOKEN_CHARS = 6  # more than a token of code has on average: what is longer by this need not be counted to be too long
_TRIES_TO_FIT = 8  # each halves the error of the estimate; more are never needed
_BRIEF = 4  # a quarter of the usual prompt is read in 1.2 s on two cores: the pause after a jump is about as long
_SNIPPET_TOKENS, _SNIPPET_TOKENS_GPU = 256, 1024  # read in pauses only: 2.5 s on two cores, a tenth of one on a GPU
_FRAME_TOKENS = 64  # for sentinels and the paths of snippets
_DETOURS = 4  # healed tokens that may be forced before the text is taken as it stands


class Layout(StrEnum):
    """How the text before the cursor stands in the prompt; the others are there to be measured against the default."""

    ORDINARY = "ordinary"
    """All of it before the suffix."""
    LINE = "line"
    """From the anchor on behind the suffix, as it stands."""
    HEALED = "healed"
    """The same, without its last tokens, which are written anew."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A completion, and how it came about."""

    completion: Completion
    generation: Generation | None
    """None where the engine was not asked."""


@dataclass(slots=True)
class Spent:
    """What requests cost the engine, whether they came to their end or not."""

    requests: int = 0
    prompt_tokens: int = 0
    """Prompt tokens that had to be computed."""
    decoded_tokens: int = 0

    def add(self, trace: "_Trace") -> None:
        """Add one request."""
        self.requests += 1
        self.prompt_tokens += trace.prefill_tokens
        self.decoded_tokens += trace.decoded_tokens


@dataclass(slots=True)
class _Trace:
    """What happened at the engine, as it happens."""

    adapter: str | None = None
    """What it is asked with, from the beginning of the answer to its end."""
    prompt_ids: tuple[int, ...] = ()
    output_ids: list[int] = field(default_factory=list)
    output_logps: list[float] = field(default_factory=list)
    exact: bool = True
    prefill_tokens: int = 0
    cached_tokens: int | None = None
    decoded_tokens: int = 0
    ended: bool = False
    brief: bool = False
    """Whether the prompt is a short one."""
    healed: bool = False
    """Whether the model has written again what was taken back."""
    gave_way: bool = False
    """Whether the engine was wanted by somebody who waits."""
    _read_tokens: int | None = None
    """How much of the prompt under way is in the cache; None before the engine has told."""

    def begin(self, prompt_ids: tuple[int, ...]) -> None:
        """Ask anew, from another prompt; what it cost so far still counts."""
        self.prompt_ids, self.output_ids, self.output_logps = prompt_ids, [], []
        self.exact, self.ended, self.healed = True, False, False

    def asked(self) -> None:
        """A prompt is handed to the engine."""
        self._read_tokens = None

    def prefilled(self, event: Prefilled) -> None:
        """Count a prompt's tokens: those that had to be computed add up, the cache's are the first prompt's."""
        if self._read_tokens is None:
            self._read_tokens = event.cached_tokens
        if self.cached_tokens is None:
            self.cached_tokens = event.cached_tokens
        self.prefill_tokens += max(0, event.done_tokens - self._read_tokens)
        self._read_tokens = max(self._read_tokens, event.done_tokens)

    def finished(self, event: Finished) -> None:
        """Take note of how a stream of the engine's ended."""
        self.ended, self.gave_way = event.ended, event.gave_way

    def decoded(self, event: Decoded) -> None:
        """Count tokens that belong to the output."""
        self.output_ids += event.ids
        self.output_logps += event.logps
        self.exact = self.exact and event.exact
        self.decoded_tokens += len(event.ids)


async def complete(
    loaded: LoadedModel,
    request: CompletionRequest,
    settings: CompletionSettings,
    spent: Spent | None = None,
    layout: Layout = Layout.HEALED,
    adapter: str | None = None,
) -> AsyncGenerator[str | Completed, None]:
    """Answer a request.

    Args:
        loaded: Model to ask.
        request: What is wanted.
        settings: Budgets.
        spent: Is told what it cost, even if the work is cancelled.
        layout: How the prompt is laid out.
        adapter: Name of an attached adapter to ask; it must stay attached until the end. None for the bare model.

    Returns:
        Parts of the text as soon as they are sure to stay, then one `Completed`. Closing it cancels the work.

    Raises:
        EngineError: The engine broke or refused.
    """
    started = time.perf_counter()
    if context.is_secret(request.document.path):
        nothing = Timing(_ms(started), None, 0, 0, 0)
        yield Completed(
            Completion(request.id, "", Source.ENGINE, StopReason.END, nothing, dropped_by="is_secret", adapter=adapter),
            None,
        )
        return
    around = context.surroundings(request.prefix, request.suffix, request.anchor)
    multiline = _wants_block(request, around) if request.multiline is None else request.multiline
    rules = stopping.rules_for(around, multiline=multiline, max_lines=settings.block_lines)
    trace = _Trace(adapter, brief=request.brief)
    text, told, first_text_ms = "", "", None
    stop: stopping.Stop | None = None
    budget = _budget(loaded, request, settings, multiline=multiline)
    try:
        async with aclosing(_write(loaded, around, request, settings, budget, trace, layout)) as parts:
            async for part in parts:
                text += part
                if first_text_ms is None and text.strip():
                    first_text_ms = _ms(started)
                stop = stopping.find_stop(text, rules)
                sure = text[: stop.end if stop else _sure(text, multiline=multiline)]
                if (settled := filters.align_indent(sure, around)).startswith(told) and settled != told:
                    yield settled[len(told) :]
                    told = settled
                if stop:
                    break
    finally:
        if spent is not None:
            spent.add(trace)
    whole, reason = _ending(text, stop, rules, ended=trace.ended)
    if trace.gave_way:
        reason = StopReason.CANCELLED
    settled, dropped_by = postprocess.settle(whole, around, cut_short=reason is StopReason.BUDGET)
    shown, hidden_by = postprocess.present(settled, around)
    completion = Completion(
        request.id,
        shown,
        Source.ENGINE,
        reason,
        Timing(_ms(started), first_text_ms, trace.prefill_tokens, trace.cached_tokens or 0, trace.decoded_tokens),
        postprocess.replaced_chars(shown, around),
        dropped_by or hidden_by,
        settled,
        _beyond(text, whole, settled),
        trace.brief,
        adapter,
    )
    yield Completed(completion, _facts(loaded, request.id, trace))


def _wants_block(request: CompletionRequest, around: Surroundings) -> bool:
    # Who asks by key waits gladly for more, and may take its first line alone; but not in the middle of a line.
    if request.trigger is Trigger.MANUAL and not around.rest.strip():
        return True
    # The indentation is asked first: it costs nothing, and a block is only possible where it says so.
    if not context.wants_block(around):
        return False
    known = syntax.wants_block(request.document.language, request.prefix, request.suffix)
    return True if known is None else known


def _budget(loaded: LoadedModel, request: CompletionRequest, settings: CompletionSettings, *, multiline: bool) -> int:
    if request.max_tokens == 0:
        return 0
    allowed = request.max_tokens or (settings.block_tokens if multiline else settings.line_tokens)
    return max(1, min(allowed, loaded.engine.context_tokens // 4))


def _beyond(text: str, whole: str, settled: str) -> str:
    # Only what stands directly behind the text that is kept, and of it whole lines only.
    if not settled or not whole.startswith(settled) or whole[len(settled) :].strip():
        return ""
    return text[len(settled) :].rpartition("\n")[0]


def _ending(text: str, stop: stopping.Stop | None, rules: stopping.StopRules, *, ended: bool) -> tuple[str, StopReason]:
    stop = stop or stopping.find_stop(text, rules, final=True)
    if stop:
        return text[: stop.end], stop.reason
    if ended:
        return text, StopReason.END
    return (stopping.whole_lines(text) if rules.multiline else text), StopReason.BUDGET


def _sure(text: str, *, multiline: bool) -> int:
    # Of a block, a line below the first is only sure once the next has begun: the rules look at whole lines.
    return text.rfind("\n") if multiline and "\n" in text else len(text)


async def _write(
    loaded: LoadedModel,
    around: Surroundings,
    request: CompletionRequest,
    settings: CompletionSettings,
    budget: int,
    trace: _Trace,
    layout: Layout,
) -> AsyncGenerator[str, None]:
    """Yield the model's text behind the cursor, as it comes.

    The last tokens before the cursor are taken back and must be written again (see `healing`). Where the likeliest
    token does not do that, the likeliest one that does is taken; where none does, less is taken back, and in the end
    nothing.
    """
    if layout is Layout.ORDINARY:
        around = replace(around, head=around.head + around.live, live="")
    prompt_ids, live = await _prompt(loaded, around, request, settings, budget)
    unread = len(prompt_ids) - loaded.engine.held(prompt_ids, trace.adapter)
    if request.impatient and not request.brief and unread > len(prompt_ids) // _BRIEF:
        # It was pushed out by other places or other editors, or the model was away: a short one is read sooner.
        trace.brief = True
        prompt_ids, live = await _prompt(loaded, around, replace(request, brief=True, snippets=()), settings, budget)
    if not budget:
        trace.begin((*prompt_ids, *(token.id for token in live)))
        await _read(loaded, request, trace)
        return
    for healed in healing.candidates(live) if layout is Layout.HEALED else ():
        trace.begin((*prompt_ids, *healed.kept_ids))
        async with aclosing(_healed(loaded, healed, budget, trace, ahead=request.ahead)) as parts:
            async for part in parts:
                yield part
        if trace.healed or trace.gave_way:
            return
    live_ids = tuple(token.id for token in live)
    trace.begin((*prompt_ids, *live_ids))
    async with aclosing(_unhealed(loaded, budget, trace, ahead=request.ahead)) as parts:
        async for part in parts:
            yield part


async def _read(loaded: LoadedModel, request: CompletionRequest, trace: _Trace) -> None:
    """Have the prompt read into the cache, and nothing written."""
    trace.asked()
    ask = GenerationRequest(trace.prompt_ids, 0, adapter=trace.adapter, ahead=request.ahead)
    async with aclosing(loaded.engine.generate(ask)) as stream:
        async for event in stream:
            if isinstance(event, Prefilled):
                trace.prefilled(event)
            elif isinstance(event, Finished):
                trace.finished(event)


async def _healed(
    loaded: LoadedModel, healed: healing.Healed, budget: int, trace: _Trace, *, ahead: bool
) -> AsyncGenerator[str, None]:
    """Yield the text behind the one that was taken back; nothing where the model cannot be brought to write that."""
    wanted, said = healed.wanted, ""
    for _ in range(_DETOURS):
        detour = None
        ask = GenerationRequest(
            prompt_ids=(*trace.prompt_ids, *trace.output_ids),
            max_tokens=max(1, budget - len(trace.output_ids)),
            alternatives=healing.N_ALTERNATIVES,
            adapter=trace.adapter,
            ahead=ahead,
        )
        trace.asked()
        async with aclosing(loaded.engine.generate(ask)) as stream:
            async for event in stream:
                if isinstance(event, Prefilled):
                    trace.prefilled(event)
                elif isinstance(event, Finished):
                    trace.finished(event)
                elif event.ids[-1] in loaded.stop_ids:
                    trace.ended = True
                    break
                elif len(said) < len(wanted) and not healing.fits(said + event.text, wanted):
                    detour = event
                    break
                else:
                    trace.decoded(event)
                    before, said = said, said + event.text
                    trace.healed = len(said) >= len(wanted)
                    if visible := said[max(len(before), len(wanted)) :]:
                        yield visible
        way = healing.way_to(wanted, said, detour.alternatives) if detour else None
        if way is None:
            return
        trace.decoded(Decoded(way.text, (way.id,), (way.logp,)))
        said += way.text
        trace.healed = len(said) > len(wanted)
        if visible := said[len(wanted) :]:
            yield visible


async def _unhealed(loaded: LoadedModel, budget: int, trace: _Trace, *, ahead: bool) -> AsyncGenerator[str, None]:
    trace.asked()
    ask = GenerationRequest(trace.prompt_ids, budget, adapter=trace.adapter, ahead=ahead)
    async with aclosing(loaded.engine.generate(ask)) as stream:
        async for event in stream:
            if isinstance(event, Prefilled):
                trace.prefilled(event)
            elif isinstance(event, Finished):
                trace.finished(event)
            elif event.ids[-1] in loaded.stop_ids:
                trace.ended = True
                return
            else:
                trace.decoded(event)
                yield event.text


async def _prompt(
    loaded: LoadedModel,
    around: Surroundings,
    request: CompletionRequest,
    settings: CompletionSettings,
    budget: int,
) -> tuple[tuple[int, ...], list[Token]]:
    """Return the ids of the prompt without the live text, and the tokens of the live text."""
    # Whatever the settings say, the parts fit together: three eighths, a quarter, a quarter and an eighth of what is left.
    room = loaded.engine.context_tokens - budget - _FRAME_TOKENS
    share = _BRIEF if request.brief else 1
    head = await _fit(loaded, around.head, min(settings.prefix_tokens // share, room * 3 // 8), keep_end=True)
    suffix = await _fit(loaded, around.suffix, min(settings.suffix_tokens // share, room // 4), keep_end=False)
    allowed = snippet_tokens(settings, on_gpu=loaded.engine.on_gpu)
    snippets = await _fit_snippets(loaded, request.snippets, min(allowed, room // 4))
    pieces = fim.render(
        loaded.fim,
        head=head,
        live=around.live,
        suffix=suffix,
        path=request.document.path,
        snippets=snippets,
    )
    # Only the cursor's line changes with each key. Qwen's tokens end with a line; where another vocabulary's reach over
    # its end, the split yields other tokens of the same text.
    above = around.live.rfind("\n") + 1
    live = [*await loaded.tokens(around.live[:above]), *await loaded.engine.tokenize(around.live[above:])]
    if len(live) > room // 8:
        raise EngineError(
            f"the cursor's line has {len(live)} tokens before the cursor, {room // 8} fit; raise engine.context_tokens"
        )
    return await loaded.ids(pieces[:-1]), live


def snippet_tokens(settings: CompletionSettings, *, on_gpu: bool) -> int:
    """Return how many tokens from other files a prompt holds at most."""
    if settings.snippet_tokens >= 0:
        return settings.snippet_tokens
    return _SNIPPET_TOKENS_GPU if on_gpu else _SNIPPET_TOKENS


async def _fit(loaded: LoadedModel, text: str, budget: int, *, keep_end: bool) -> str:
    shorten = context.shorter_head if keep_end else context.shorter_tail
    for _ in range(_TRIES_TO_FIT):
        if len(text) > 2 * _TOKEN_CHARS * budget:
            text = shorten(text, len(text) // _TOKEN_CHARS, budget)
        n_tokens = len(await loaded.tokens(text))
        if n_tokens <= budget:
            return text
        text = shorten(text, n_tokens, budget)
    return ""


async def _fit_snippets(loaded: LoadedModel, snippets: tuple[Snippet, ...], budget: int) -> tuple[Snippet, ...]:
    kept: list[Snippet] = []
    for snippet in reversed(snippets):  # the last one is the most useful
        if context.is_secret(snippet.path):
            continue
        n_tokens = len(await loaded.tokens(f"{snippet.path}\n{snippet.text}"))
        if n_tokens > budget:
            text = await _fit(loaded, snippet.text, budget, keep_end=False) if not kept else ""
            return tuple(reversed([*kept, replace(snippet, text=text)] if text.strip() else kept))
        kept.append(snippet)
        budget -= n_tokens
    return tuple(reversed(kept))


def _facts(loaded: LoadedModel, completion_id: str, trace: _Trace) -> Generation:
    return Generation(
        completion_id=completion_id,
        model=loaded.model.name,
        model_sha256=loaded.model.sha256,
        prompt_format=base_facts.prompt_format(loaded.fim),
        adapter=trace.adapter,
        prompt_ids=trace.prompt_ids,
        output_ids=tuple(trace.output_ids),
        output_logps=tuple(trace.output_logps),
        exact=trace.exact,
    )


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 1)
