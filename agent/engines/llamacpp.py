"""llama.cpp, through xllamacpp, inside this process.

xllamacpp's Python handlers cover chat and completions only; its HTTP server has the rest (tokens, progress, slots). It
is bound to a socket file in our own 0700 directory: left to itself it opens a TCP port without a key and with CORS open
to every origin. Knows nothing of prompts' layouts.

One slot is for explanations, so that they do not push a completion's prompt out of the key-value cache. Completions have
several, one for each place in the code that was worked at lately; `slots.py` chooses.

A request is cancelled by closing its connection. The server notices when it next writes: after the decode step under
way, or, since progress is asked for, after at most two batches of prefill. What is read in advance is asked for batch by
batch, so that it holds nobody up for longer than one.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import xllamacpp

from agent.config import EngineSettings
from agent.engines import chats
from agent.engines.base import Adapter, Alternative, Decoded, Event, Finished, GenerationRequest, Prefilled, Task, Token
from agent.engines.slots import Slots
from agent.errors import EngineError, ModelCorruptError, PromptTooLongError
from agent.types import Chat, Message

_QUIET = -1  # llama.cpp's log goes to standard error and may quote prompts
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
"""A long prefill says nothing for a while; callers cancel, not the clock."""
_CPU_BATCH, _GPU_BATCH = 7, 512
"""Seven take 0.08 s on two cores (calculated from 85 tokens a second); a GPU is left idle by small batches (not measured).

Up to seven tokens, llama.cpp's kernels gave the same log-probabilities to four decimals however a prompt was cut into
pieces, from eight on they did not (LOG; the starter on a CPU with AVX2, others were not looked at). It holds together
with another choice in `_params`: no repacked weights, whose kernels take four rows at once. From 512 cells of the key-value
cache on, one token is attended to by another kernel than several; an 8-bit cache would mend that, but made completions
worse (pass@1 of single lines 0.56, not 0.61; LOG).
"""
_LINE_BYTES = 1 << 20  # aiohttp refuses longer lines than twice this; a token's, with 40 others, has 5 KB


class LlamaCppEngine:
    """A GGUF model in memory."""

    def __init__(self, server: xllamacpp.Server, socket: Path, settings: EngineSettings) -> None:
        """Wrap a running server; use `load`."""
        self.context_tokens = settings.context_tokens
        self.on_gpu = _on_gpu(settings)
        self._slots = Slots(settings.completion_slots)
        self._explanation_slot = settings.completion_slots
        self._batch_tokens = _batch_tokens(settings, on_gpu=self.on_gpu)
        self._server: xllamacpp.Server | None = server
        self._socket = socket
        self._http = aiohttp.ClientSession(
            "http://engine",
            # The server closes a connection after each stream without saying so beforehand.
            connector=aiohttp.UnixConnector(str(socket), force_close=True),
            headers={"Connection": "close"},
            timeout=_TIMEOUT,
            read_bufsize=_LINE_BYTES,
        )

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
        # A name of its own for each load: the server of a model that was unloaded leaves its socket file behind.
        socket = runtime_dir / f"engine-{secrets.token_hex(3)}.sock"
        params = _params(path, settings, socket)
        try:
            server = await asyncio.to_thread(xllamacpp.Server, params)
        except RuntimeError as error:
            raise ModelCorruptError(
                f"llama.cpp cannot load {path}: {error} It may be damaged, of a newer kind, or too large for the memory; "
                "see tabwise doctor"
            ) from None
        socket.chmod(0o600)
        return cls(server, socket, settings)

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
        return await chats.chat_ids(chat, self._rendered, self.tokenize)

    async def _rendered(self, messages: Sequence[Message]) -> str:
        body = {"messages": [{"role": turn.role, "content": turn.content} for turn in messages]}
        return str((await self._post("/apply-template", body))["prompt"])

    def held(self, prompt_ids: tuple[int, ...]) -> int:
        """Return how many tokens of a completion's prompt are computed already."""
        return self._slots.held(prompt_ids)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Continue a prompt."""
        if request.adapter is not None:
            raise EngineError(f"the adapter {request.adapter!r} is not loaded; this version serves the bare model only")
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.context_tokens:
            raise PromptTooLongError(
                f"the prompt needs {needed} tokens, the context has {self.context_tokens}; "
                "raise engine.context_tokens or shorten the text"
            )
        slot, held = self._explanation_slot, 0
        if request.task is Task.COMPLETION:
            slot, held = self._slots.choose(request.prompt_ids, ahead=request.ahead)
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
        }
        seen = 0
        try:
            async with self._http.post("/completion", json=body) as answer:
                if answer.status != HTTPStatus.OK:
                    raise EngineError(f"llama.cpp refused the request: {await _reason(answer)}")
                async for line in answer.content:
                    if not line.startswith(b"data: "):
                        continue
                    data = json.loads(line.removeprefix(b"data: "))
                    event = await self._event(data, seen)
                    if isinstance(event, Finished) and not request.max_tokens:
                        event = replace(event, decoded_tokens=0)
                    if isinstance(event, Decoded):
                        seen = int(data["tokens_predicted"])
                    # Asked for none, llama.cpp writes one token all the same.
                    if event is not None and (request.max_tokens or not isinstance(event, Decoded)):
                        yield event
        except aiohttp.ClientError as error:
            raise EngineError(f"llama.cpp broke off ({type(error).__name__}); try again") from None

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
        """Adapters are loaded with the model in llama.cpp; there is nothing to attach yet."""
        if adapters:
            raise EngineError("this version serves the bare model only; remove the adapter from the settings")

    async def close(self) -> None:
        """Free the model's memory."""
        server, self._server = self._server, None
        await self._http.close()
        del server
        with contextlib.suppress(FileNotFoundError):
            self._socket.unlink()

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self._http.post(path, json=body) as answer:
                if answer.status != HTTPStatus.OK:
                    raise EngineError(f"llama.cpp refused {path}: {await _reason(answer)}")
                result: dict[str, Any] = json.loads(await answer.read())
                return result
        except aiohttp.ClientError as error:
            raise EngineError(f"llama.cpp does not answer ({type(error).__name__}); try again") from None


