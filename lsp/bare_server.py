"""A pygls server that does nothing: what the benchmarks hold ours against.

Given a socket, it passes each request for a completion on over HTTP, to `python -m lsp.bare_daemon` for instance, with
the client that ours uses. It reads and writes as pygls does by itself.
"""

import importlib
import sys
from functools import cache
from typing import Any

from lsprotocol import types
from pygls.lsp.server import LanguageServer

server = LanguageServer("bare", "1")


@cache
def _http(socket: str) -> Any:
    aiohttp = importlib.import_module("aiohttp")  # the benchmark of the start must not pay for it
    return aiohttp.ClientSession("http://bare", connector=aiohttp.UnixConnector(socket))


@server.feature(types.TEXT_DOCUMENT_INLINE_COMPLETION, types.InlineCompletionOptions())
async def inline_completion(params: types.InlineCompletionParams) -> types.InlineCompletionList | None:
    """Complete nothing, or with what the daemon says."""
    if len(sys.argv) < 2:
        return None
    async with _http(sys.argv[1]).post("/", json={"line": params.position.line}) as answer:
        text = (await answer.json())["text"]
    return types.InlineCompletionList(items=[types.InlineCompletionItem(insert_text=text)])


if __name__ == "__main__":
    server.start_io()
