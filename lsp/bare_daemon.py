"""An HTTP server on a Unix socket that says the same to everybody: the other end of a bare round trip."""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


async def answer(request: Request) -> Response:
    """Read the body, and answer."""
    await request.json()
    return JSONResponse({"text": "value = 1"})


if __name__ == "__main__":
    uvicorn.run(Starlette(routes=[Route("/", answer, methods=["POST"])]), uds=sys.argv[1], log_level="error")
