"""A pygls server that does nothing: what `tabwise bench start` holds ours against."""

from lsprotocol import types
from pygls.lsp.server import LanguageServer

server = LanguageServer("bare", "1")


@server.feature(types.TEXT_DOCUMENT_INLINE_COMPLETION, types.InlineCompletionOptions())
async def inline_completion(params: types.InlineCompletionParams) -> None:
    """Complete nothing."""
    del params


if __name__ == "__main__":
    server.start_io()
