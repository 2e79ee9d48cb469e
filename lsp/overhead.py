"""`tabwise bench overhead`: what language server and daemon add to a bare round trip, without a model's time.

Ours is the real language server and the real daemon with the engine of the tests, which takes no time; beside it a pygls
server that does nothing but ask an HTTP server that does nothing. Turn by turn in one run: a key (a change and a
request) to ours, a request to the bare one. Each key is one that the cache cannot answer. Prompts are the short ones of
fast typing, without text from elsewhere. Needs a checkout, since the engine belongs to the tests.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lsprotocol import types
from pygls.lsp.client import LanguageClient
from rich.console import Console
from rich.progress import track

from agent.errors import DaemonError, InputError

_CHECKOUT = Path(__file__).parents[1]
_KEYS = 400  # of which the 99th percentile is the fourth worst
_WARM_KEYS = 40
_KEY_S = 0.03  # quicker than anybody types; slow enough for what is done in advance to be over
_LINE_KEYS = 40
_START_S = 20.0
_URI = "file:///overhead.py"
_FAKE_MODEL_DAEMON = ("-m", "tests.fake_daemon")


def overhead(sizes: tuple[int, ...] = (500, 50_000)) -> dict[str, Any]:
    """Measure the time added for documents of so many lines.

    Raises:
        InputError: This is no checkout.
        DaemonError: A process did not start.
    """
    if not (_CHECKOUT / "tests" / "fake_daemon.py").exists():
        raise InputError(f"the engine of the tests is not beside {_CHECKOUT}; run this in a checkout of Tabwise")
    with tempfile.TemporaryDirectory(prefix="tw-") as folder, _daemons(Path(folder)) as env:
        return asyncio.run(_measure(sizes, env, Path(folder) / "bare.sock"))


@contextmanager
def _daemons(folder: Path) -> Iterator[dict[str, str]]:
    sys.path.insert(0, str(_CHECKOUT))
    from tests.gguf_files import write_gguf

    model = write_gguf(folder / "fake.gguf")
    (folder / "config.toml").write_text(f"[model]\nname = {json.dumps(str(model))}\n", encoding="utf-8")
    env = os.environ | {
        "TABWISE_CONFIG": str(folder / "config.toml"),
        "TABWISE_DATA_DIR": str(folder / "data"),
        "TABWISE_RUNTIME_DIR": str(folder),
    }
    processes = [
        subprocess.Popen([sys.executable, *_FAKE_MODEL_DAEMON], env=env, cwd=_CHECKOUT),
        subprocess.Popen([sys.executable, "-m", "lsp.bare_daemon", str(folder / "bare.sock")], env=env, cwd=_CHECKOUT),
    ]
    try:
        until = time.monotonic() + _START_S
        while not ((folder / "daemon.sock").exists() and (folder / "bare.sock").exists()):
            if time.monotonic() > until or any(process.poll() is not None for process in processes):
                raise DaemonError("a daemon of the benchmark did not start; run: make test")
            time.sleep(0.05)
        yield env
    finally:
        for process in processes:
            process.terminate()
            process.wait(_START_S)


async def _measure(sizes: tuple[int, ...], env: dict[str, str], bare_socket: Path) -> dict[str, Any]:
    ours = await _client("lsp.server", "--log-level", "error", env=env)
    bare = await _client("lsp.bare_server", str(bare_socket), env=env)
    figures: dict[str, Any] = {}
    editors = {size: _Editor(ours, size) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    floor: list[float] = []
    # The sizes take turns, too, so that what else the machine does falls on all of them.
    for number in track(range(_WARM_KEYS + _KEYS), "keys", console=Console(stderr=True)):
        for size, editor in editors.items():
            await asyncio.sleep(_KEY_S)
            took = await editor.key()
            await asyncio.sleep(_KEY_S)
            began = time.perf_counter()
            await bare.text_document_inline_completion_async(_asking("file:///bare.py", 0, 0))
            if number >= _WARM_KEYS:
                times[size].append(took)
                floor.append((time.perf_counter() - began) * 1000)
    for size, found in times.items():
        figures[f"lines_{size}"] = {
            "p50_ms": round(statistics.median(found) - statistics.median(floor), 2),
            "p99_ms": round(_p99(found) - _p99(floor), 2),
        }
    figures["bare"] = {"p50_ms": round(statistics.median(floor), 2), "p99_ms": round(_p99(floor), 2)}
    figures["keys"] = _KEYS
    for client in (ours, bare):
        await client.shutdown_async(None)
        client.exit(None)
        await client.stop()
    return figures


class _Editor:
    """A document in which somebody types what no completion foresaw."""

    def __init__(self, client: LanguageClient, n_lines: int) -> None:
        self._client = client
        self._uri = f"{_URI}?{n_lines}"
        self._line, self._column, self._version = n_lines // 2, 0, 1
        self._rng = random.Random(n_lines)
        lines = [f"value_{number} = compute(first, {number})\n" for number in range(n_lines)]
        lines[self._line] = "\n"
        text = "".join(lines)
        text_document = types.TextDocumentItem(self._uri, "python", 1, text)
        client.text_document_did_open(types.DidOpenTextDocumentParams(text_document))

    async def key(self) -> float:
        """Strike a key; return the milliseconds until the answer."""
        text = self._rng.choice("bcdfghjk") if self._column < _LINE_KEYS else "\n"
        at = types.Position(self._line, self._column)
        change = types.TextDocumentContentChangePartial(range=types.Range(at, at), text=text)
        self._version += 1
        self._line, self._column = (self._line + 1, 0) if text == "\n" else (self._line, self._column + 1)
        began = time.perf_counter()
        self._client.text_document_did_change(
            types.DidChangeTextDocumentParams(types.VersionedTextDocumentIdentifier(self._version, self._uri), [change])
        )
        answer = await self._client.text_document_inline_completion_async(_asking(self._uri, self._line, self._column))
        if answer is None:
            raise DaemonError("a key was not answered; this measures nothing")
        return (time.perf_counter() - began) * 1000


async def _client(module: str, *arguments: str, env: dict[str, str]) -> LanguageClient:
    client = LanguageClient("tabwise-bench", "1")

    @client.feature(types.PROGRESS)
    def progress(params: types.ProgressParams) -> None:
        del params

    await client.start_io(sys.executable, "-m", module, *arguments, env=env, cwd=str(_CHECKOUT))
    capabilities = types.ClientCapabilities(
        text_document=types.TextDocumentClientCapabilities(inline_completion=types.InlineCompletionClientCapabilities())
    )
    await client.initialize_async(types.InitializeParams(capabilities=capabilities, process_id=None, root_uri=None))
    client.initialized(types.InitializedParams())
    return client


def _asking(uri: str, line: int, character: int) -> types.InlineCompletionParams:
    return types.InlineCompletionParams(
        context=types.InlineCompletionContext(types.InlineCompletionTriggerKind.Automatic),
        text_document=types.TextDocumentIdentifier(uri),
        position=types.Position(line, character),
    )


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]
