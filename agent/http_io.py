"""Reading requests and streaming answers over HTTP: what the daemon's own routes and OpenAI's share.

Knows connections and errors, not what is asked or answered.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent import wire
from agent.errors import AdapterError, ModelError, PromptTooLongError, RequestError, TabwiseError

log = logging.getLogger(__name__)

_BODY_BYTES = 4 << 20  # windows of documents are 30 KB; anything near this is a mistake or an attack
_SEND_S = 10.0  # for a client to take what was sent to it; then it is taken to be gone
_STATUS: dict[type[TabwiseError], int] = {
    ModelError: 503,
    RequestError: 400,
    PromptTooLongError: 400,
    AdapterError: 400,
}


class OpenRequests:
    """Counts requests while they last; a context manager that may be entered by many at once."""

    def __init__(self) -> None:
        """Begin at none."""
        self.count = 0

    def __enter__(self) -> None:
        """Count one more."""
        self.count += 1

    def __exit__(self, *_: object) -> None:
        """Count one less."""
        self.count -= 1


def status_of(error: TabwiseError) -> int:
    """Return the HTTP status for an error."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


async def body_of(request: Request) -> bytes:
    """Return the request's body.

    Raises:
        RequestError: It is too large.
    """
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > _BODY_BYTES:
            raise RequestError(f"the request's body has over {_BODY_BYTES} bytes; send a window around the cursor")
    return b"".join(parts)


class Streamed(Response):
    """A response that sends parts as they come, and closes their source when the client goes away.

    Not Starlette's own: that one cancels the sending task again at every `await` of the clean-up, and an engine whose
    stream was being closed would be left running.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str, open_requests: OpenRequests) -> None:
        """Send `parts` when called; counted as open until the last one is sent."""
        self.status_code = HTTPStatus.OK
        self.media_type = media_type
        self.background = None
        self.init_headers()
        self._parts = parts
        self._open_requests = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application; the request's body must have been read."""
        del scope
        with self._open_requests:
            async with while_connected(receive):
                await self._send(send)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in parts:
                # A client that does not read must not hold the engine's turn.
                try:
                    async with asyncio.timeout(_SEND_S):
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                except TimeoutError:
                    log.warning("a client took nothing for %.0f s; its request was given up", _SEND_S)
                    return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def lines(open_requests: OpenRequests, parts: AsyncGenerator[bytes, None]) -> Response:
    """Return a response that streams lines and reports an error as the last one."""

    async def body() -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(parts):
                async for part in parts:
                    yield part
        except TabwiseError as error:
            yield wire.line(error=wire.error_fields(error))

    return Streamed(body(), "application/x-ndjson", open_requests)


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncGenerator[None, None]:
    """Cancel the body, once, when the client closes its connection, and go on behind it; all was read that it sent.

    Once, so that what cleans up may wait.
    """
    working = asyncio.current_task()
    assert working is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        working.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
        if gone:
            await asyncio.sleep(0)  # where the cancel that is under way arrives
    except asyncio.CancelledError:
        if not gone or working.uncancel():
            raise
    finally:
        watcher.cancel()
