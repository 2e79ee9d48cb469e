"""llama.cpp as an engine: requests in, events out, and the adapters that it serves.

Knows what llama.cpp is asked and answers; how its server is run stands in `llamacpp_server.py`, how another one with other
adapters takes its place in `llamacpp_swap.py`. Knows nothing of prompts' layouts.

One slot is for explanations, so that they do not push a completion's prompt out of the key-value cache. Completions have
several, one for each place in the code that was worked at lately; `slots.py` chooses.

A request is cancelled by closing its connection. The server notices when it next writes: after the decode step under
way, or, since progress is asked for, after at most two batches of prefill. What is read in advance is asked for batch by
batch, so that it holds nobody up for longer than one.

Each request says which of the loaded adapters it wants; a slot's cache is cleared there when the next request wants another.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.config import EngineSettings
from agent.engines import chats, llamacpp_server
from agent.engines.base import Adapter, Alternative, Decoded, Event, Finished, GenerationRequest, Prefilled, Task, Token
from agent.engines.llamacpp_server import LlamaServer
from agent.engines.llamacpp_swap import Servers
from agent.engines.slots import Slots
from agent.errors import AdapterError, EngineError, PromptTooLongError
from agent.types import Chat, Message


class LlamaCppEngine:
    """A GGUF model in memory."""

    def __init__(self, path: Path, settings: EngineSettings, runtime_dir: Path, server: LlamaServer) -> None:
        """Wrap a running server; use `load`."""
        self.context_tokens = settings.context_tokens
        self.on_gpu = llamacpp_server.is_on_gpu(settings)
        self._settings = settings
        self._slots = Slots(settings.completion_slots)
        self._explanation_slot = settings.completion_slots
        self._batch_tokens = llamacpp_server.batch_tokens(settings, on_gpu=self.on_gpu)
        self._servers = Servers(path, settings, runtime_dir, server)

    @classmethod
    async def load(cls, path: Path, settings: EngineSettings, runtime_dir: Path) -> "LlamaCppEngine":
        """Load a model.

        Args:
            path: GGUF file.
            settings: How to run it.
            runtime_dir: A directory that only this user can enter; the engine's socket goes there.

        Raises:
            ModelCorruptError: llama.cpp does not take the file.
        """
        return cls(path, settings, runtime_dir, await LlamaServer.start(path, settings, runtime_dir))

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`."""
        if not text:
            return []
        body = {"content": text, "add_special": False, "parse_special": special, "with_pieces": True}
        answer = await self._servers.post("/tokenize", body)
        return [
            Token(item["id"], item["piece"] if isinstance(item["piece"], str) else None) for item in answer["tokens"]
        ]

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt begins."""
        answer = await self._servers.post("/tokenize", {"content": "", "add_special": True})
        return tuple(answer["tokens"])

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat, in the model's own template."""
        return await chats.chat_ids(chat, self._rendered, self.tokenize)

    async def _rendered(self, messages: Sequence[Message]) -> str:
        body = {"messages": [{"role": turn.role, "content": turn.content} for turn in messages]}
        return str((await self._servers.post("/apply-template", body))["prompt"])

    def held(self, prompt_ids: tuple[int, ...], adapter: str | None = None) -> int:
        """Return how many tokens of a completion's prompt are computed already, with this adapter."""
        return self._slots.held(prompt_ids, adapter)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Continue a prompt."""
        if request.adapter is not None and request.adapter not in self._servers.attached:
            raise AdapterError(f"the adapter {request.adapter!r} is not attached; see: tabwise adapters list")
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.context_tokens:
            raise PromptTooLongError(
                f"the prompt needs {needed} tokens, the context has {self.context_tokens}; "
                "raise engine.context_tokens or shorten the text"
            )
        slot, held = self._explanation_slot, 0
        if request.task is Task.COMPLETION:
            slot, held = self._slots.choose(request.prompt_ids, request.adapter, ahead=request.ahead)
        if not request.ahead or request.max_tokens:
            async with aclosing(self._stream(request, slot)) as events:
                async for event in events:
                    if request.task is Task.COMPLETION and not isinstance(event, Finished):
                        read = event.done_tokens if isinstance(event, Prefilled) else len(request.prompt_ids)
                        self._slots.read(slot, read)
                    yield event
            return
        async with aclosing(self._read_in_pieces(request, slot, held)) as pieces:
            async for event in pieces:
                yield event

    async def _read_in_pieces(self, request: GenerationRequest, slot: int, held: int) -> AsyncGenerator[Event, None]:
        """Read a prompt batch by batch: llama.cpp computes two batches more before it notices that nobody listens."""
        total = len(request.prompt_ids)
        read, cached = 0, None
        for end in (*range(held + self._batch_tokens, total, self._batch_tokens), total):
            piece = replace(request, prompt_ids=request.prompt_ids[:end])
            async with aclosing(self._stream(piece, slot)) as events:
                async for event in events:
                    if isinstance(event, Prefilled):
                        yield replace(event, total_tokens=total)
                    elif isinstance(event, Finished):
                        read += event.prefill_tokens
                        cached = event.cached_tokens if cached is None else cached
            self._slots.read(slot, end)
        yield Finished(ended=False, prefill_tokens=read, cached_tokens=cached or 0, decoded_tokens=0)

    async def _stream(self, request: GenerationRequest, slot: int) -> AsyncGenerator[Event, None]:
        server = await self._servers.running()
        body = {
            "prompt": list(request.prompt_ids),
            "n_predict": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "id_slot": slot,
            "cache_prompt": request.cached,
            "stream": True,
            "return_tokens": True,
            "return_progress": True,
            "n_probs": max(1, request.alternatives),
            # All of them, always: where this is missing, the server takes what it was loaded with and keeps the cache.
            "lora": [
                {"id": place, "scale": float(name == request.adapter)}
                for place, name in enumerate(self._servers.loaded)
            ],
        }
        seen = 0
        async with aclosing(server.stream(body)) as lines:
            async for data in lines:
                event = await self._event(data, seen)
                if isinstance(event, Finished) and not request.max_tokens:
                    event = replace(event, decoded_tokens=0)
                if isinstance(event, Decoded):
                    seen = int(data["tokens_predicted"])
                # Asked for none, llama.cpp writes one token all the same.
                if event is not None and (request.max_tokens or not isinstance(event, Decoded)):
                    yield event

    async def _event(self, data: dict[str, Any], seen: int) -> Event | None:
        if "error" in data:
            raise EngineError(f"llama.cpp failed: {data['error'].get('message', data['error'])}; try again")
        if data.get("stop"):
            timings = data["timings"]
            return Finished(
                ended=data["stop_type"] == "eos",
                prefill_tokens=timings["prompt_n"],
                cached_tokens=timings["cache_n"],
                decoded_tokens=timings["predicted_n"],
            )
        if "prompt_progress" in data:
            progress = data["prompt_progress"]
            return Prefilled(progress["processed"], progress["total"], progress["cache"])
        return await self._decoded(data, seen)

    async def _decoded(self, data: dict[str, Any], seen: int) -> Decoded:
        chosen = data["completion_probabilities"][-1]
        ids: tuple[int, ...] = (int(chosen["id"]),)
        logps: tuple[float, ...] = (float(chosen["logprob"]),)
        exact = True
        missing = int(data["tokens_predicted"]) - seen - 1
        if missing > 0:
            # Tokens that end within a character are held back, and only the last of them is reported with the text.
            ids, exact = tuple(token.id for token in await self.tokenize(data["content"])), False
            logps = (*(0.0 for _ in ids[1:]), logps[0])
        alternatives = tuple(
            Alternative(int(item["id"]), bytes(item["bytes"]).decode("utf-8", errors="ignore"), float(item["logprob"]))
            for item in chosen["top_logprobs"]
        )
        return Decoded(data["content"], ids, logps, alternatives, exact)

    async def prepare(self, adapters: Sequence[Adapter]) -> None:
        """Load a server for these adapters beside the one at work, where the memory has room for both."""
        await self._servers.prepare(adapters)

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters; a new server is loaded where the one at work lacks one of them.

        Raises:
            AdapterError: One of them is damaged or does not fit the model; what was served before still is.
        """
        before = self._servers.at_work
        try:
            await self._servers.attach(adapters)
        finally:
            if self._servers.at_work is not before:
                self._slots = Slots(self._settings.completion_slots)

    async def close(self) -> None:
        """Free the model's memory."""
        await self._servers.close()
