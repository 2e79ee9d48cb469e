"""The decode loop: a prompt is read, tokens are written one after the other, drafts are checked several at a time.

One kind of pass does all of it. A pass reads tokens that are not in the cache yet, and gives logits only for the places
where a token is to be chosen: for none while a prompt is read in pieces, for one in plain decoding, for a draft's tokens
and one more when a draft is checked. Before each pass the cache is cropped to what the text really says.

The stream is a plain generator, advanced from the engine's worker thread: closing it between two passes is the cancel.
Where the device has no memory left for a pass, `headroom.py` makes room and the text is read again. Knows tokens and
tensors, no threads.
"""

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from agent.engines import out_of_memory
from agent.engines.base import Event, Finished, GenerationRequest, Prefilled, Task
from agent.engines.drafts import (
    LENGTHS,
    Acceptance,
    Costs,
    Draft,
    History,
    accepted_length,
    worthwhile_length,
)
from agent.engines.headroom import Headroom
from agent.engines.kv_cache import PrefixCache, Shelf
from agent.engines.sampling import Choice, choose
from agent.engines.vocabulary import Spelling, Vocabulary
from agent.errors import AdapterError, EngineError, PromptTooLongError


@dataclass(slots=True)
class _Text:
    """A text under way: its tokens, its cache, and what is asked for."""

    request: GenerationRequest
    cache: PrefixCache
    history: History
    cached_tokens: int


