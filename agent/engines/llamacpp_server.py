"""llama.cpp's HTTP server in this process, through xllamacpp: started, asked, closed.

xllamacpp's Python handlers cover chat and completions only; the server has the rest (tokens, progress, slots, adapters). It
is bound to a socket file in our own 0700 directory: left to itself it opens a TCP port without a key and with CORS open to
every origin. Knows how a model is loaded and how lines come back, not what is asked.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import xllamacpp

from agent.config import EngineSettings
from agent.errors import EngineError, ModelCorruptError
from agent.gguf_header import GgufHeader

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
_NUMBER_BYTES = 2  # in a key-value cache: float16
_LINE_BYTES = 1 << 20  # aiohttp refuses longer lines than twice this; a token's, with 40 others, has 5 KB


class LlamaServer:
    """A model in memory, with the adapters that it was loaded with."""

    def __init__(self, server: xllamacpp.Server, socket: Path) -> None:
        """Wrap a running server; use `start`."""
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
    async def start(
        cls, path: Path, settings: EngineSettings, runtime_dir: Path, adapters: Sequence[Path] = ()
    ) -> "LlamaServer":
        """Load a model.

        Args:
            path: GGUF file.
            settings: How to run it.
            runtime_dir: A directory that only this user can enter; the server's socket goes there.
            adapters: GGUF files of adapters; requests name them by their place in this list.

        Raises:
            ModelCorruptError: llama.cpp does not take the model, or one of the adapters.
        """
        # A name of its own for each load: the server of a model that was unloaded leaves its socket file behind.
        socket = runtime_dir / f"engine-{secrets.token_hex(3)}.sock"
        params = _params(path, settings, socket)
        # Without a weight at first: a request that names none would be answered with all of them.
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(each), 0.0) for each in adapters]
        try:
            server = await asyncio.to_thread(xllamacpp.Server, params)
        except RuntimeError as error:
            raise ModelCorruptError(
                f"llama.cpp cannot load {path}: {error} It may be damaged, of a newer kind, or too large for the memory; "
                "see tabwise doctor"
            ) from None
        socket.chmod(0o600)
        return cls(server, socket)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask for one object.

        Raises:
            EngineError: The server refused or broke off.
        """
        try:
            async with self._http.post(path, json=body) as answer:
                if answer.status != HTTPStatus.OK:
                    raise EngineError(f"llama.cpp refused {path}: {await _reason(answer)}")
                result: dict[str, Any] = json.loads(await answer.read())
                return result
        except aiohttp.ClientError as error:
            raise EngineError(f"llama.cpp does not answer ({type(error).__name__}); try again") from None

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Ask for a completion; yields what comes. Closing it cancels the work.

        Raises:
            EngineError: The server refused or broke off.
        """
        try:
            async with self._http.post("/completion", json=body) as answer:
                if answer.status != HTTPStatus.OK:
                    raise EngineError(f"llama.cpp refused the request: {await _reason(answer)}")
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        yield json.loads(line.removeprefix(b"data: "))
        except aiohttp.ClientError as error:
            raise EngineError(f"llama.cpp broke off ({type(error).__name__}); try again") from None

    async def close(self) -> None:
        """Free the model's memory."""
        server, self._server = self._server, None
        await self._http.close()
        del server
        with contextlib.suppress(FileNotFoundError):
            self._socket.unlink()


def devices() -> list[tuple[str, str]]:
    """Return kind ("CPU", "GPU", …) and name of each device that this build of llama.cpp can use."""
    found = xllamacpp.get_device_info()
    return [(item["type"].name.rpartition("_")[2], item["description"]) for item in found]


def is_on_gpu(settings: EngineSettings) -> bool:
    """Tell whether a GPU computes."""
    return settings.gpu_layers != 0 and any(kind == "GPU" for kind, _ in devices())


def batch_tokens(settings: EngineSettings, *, on_gpu: bool) -> int:
    """Return how many tokens of a prompt are computed in one go."""
    return settings.batch_tokens or (_GPU_BATCH if on_gpu else _CPU_BATCH)


def cells(settings: EngineSettings) -> int:
    """Return how many tokens the key-value caches of all slots hold: those for completions, and one for explanations."""
    return settings.context_tokens * (settings.completion_slots + 1)


def caches_bytes(header: GgufHeader, settings: EngineSettings) -> int:
    """Return the memory that the key-value caches of a model take."""
    layers, width, heads, kv_heads = (
        int(header.metadata.get(f"{header.architecture}.{name}", 0))
        for name in ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    values = width * (kv_heads or heads) // max(1, heads)  # of one layer's keys, and as many of its values
    return 2 * _NUMBER_BYTES * layers * values * cells(settings)


def _params(path: Path, settings: EngineSettings, socket: Path) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames = [str(socket)]
    params.n_parallel = settings.completion_slots + 1
    params.n_ctx = cells(settings)
    on_gpu = is_on_gpu(settings)
    params.n_batch = params.n_ubatch = batch_tokens(settings, on_gpu=on_gpu)
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
