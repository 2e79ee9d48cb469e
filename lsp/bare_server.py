"""A pygls server that does nothing: what the benchmarks hold ours against.

Given a socket, it passes each request for a completion on over HTTP, to `python -m lsp.bare_daemon` for instance.
"""

import sys
from typing import TYPE_CHECKING

from lsprotocol import types
from pygls.lsp.server import LanguageServer

if TYPE_CHECKING:
    import httpx

server = LanguageServer("bare", "1")
_http: "httpx.AsyncClient | None" = None


@server.feature(types.TEXT_DOCUMENT_INLINE_COMPLETION, types.InlineCompletionOptions())
async def inline_completion(params: types.InlineCompletionParams) -> types.InlineCompletionList | None:
    """Complete nothing, or with what the daemon says."""
    if _http is None:
        return None
    answer = await _http.post("/", json={"line": params.position.line})
    return types.InlineCompletionList(items=[types.InlineCompletionItem(insert_text=answer.json()["text"])])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        import httpx  # the benchmark of the start must not pay for it

        _http = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=sys.argv[1]), base_url="http://bare")
    server.start_io()