class DecodeLoop:
    """Continues prompts with one model; all of it but `held` and `context_tokens` belongs to one thread."""

    def __init__(
        self,
        module: torch.nn.Module,
        vocabulary: Vocabulary,
        shelf: Shelf,
        device: torch.device,
        *,
        context_tokens: int,
        chunk_tokens: int,
        drafts: bool,
    ) -> None:
        """Take charge of a model.

        Args:
            module: Causal language model.
            vocabulary: Its tokens.
            shelf: Caches for it.
            device: Where it lies.
            context_tokens: Most tokens of prompt and answer together.
            chunk_tokens: Prompt tokens that are read in one pass.
            drafts: Whether to draft where that is faster.
        """
        self._headroom = Headroom(shelf, device, context_tokens=context_tokens, chunk_tokens=chunk_tokens)
        self._select: Callable[[str | None], None] | None = None
        self._selected: str | None = None
        self._module: torch.nn.Module | None = module
        self._vocabulary = vocabulary
        self._shelf = shelf
        self._device = device
        self._drafts = drafts
        # Explanations repeat themselves less than code does.
        self._acceptance = {task: Acceptance() for task in Task}
        self._costs = Costs()

    def without_drafts(self) -> "DecodeLoop":
        """Return another loop with the same model, with caches of its own and no drafts."""
        if self._module is None:
            raise EngineError("the model was unloaded; ask again")
        return DecodeLoop(
            self._module,
            self._vocabulary,
            self._shelf.another(),
            self._device,
            context_tokens=self.context_tokens,
            chunk_tokens=self._headroom.chunk_tokens,
            drafts=False,
        )

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together, as of now; from any thread."""
        return self._headroom.context_tokens

    def held(self, prompt_ids: Sequence[int], adapter: str | None) -> int:
        """Return how many tokens at the beginning of a completion's prompt are computed; from any thread."""
        return self._shelf.held(prompt_ids, adapter)

    def serve(self, adapters: Collection[str], select: Callable[[str | None], None]) -> None:
        """Serve these adapters from now on, and give up the caches of others.

        Args:
            adapters: Their names. Caches of those that stay are kept: a name stands for the same weights for ever.
            select: Has the model compute with one of them, or with none.
        """
        self._shelf.forget(lambda name: name is not None and name not in adapters)
        select(None)
        self._select, self._selected = (select if adapters else None), None

    def _use(self, adapter: str | None) -> None:
        if adapter == self._selected:
            return
        if self._select is None:
            raise AdapterError(f"the adapter {adapter!r} is not attached; see the settings")
        self._select(adapter)
        self._selected = adapter

    def let_go(self) -> None:
        """Let go of the model and of all caches. Streams that are still open end with an error."""
        self._module = self._select = None
        self._shelf.give_up_others()

    def stream(self, request: GenerationRequest) -> Iterator[Event]:
        """Continue a prompt; closing the generator ends the work, and what was computed is kept.

        Raises:
            PromptTooLongError: Prompt and allowance exceed the context.
            MemoryFullError: The device has no memory for it.
            EngineError: The model broke, or is gone.
        """
        prompt = list(request.prompt_ids) or [self._vocabulary.blank_id]
        self._check(request, len(prompt))
        self._use(request.adapter)  # one that is not there is refused before anything gives way to it
        text = self._begin(request, prompt)
        n_decoded, ended = 0, False
        try:
            if request.max_tokens:
                n_decoded, ended = yield from self._write(text)
            else:
                yield from self._told(text, self._passes(text, (), 0))
                yield Prefilled(len(prompt), len(prompt), text.cached_tokens)
        finally:
            text.cache.in_use = False
        yield Finished(ended, len(prompt) - text.cached_tokens, text.cached_tokens, n_decoded)

    def _check(self, request: GenerationRequest, n_prompt: int) -> None:
        needed = n_prompt + request.max_tokens
        if needed > self.context_tokens:
            raise PromptTooLongError(
                f"the prompt needs {needed} tokens, the context has {self.context_tokens}; "
                "raise engine.context_tokens or shorten the text"
            )

    def _begin(self, request: GenerationRequest, prompt: list[int]) -> _Text:
        cache, tail = self._shelf.take(request, prompt)
        history = History(prompt)
        history.expect(tail)
        # Of a prompt that is known to its end, the last token is read again: what follows it is asked for.
        return _Text(request, cache, history, min(len(cache), len(prompt) - bool(request.max_tokens)))

    def _write(self, text: _Text) -> Generator[Event, None, tuple[int, bool]]:
        """Yield events until the text is at its end or long enough; return how many tokens, and which of the two."""
        spelling = Spelling(self._vocabulary)
        n_prompt, total = len(text.history.ids), text.request.max_tokens
        n_decoded, ended, begun = 0, False, False
        while n_decoded < total and not ended:
            draft, length = self._draft(text, total - n_decoded)
            drafted = draft.ids[:length]
            started = time.perf_counter()
            passes = self._passes(text, drafted, 1 + length)
            choices = yield from self._told(text, passes)
            if not begun:
                yield Prefilled(n_prompt, n_prompt, text.cached_tokens)
                begun = True
            else:
                self._costs.timed(1 + length, time.perf_counter() - started)
            for choice in choices[: 1 + self._judge(text, draft, length, choices)]:
                if choice.id in self._vocabulary.end_ids:
                    ended = True
                    break
                text.history.extend((choice.id,))
                n_decoded += 1
                if (told := spelling.add(choice)) is not None:
                    yield told
        if (told := spelling.rest()) is not None:
            yield told
        return n_decoded, ended

    def _draft(self, text: _Text, room: int) -> tuple[Draft, int]:
        """Return a draft, and how many of its tokens are worth being checked."""
        if not self._drafts:
            return Draft(), 0
        draft = text.history.draft(min(LENGTHS[-1], room - 1))
        return draft, worthwhile_length(draft, self._acceptance[text.request.task], self._costs)

    def _judge(self, text: _Text, draft: Draft, length: int, choices: Sequence[Choice]) -> int:
        """Return how many of the drafted tokens hold, and learn from it; from drafts that were not checked, too."""
        chosen = [choice.id for choice in choices]
        accepted = accepted_length(draft.ids[:length], chosen)
        if draft.ids:
            looked_at = max(1, length)
            seen = accepted_length(draft.ids[:looked_at], chosen)
            self._acceptance[text.request.task].learn(draft.matched, accepted=seen, drafted=looked_at)
        return accepted

    def _told(self, text: _Text, passes: Generator[None, None, list[Choice]]) -> Generator[Event, None, list[Choice]]:
        """Tell of each pass that reads a piece of the prompt."""
        while True:
            try:
                next(passes)
            except StopIteration as end:
                choices: list[Choice] = end.value
                return choices
            yield Prefilled(len(text.cache), len(text.history.ids), text.cached_tokens)

    def _passes(self, text: _Text, drafted: Sequence[int], keep: int) -> Generator[None, None, list[Choice]]:
        """Read what is not in the cache of the text and a draft; yields after each pass but the last.

        Args:
            text: The text.
            drafted: Tokens behind it that are to be checked.
            keep: For how many of the last places to choose a token.

        Returns:
            What is chosen to stand behind each of these places.
        """
        ids = [*text.history.ids, *drafted]
        cache = text.cache
        while True:
            cache.keep(ids[: len(ids) - keep], text.request.adapter)
            missing = len(ids) - len(cache)
            chunk = self._headroom.chunk_tokens
            last = missing <= max(chunk, keep)
            end = len(ids) if last else min(len(cache) + chunk, len(ids) - keep)
            choices = self._try(text, ids[len(cache) : end], keep if last else 0)
            if choices is None:
                self._headroom.make_room(cache, len(ids))
            elif last:
                return choices
            else:
                yield

    def _try(self, text: _Text, ids: list[int], keep: int) -> list[Choice] | None:
        """Read tokens into the cache and choose; None where the memory did not suffice, with the cache given up."""
        if self._module is None:
            raise EngineError("the model was unloaded; ask again")
        request, cache = text.request, text.cache
        try:
            self._use(request.adapter)
            logits = self._pass(self._module, cache, ids, keep)
            choices = choose(
                logits,
                temperature=request.temperature,
                seed=request.seed,
                position=len(text.history.ids),
                n_alternatives=request.alternatives,
            )
        except (RuntimeError, MemoryError) as error:
            reason = None if out_of_memory.is_out_of_memory(error) else " ".join(str(error).split())
        else:
            cache.ids += ids
            return choices
        # Out of the handler, since the error's traceback holds the tensors of the pass.
        cache.give_up()
        if reason is not None:
            raise EngineError(f"the model broke off: {reason:.200}; see the log, and tabwise doctor")
        return None

    # Not inference mode: what a module keeps of such a pass could not be used by its twin in training.
    @torch.no_grad()
    def _pass(self, module: torch.nn.Module, cache: PrefixCache, ids: list[int], keep: int) -> torch.Tensor:
        """Return the logits (keep, V) of the last places."""
        if not ids:
            return torch.empty(0, 1, device=self._device)
        answer = module(
            input_ids=torch.tensor([ids], device=self._device),  # (1, T)
            past_key_values=cache.layers,
            use_cache=True,
            logits_to_keep=torch.arange(len(ids) - keep, len(ids), device=self._device),
        )
        if not keep and self._device.type == "cuda":
            torch.cuda.synchronize()  # the next pass must not be queued behind this one, or a cancel waits for both
        logits: torch.Tensor = answer.logits[0]
        return logits
