"""textDocument/did* and notebookDocument/did*: what the editor says of its documents goes into the library."""

import logging
import time
from collections.abc import Sequence

from lsprotocol import types
from pygls.lsp.server import LanguageServer

from lsp.documents import Cell, Change, Document, Notebook
from lsp.state import State

log = logging.getLogger(__name__)


def register(server: LanguageServer, state: State) -> None:
    """Answer the notifications. Plain functions, so that each is done before the next message is read."""

    @server.feature(types.TEXT_DOCUMENT_DID_OPEN)
    def did_open(params: types.DidOpenTextDocumentParams) -> None:
        _open(state, [params.text_document])

    @server.feature(types.TEXT_DOCUMENT_DID_CHANGE)
    def did_change(params: types.DidChangeTextDocumentParams) -> None:
        _change(state, params.text_document, params.content_changes)

    @server.feature(types.TEXT_DOCUMENT_DID_CLOSE)
    def did_close(params: types.DidCloseTextDocumentParams) -> None:
        _close(state, params.text_document.uri)

    @server.feature(types.NOTEBOOK_DOCUMENT_DID_OPEN)
    def notebook_did_open(params: types.DidOpenNotebookDocumentParams) -> None:
        book = params.notebook_document
        state.library.notebooks[book.uri] = Notebook(book.uri, _cells(book.cells))
        _open(state, params.cell_text_documents)

    @server.feature(types.NOTEBOOK_DOCUMENT_DID_CHANGE)
    def notebook_did_change(params: types.DidChangeNotebookDocumentParams) -> None:
        _change_notebook(state, params)

    @server.feature(types.NOTEBOOK_DOCUMENT_DID_CLOSE)
    def notebook_did_close(params: types.DidCloseNotebookDocumentParams) -> None:
        state.library.notebooks.pop(params.notebook_document.uri, None)
        for cell in params.cell_text_documents:
            _close(state, cell.uri)


def _open(state: State, items: Sequence[types.TextDocumentItem]) -> None:
    for item in items:
        document = Document.opened(item.uri, str(item.language_id), item.version, item.text, state.units)
        state.library.documents[item.uri] = document


def _close(state: State, uri: str) -> None:
    state.library.documents.pop(uri, None)
    state.completions.forget(uri)
    state.elsewhere.closed(uri)


def _change(
    state: State,
    identifier: types.VersionedTextDocumentIdentifier,
    changes: Sequence[types.TextDocumentContentChangeEvent],
) -> None:
    document = state.library.documents.get(identifier.uri)
    if document is None:
        log.warning("a change of a document that was never opened was ignored")
        return
    made = [_as_change(change) for change in changes]
    for change in made:
        document = document.changed(identifier.version, [change])
        if change.start is not None:
            state.elsewhere.edited(document, change.start[0], change.start[0] + change.text.count("\n"))
    # At the end stands the document that was visited last.
    del state.library.documents[identifier.uri]
    state.library.documents[identifier.uri] = document
    state.deleted = bool(made) and made[-1].start is not None and not made[-1].text
    state.last_change = time.monotonic()
    state.completions.rhythm.key(state.last_change)


def _as_change(change: types.TextDocumentContentChangeEvent) -> Change:
    if isinstance(change, types.TextDocumentContentChangePartial):
        start, end = change.range.start, change.range.end
        return Change(change.text, (start.line, start.character), (end.line, end.character))
    return Change(change.text)


def _change_notebook(state: State, params: types.DidChangeNotebookDocumentParams) -> None:
    uri = params.notebook_document.uri
    book = state.library.notebooks.get(uri)
    changes = params.change.cells
    if book is None or changes is None:
        return
    if changes.structure is not None:
        array = changes.structure.array
        state.library.notebooks[uri] = book.spliced(array.start, array.delete_count, _cells(array.cells or ()))
        _open(state, changes.structure.did_open or ())
        for closed in changes.structure.did_close or ():
            _close(state, closed.uri)
        state.last_change = time.monotonic()
    for content in changes.text_content or ():
        _change(state, content.document, content.changes)


def _cells(cells: Sequence[types.NotebookCell]) -> tuple[Cell, ...]:
    return tuple(Cell(cell.document, cell.kind == types.NotebookCellKind.Code) for cell in cells)
