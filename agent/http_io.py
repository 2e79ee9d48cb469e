"""Reading requests and streaming answers over HTTP: what the daemon's own routes and OpenAI's share.

Knows connections and errors, not what is asked or answered.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from agent import wire
from agent.errors import ModelError, PromptTooLongError, RequestError, TabwiseError
from agent.racing import until

_BODY_BYTES = 4 << 20  # windows of documents are 30 KB; anything near this is a mistake or an attack
_STATUS: dict[type[TabwiseError], int] = {ModelError: 503, RequestError: 400, PromptTooLongError: 400}


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


def lines(request: Request, open_requests: OpenRequests, parts: AsyncGenerator[bytes, None]) -> Response:
    """Return a response that streams `parts`, reports errors as a last line, and stops when the client goes away."""

    async def body() -> AsyncGenerator[bytes, None]:
        with open_requests:
            try:
                async with aclosing(until_gone(request, parts)) as stream:
                    async for part in stream:
                        yield part
            except TabwiseError as error:
                yield wire.line(error=wire.error_fields(error))

    return StreamingResponse(body(), media_type="application/x-ndjson")


async def until_gone(request: Request, parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield `parts` until the client closes its connection; its body must have been read."""
    gone = asyncio.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    watcher = asyncio.create_task(watch())
    try:
        async with aclosing(until(gone, parts)) as stream:
            async for part in stream:
                yield part
    finally:
        watcher.cancel()
