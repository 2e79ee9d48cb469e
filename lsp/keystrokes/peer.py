"""The other side: llama.cpp's own server in a process of its own, asked as llama.vim asks it."""

import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import psutil

from agent.errors import EngineError
from lsp.keystrokes.editor import Change, Editor, Kind
from lsp.keystrokes.figures import Work
from lsp.keystrokes.llama_vim import LlamaVim
from lsp.keystrokes.ours import cpu_seconds
from lsp.keystrokes.screen import Screen
from lsp.keystrokes.trace import Key

_START_S = 120.0  # to load the model from a cold disk
_END_S = 10.0
_CONTEXT_TOKENS = 4096
"""As our own default; a batch of prompt and an answer need a quarter of it."""


class Peer:
    """llama.vim in an editor."""

    def __init__(self, model: Path, new_tokens: int) -> None:
        """Prepare; nothing is started yet."""
        self.screen = Screen()
        self._model = model
        self._process: asyncio.subprocess.Process | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="tw-")  # for the socket: private, and its path short
        self._socket = Path(self._folder.name, "peer.sock")
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(self._socket)), base_url="http://peer", timeout=None
        )
        self._vim = LlamaVim(self._ask, self.screen.show, new_tokens)
        self._cpu_s = 0.0

    async def open(self, editor: Editor) -> None:
        """Start the server and have the model loaded."""
        del editor
        threads = psutil.cpu_count(logical=False) or 1
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent.engines.peer"),
            *(str(self._model), str(self._socket), str(threads), str(_CONTEXT_TOKENS)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        ready = await asyncio.wait_for(self._process.stdout.readline(), _START_S)
        if ready.strip() != b"ready":
            raise EngineError(f"llama.cpp's server did not start on {self._model}; see: tabwise doctor")
        self._cpu_s = self._cpu()

    def press(self, key: Key, change: Change | None, editor: Editor) -> None:
        """Tell the plug-in where the cursor is now."""
        del change
        self._vim.moved(editor.text.split("\n"), *editor.position, typed=key.kind is not Kind.JUMP)

    async def finish(self) -> Work:
        """Wait for the last answer, and return what was done."""
        await self._vim.close()
        return Work(
            cpu_s=self._cpu() - self._cpu_s,
            requests=self._vim.requests,
            prompt_tokens=self._vim.typing.prompt_tokens,
            decoded_tokens=self._vim.typing.decoded_tokens,
            ahead_prompt_tokens=self._vim.ahead.prompt_tokens,
            ahead_decoded_tokens=self._vim.ahead.decoded_tokens,
            unfit=0,
            unanswered=0,  # `close` waited for all of them
        )

    async def close(self) -> None:
        """End the server."""
        await self._http.aclose()
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _END_S)
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        self._folder.cleanup()

    def _cpu(self) -> float:
        assert self._process is not None
        return cpu_seconds([psutil.Process(self._process.pid)])

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._http.post("/infill", json=body)
        except httpx.HTTPError as error:
            raise EngineError(f"the peer's server broke off ({type(error).__name__}); try again") from None
        if answer.status_code != httpx.codes.OK:
            raise EngineError(f"llama.cpp refused a request for the benchmark: {answer.text:.200}")
        fields: dict[str, Any] = answer.json()
        return fields
