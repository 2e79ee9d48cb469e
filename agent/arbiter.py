"""Whose turn it is at the engine: completions first, one at a time; explanations in between; work in advance last.

An explanation that is under way is broken off between two decode steps (or batches of prefill) when a completion is
asked for, and taken up again from the tokens it has once no completion waits. Work in advance is broken off by either,
and not taken up: whoever asked for it may ask again. Knows requests and streams, no models.

Invariant: at most one stream of the engine is open.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from agent.engines.base import Adapter, Decoded, Engine, Event, Finished, GenerationRequest, Prefilled, Task, Token
from agent.racing import until
from agent.types import Chat


class Arbiter:
    """An engine for several askers."""

    def __init__(self, engine: Engine) -> None:
        """Take charge of `engine`, which nobody else may use from now on."""
        self.on_gpu = engine.on_gpu
        self._engine = engine
        self._turn = asyncio.Lock()
        self._waiting = 0  # completions that wait or run
        self._wanted = asyncio.Event()  # set while there are any
        self._calm = asyncio.Event()  # set while there are none
        self._calm.set()
        self._explaining = 0  # explanations that wait or run
        self._needed = asyncio.Event()  # set while there are completions or explanations
        self._free = asyncio.Event()  # set while there are none of both
        self._free.set()

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together, as of now."""
        return self._engine.context_tokens

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`; needs no turn."""
        return await self._engine.tokenize(text, special=special)

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt begins."""
        return await self._engine.start_ids()

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat."""
        return await self._engine.chat_ids(chat)

    def held(self, prompt_ids: tuple[int, ...], adapter: str | None = None) -> int:
        """Return how many tokens of a prompt are computed already, with this adapter; needs no turn."""
        return self._engine.held(prompt_ids, adapter)

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters and no others, from when it is nobody's turn; explanations give way, as to completions."""
        self._count(completions=1)
        try:
            async with self._turn:
                await self._engine.attach(adapters)
        finally:
            self._count(completions=-1)

    async def close(self) -> None:
        """Free the engine, when it is nobody's turn."""
        async with self._turn:
            await self._engine.close()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Continue a prompt, when it is its turn."""
        if request.ahead:
            return self._ahead(request)
        return self._first(request) if request.task is Task.COMPLETION else self._between(request)

    def _count(self, *, completions: int = 0, explanations: int = 0) -> None:
        self._waiting += completions
        self._explaining += explanations
        for event, opposite, on in (
            (self._wanted, self._calm, self._waiting > 0),
            (self._needed, self._free, self._waiting + self._explaining > 0),
        ):
            (event if on else opposite).set()
            (opposite if on else event).clear()

    async def _first(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self._count(completions=1)
        try:
            async with self._turn, aclosing(self._engine.generate(request)) as stream:
                async for event in stream:
                    yield event
        finally:
            self._count(completions=-1)

    async def _ahead(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        n_decoded, last = 0, Prefilled(0, 0, 0)
        cached: int | None = None  # what was there at the beginning, not what each piece finds
        await self._free.wait()
        async with self._turn:
            if not self._needed.is_set():
                async with aclosing(until(self._needed, self._engine.generate(request))) as stream:
                    async for event in stream:
                        yield event
                        if isinstance(event, Finished):
                            return
                        if isinstance(event, Decoded):
                            n_decoded += len(event.ids)
                        else:
                            last = event
                            cached = event.cached_tokens if cached is None else cached
        yield Finished(
            ended=False,
            prefill_tokens=last.done_tokens - (cached or 0),
            cached_tokens=cached or 0,
            decoded_tokens=n_decoded,
            gave_way=True,
        )

    async def _between(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self._count(explanations=1)
        try:
            async with aclosing(self._in_pieces(request)) as stream:
                async for event in stream:
                    yield event
        finally:
            self._count(explanations=-1)

    async def _in_pieces(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        ids: list[int] = []
        prefilled = progress = 0
        cached: int | None = None
        while len(ids) < request.max_tokens:
            await self._calm.wait()
            async with self._turn:
                if self._wanted.is_set():
                    continue
                prefilled, progress = prefilled + progress, 0
                rest = replace(
                    request, prompt_ids=(*request.prompt_ids, *ids), max_tokens=request.max_tokens - len(ids)
                )
                async with aclosing(until(self._wanted, self._engine.generate(rest))) as stream:
                    async for event in stream:
                        if isinstance(event, Prefilled):
                            cached = event.cached_tokens if cached is None else cached
                            progress = event.done_tokens - event.cached_tokens
                        elif isinstance(event, Decoded):
                            ids += event.ids
                        else:
                            total = prefilled + event.prefill_tokens
                            yield Finished(event.ended, total, cached or 0, len(ids))
                            return
                        yield event
        yield Finished(
            ended=False, prefill_tokens=prefilled + progress, cached_tokens=cached or 0, decoded_tokens=len(ids)
        )
