"""A client of a language server that speaks raw JSON-RPC over standard input and output, broken messages included."""

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any

JSON = dict[str, Any]


class RpcError(Exception):
    """The server answered with an error."""

    def __init__(self, error: JSON) -> None:
        super().__init__(error.get("message"))
        self.code = error["code"]


class Rpc:
    """One language server process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.notifications: list[JSON] = []
        self.requests: list[JSON] = []
        self.errors: list[JSON] = []
        """Errors with no id."""
        self.settings: Any = None
        """What `workspace/configuration` answers."""
        self.mute = False
        """Whether requests of the server's are left without an answer."""
        self._waiting: dict[int | str, asyncio.Future[JSON]] = {}
        self._next = 0
        self._reader = asyncio.create_task(self._read())
        self.stderr = b""
        self._log = asyncio.create_task(self._drain())

    @classmethod
    async def start(cls, env: Mapping[str, str] | None = None, *arguments: str) -> "Rpc":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "lsp.server",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
        )
        return cls(process)

    def send_raw(self, body: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def send(self, message: Any) -> None:
        self.send_raw(json.dumps(message).encode())

    def notify(self, method: str, params: Any) -> None:
        self.send({"jsonrpc": "2.0", "method": method, "params": params})

    def begin(
        self, method: str, params: Any, msg_id: int | str | None = None
    ) -> tuple[int | str, asyncio.Future[JSON]]:
        """Send a request; the future gets the whole response."""
        self._next += 1
        key = self._next if msg_id is None else msg_id
        future: asyncio.Future[JSON] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        self.send({"jsonrpc": "2.0", "id": key, "method": method, "params": params})
        return key, future

    async def request(self, method: str, params: Any, timeout: float = 60) -> Any:
        _, future = self.begin(method, params)
        response = await asyncio.wait_for(future, timeout)
        if "error" in response:
            raise RpcError(response["error"])
        return response["result"]

    async def initialize(
        self, *, inline: bool = True, options: Any = None, root: str = "file:///work", **capabilities: Any
    ) -> JSON:
        text_document: JSON = {"inlineCompletion": {}} if inline else {}
        params = {
            "processId": None,
            "rootUri": root,
            "capabilities": {"textDocument": text_document, **capabilities},
            "initializationOptions": options,
        }
        result: JSON = await self.request("initialize", params)
        self.notify("initialized", {})
        return result

    def open(self, uri: str, text: str, language: str = "python", version: int = 1) -> None:
        item = {"uri": uri, "languageId": language, "version": version, "text": text}
        self.notify("textDocument/didOpen", {"textDocument": item})

    def begin_inline(
        self, uri: str, line: int, character: int, **context: Any
    ) -> tuple[int | str, asyncio.Future[JSON]]:
        return self.begin("textDocument/inlineCompletion", inline_params(uri, line, character, **context))

    async def inline(self, uri: str, line: int, character: int, **context: Any) -> list[JSON]:
        result = await self.request("textDocument/inlineCompletion", inline_params(uri, line, character, **context))
        items: list[JSON] = result["items"] if result else []
        return items

    async def close(self) -> int:
        """Shut the server down as a client should, and return its exit status."""
        if self.process.returncode is None:
            with contextlib.suppress(RpcError, TimeoutError):
                await self.request("shutdown", None, timeout=10)
            self.notify("exit", None)
        try:
            status = await asyncio.wait_for(self.process.wait(), 10)
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        for task in (self._reader, self._log):
            task.cancel()
        await asyncio.gather(self._reader, self._log, return_exceptions=True)
        return status

    async def _drain(self) -> None:
        assert self.process.stderr
        while chunk := await self.process.stderr.read(4096):
            self.stderr += chunk

    async def _read(self) -> None:
        assert self.process.stdout
        while True:
            length = 0
            while (header := await self.process.stdout.readline()) not in (b"\r\n", b""):
                if header.lower().startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            if not header:
                break
            self._take(json.loads(await self.process.stdout.readexactly(length)))
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("the server is gone"))

    def _take(self, message: JSON) -> None:
        if "method" in message and "id" in message:
            self.requests.append(message)
            if self.mute:
                return
            result = [self.settings] if message["method"] == "workspace/configuration" else None
            self.send({"jsonrpc": "2.0", "id": message["id"], "result": result})
        elif "method" in message:
            self.notifications.append(message)
        elif message.get("id") in self._waiting:
            future = self._waiting.pop(message["id"])
            if not future.done():
                future.set_result(message)
        else:
            self.errors.append(message)

    async def until(self, method: str, timeout: float = 30) -> JSON:
        """Return the first notification of that method."""
        async with asyncio.timeout(timeout):
            while True:
                for message in self.notifications:
                    if message["method"] == method:
                        return message
                await asyncio.sleep(0.02)


def inline_params(uri: str, line: int, character: int, **context: Any) -> JSON:
    return {
        "textDocument": {"uri": uri},
        "position": {"line": line, "character": character},
        "context": {"triggerKind": 2, **context},
    }
