"""A server that does to each request what it is told, over real sockets: answers, errors, silence, and worse.

`python -m tests.fault_server` is not needed: it runs in the test's own loop, on a port of loopback.
"""

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

MODEL = "served"
MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "somebody"}]}


@dataclass
class Exchange:
    """One request, and the line to who sent it."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client has closed the connection."""

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def reply(
        self, status: int, body: bytes, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        await self.send("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)

    async def begin_stream(self, kind: str = "text/event-stream") -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        await self.send(head.encode())

    async def chunk(self, raw: bytes) -> None:
        await self.send(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")

    async def event(self, data: Any) -> None:
        await self.chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

    async def end_stream(self) -> None:
        await self.chunk(b"data: [DONE]\n\n")
        await self.send(b"0\r\n\r\n")


Behaviour = Callable[[Exchange], Awaitable[None]]


class FaultServer:
    """Listens while its block lasts; a path does what is scripted for it, one request after the other, then the usual."""

    def __init__(self) -> None:
        self.asked: list[Exchange] = []
        self.script: defaultdict[str, deque[Behaviour]] = defaultdict(deque)
        self.usual: dict[str, Behaviour] = {"/v1/models": answer(MODELS)}
        self.open = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [one.body for one in self.asked if one.path == path]

    async def __aenter__(self) -> "FaultServer":
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Be gone, as a server that was ended; `listen` brings it back at the same port."""
        if self._server is None:
            return
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open += 1
        try:
            exchange = await _read(reader, writer)
            if exchange is None:
                return
            self.asked.append(exchange)
            scripted = self.script[exchange.path]
            behave = scripted.popleft() if scripted else self.usual.get(exchange.path, status(404))
            await _until_gone(behave, exchange)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, path, _ = head[0].split(" ")
    pairs = (line.partition(":") for line in head[1:] if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    raw = await reader.readexactly(int(headers.get("content-length", "0")))
    return Exchange(method, path, headers, json.loads(raw) if raw else {}, reader, writer)


async def _until_gone(behave: Behaviour, exchange: Exchange) -> None:
    async def watch() -> None:
        with suppress(ConnectionError):
            while await exchange.reader.read(1024):
                pass
        exchange.gone.set()

    watcher, work = asyncio.ensure_future(watch()), asyncio.ensure_future(behave(exchange))
    try:
        await asyncio.wait({watcher, work}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in (watcher, work):
            one.cancel()
        results = await asyncio.gather(watcher, work, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, ConnectionError):
            raise result


def answer(data: Any) -> Behaviour:
    """Answer with JSON."""
    return lambda exchange: exchange.reply(200, json.dumps(data).encode())


def status(code: int, message: str = "no", **headers: str) -> Behaviour:
    """Refuse, as OpenAI's API does."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": code}}).encode()
    return lambda exchange: exchange.reply(
        code, body, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


def raw(text: bytes) -> Behaviour:
    """Send these bytes and close."""
    return lambda exchange: exchange.send(text)


def texts(*said: str, reason: str = "stop", pause_s: float = 0.0) -> Behaviour:
    """Stream a completion, or a chat's answer, as a server of text does."""

    async def behave(exchange: Exchange) -> None:
        chat = exchange.path.endswith("/chat/completions")
        await exchange.begin_stream()
        for text in said:
            await exchange.event(
                {"choices": [{"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}]}
            )
            await asyncio.sleep(pause_s)
        await exchange.event({"choices": [{"index": 0, "text": "", "finish_reason": reason}]})
        await exchange.end_stream()

    return behave


async def hang(exchange: Exchange) -> None:
    """Say nothing at all."""
    await exchange.gone.wait()


def hang_after(*said: str) -> Behaviour:
    """Begin an answer, and never go on."""

    async def behave(exchange: Exchange) -> None:
        await exchange.begin_stream()
        for text in said:
            await exchange.event({"choices": [{"index": 0, "text": text, "delta": {"content": text}}]})
        await exchange.gone.wait()

    return behave


def drip(parts: Iterable[bytes], pause_s: float, kind: str = "text/event-stream") -> Behaviour:
    """Send bytes that never become an event, one part after a pause."""

    async def behave(exchange: Exchange) -> None:
        await exchange.begin_stream(kind)
        for part in parts:
            await exchange.chunk(part)
            await asyncio.sleep(pause_s)

    return behave


def cut_after(*said: str) -> Behaviour:
    """Begin an answer, and close the connection in the middle of it."""

    async def behave(exchange: Exchange) -> None:
        await exchange.begin_stream()
        for text in said:
            await exchange.event({"choices": [{"index": 0, "text": text, "delta": {"content": text}}]})
        await exchange.send(b"20\r\ndata: {")

    return behave
