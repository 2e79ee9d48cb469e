"""llama.cpp as an engine: requests in, events out, and the adapters that it serves.

Knows what llama.cpp is asked and answers; how its server is run stands in `llamacpp_server.py`. Knows nothing of prompts'
layouts.

One slot is for explanations, so that they do not push a completion's prompt out of the key-value cache. Completions have
several, one for each place in the code that was worked at lately; `slots.py` chooses.

A request is cancelled by closing its connection. The server notices when it next writes: after the decode step under
way, or, since progress is asked for, after at most two batches of prefill. What is read in advance is asked for batch by
batch, so that it holds nobody up for longer than one.

llama.cpp loads adapters with the model, and each request says which of them it wants; a slot's cache is cleared there when
the next request wants another. Adapters that are not loaded yet take a new server, which maps the same file.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from agent import gguf_export, gguf_header
from agent.config import EngineSettings
from agent.engines import llamacpp_server
from agent.engines.base import Adapter, Alternative, Decoded, Event, Finished, GenerationRequest, Prefilled, Task, Token
from agent.engines.llamacpp_server import LlamaServer
from agent.engines.slots import Slots
from agent.errors import AdapterError, EngineError, ModelCorruptError, PromptTooLongError, TabwiseError
from agent.gguf_header import GgufHeader
from agent.types import Chat, Message

log = logging.getLogger(__name__)

_ROOM = 2.0
"""Times the caches that must be free for two servers at once: buffers, and what other programs take meanwhile."""


class LlamaCppEngine:
    """A GGUF model in memory."""

    def __init__(self, path: Path, settings: EngineSettings, runtime_dir: Path, server: LlamaServer) -> None:
        """Wrap a running server; use `load`."""
        self.context_tokens = settings.context_tokens
        self.on_gpu = llamacpp_server.is_on_gpu(settings)
        self._path = path
        self._settings = settings
        self._runtime_dir = runtime_dir
        self._slots = Slots(settings.completion_slots)
        self._explanation_slot = settings.completion_slots
        self._batch_tokens = llamacpp_server.batch_tokens(settings, on_gpu=self.on_gpu)
        self._server: LlamaServer | None = server
        self._loaded: tuple[tuple[Adapter, Path], ...] = ()
        """What the server was loaded with, in its order; more than is attached where going back is likely."""
        self._attached: frozenset[str] = frozenset()
        self._header: GgufHeader | None = None
        self._closed = False
        self._changing = asyncio.Lock()
        """Held while the server is replaced, and by short requests, which come while nobody holds the engine's turn."""

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
        answer = await self._post("/tokenize", body)
        return [
            Token(item["id"], item["piece"] if isinstance(item["piece"], str) else None) for item in answer["tokens"]
        ]

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt begins."""
        answer = await self._post("/tokenize", {"content": "", "add_special": True})
        return tuple(answer["tokens"])

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat, in the model's own template."""
        # The template is applied to marks in place of the contents, so that only the template's own text is tokenised
        # with special tokens.
        mark = secrets.token_hex(8)
        marked = [Message(turn.role, f"<{mark}:{index}>") for index, turn in enumerate(chat.messages)]
        body = {"messages": [{"role": turn.role, "content": turn.content} for turn in marked]}
        rest: str = (await self._post("/apply-template", body))["prompt"]
        ids: list[int] = []
        for turn, placeholder in zip(chat.messages, marked, strict=True):
            frame, _, rest = rest.partition(placeholder.content)
            ids += [token.id for token in await self.tokenize(frame, special=True)]
            ids += [token.id for token in await self.tokenize(turn.content)]
        ids += [token.id for token in await self.tokenize(rest, special=True)]
        ids += [token.id for token in await self.tokenize(chat.opening)]
        return tuple(ids)

    def held(self, prompt_ids: tuple[int, ...], adapter: str | None = None) -> int:
        """Return how many tokens of a completion's prompt are computed already, with this adapter."""
        return self._slots.held(prompt_ids, adapter)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Continue a prompt."""
        if request.adapter is not None and request.adapter not in self._attached:
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
        server = await self._running()
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
                {"id": place, "scale": float(adapter.name == request.adapter)}
                for place, (adapter, _) in enumerate(self._loaded)
            ],
        }
        seen = 0
        async with aclosing(server.stream(body)) as lines:
            async for data in lines:
                event = await self._event(data, seen)
                if isinstance(event, Decoded):
                    seen = int(data["tokens_predicted"])
                if event is not None:
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

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters; a new server is loaded where the one at work lacks one of them.

        Raises:
            AdapterError: One of them is damaged or does not fit the model; what was served before still is.
        """
        wanted = {adapter.name: adapter for adapter in adapters}
        async with self._changing:
            if not wanted.keys() <= {adapter.name for adapter, _ in self._loaded}:
                files = [(adapter, await self._exported(adapter)) for adapter in wanted.values()]
                await self._replace(tuple(files))
            self._attached = frozenset(wanted)

    async def close(self) -> None:
        """Free the model's memory."""
        async with self._changing:
            self._closed = True
            server, self._server = self._server, None
            if server is not None:
                await server.close()

    async def _exported(self, adapter: Adapter) -> Path:
        if self._header is None:
            self._header = await asyncio.to_thread(gguf_header.read, self._path)
        return await asyncio.to_thread(gguf_export.exported, adapter, self._header)

    async def _replace(self, files: tuple[tuple[Adapter, Path], ...]) -> None:
        """Load a server with other adapters in place of the one at work, which stays where that fails."""
        old = self._server
        if old is not None and not self._has_room_for_two():
            # It can be brought back: what it was loaded from is still there.
            self._server = None
            await old.close()
        try:
            new = await self._start(files)
        except ModelCorruptError as error:
            if self._server is None:
                await self._bring_back()
            names = ", ".join(str(adapter.folder) for adapter, _ in files)
            raise AdapterError(f"llama.cpp takes not all of {names}: {error}") from None
        if self._server is not None:
            await self._server.close()
        self._server, self._loaded = new, files
        self._slots = Slots(self._settings.completion_slots)

    def _has_room_for_two(self) -> bool:
        # On a CPU both map the same weights, and only the caches exist twice for a moment; a GPU would hold all twice.
        header = self._header
        if self.on_gpu or header is None:
            return False
        needed = llamacpp_server.caches_bytes(header, self._settings)
        return needed * _ROOM < psutil.virtual_memory().available

    async def _bring_back(self) -> None:
        try:
            self._server = await self._start(self._loaded)
        except TabwiseError as error:
            log.error("the model cannot be brought back yet: %s", error)  # the next request tries again
        self._slots = Slots(self._settings.completion_slots)

    async def _start(self, files: tuple[tuple[Adapter, Path], ...]) -> LlamaServer:
        return await LlamaServer.start(self._path, self._settings, self._runtime_dir, [file for _, file in files])

    async def _running(self) -> LlamaServer:
        async with self._changing:
            return await self._present()

    async def _present(self) -> LlamaServer:
        if self._server is None:
            if self._closed:
                raise EngineError("the model was unloaded; ask again")
            self._server = await self._start(self._loaded)
        return self._server

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._changing:
            return await (await self._present()).post(path, body)