def devices() -> list[tuple[str, str]]:
    """Return kind ("CPU", "GPU", …) and name of each device that this build of llama.cpp can use."""
    found = xllamacpp.get_device_info()
    return [(item["type"].name.rpartition("_")[2], item["description"]) for item in found]


def _on_gpu(settings: EngineSettings) -> bool:
    return settings.gpu_layers != 0 and any(kind == "GPU" for kind, _ in devices())


def _batch_tokens(settings: EngineSettings, *, on_gpu: bool) -> int:
    return settings.batch_tokens or (_GPU_BATCH if on_gpu else _CPU_BATCH)


def _params(path: Path, settings: EngineSettings, socket: Path) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames = [str(socket)]
    params.n_parallel = settings.completion_slots + 1
    params.n_ctx = settings.context_tokens * params.n_parallel
    on_gpu = _on_gpu(settings)
    params.n_batch = params.n_ubatch = _batch_tokens(settings, on_gpu=on_gpu)
    if not on_gpu:
        params.no_extra_bufts = True
    threads = settings.threads or psutil.cpu_count(logical=False) or 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = settings.gpu_layers
    params.ui = False
    params.endpoint_slots = False  # would show prompts
    params.cache_ram_mib = 0  # its second cache may take 8 GB; the slots' own caches are what we use
    params.fit_params = False  # loads the model twice to try what fits; what fits is the memory planner's business
    params.warmup = False  # costs a decode step at load; the first request warms it just as well
    params.verbosity = _QUIET
    return params


async def _reason(answer: aiohttp.ClientResponse) -> str:
    try:
        return str(json.loads(await answer.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status}"
