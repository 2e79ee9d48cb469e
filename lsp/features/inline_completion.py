"""textDocument/inlineCompletion: ghost text; and textDocument/completion for clients that do not know it.

Two messages of our own. A client says with `tabwise/cursor` that the cursor moved without a key. To one that says in
`initialize` that it can refresh (`experimental: {"tabwise": {"refresh": true}}`), `tabwise/refresh` tells that the
text which was answered for a version of a document has grown, and may be asked for again.
"""

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lsprotocol import types
from pygls.lsp.server import LanguageServer

from agent.types import Trigger
from lsp.anchors import Around, Window
from lsp.completions import Asked
from lsp.documents import Change, Document, Place
from lsp.state import State

if TYPE_CHECKING:
    from agent.config import CompletionSettings

log = logging.getLogger(__name__)

_LABEL_CHARS = 60  # of a completion's first line, in lists


@dataclass(frozen=True, slots=True)
class _Answer:
    document: Document
    start: Place
    """Where the text is inserted."""
    end: Place
    """The first character that stays."""
    text: str


def register(server: LanguageServer, state: State) -> None:
    """Answer inline completion. The completion list is registered by `register_list`, once the client is known."""

    @server.feature(types.TEXT_DOCUMENT_INLINE_COMPLETION, types.InlineCompletionOptions())
    async def inline_completion(params: types.InlineCompletionParams) -> types.InlineCompletionList | None:
        invoked = params.context.trigger_kind == types.InlineCompletionTriggerKind.Invoked
        trigger = Trigger.MANUAL if invoked else Trigger.AUTOMATIC
        answer = await _latest(state, params, trigger, params.context.selected_completion_info)
        if answer is None:
            return None
        item = types.InlineCompletionItem(insert_text=answer.text, range=_range(answer))
        return types.InlineCompletionList(items=[item])

    @server.feature("tabwise/cursor")
    def cursor(params: Any) -> None:
        _cursor(state, params)

    def grown(document: Document) -> None:
        now = state.library.documents.get(document.uri)
        # The same version, not the same object: an entry chosen in a list stands in a document of its own.
        if now is not None and now.version == document.version:
            told = {"textDocument": {"uri": document.uri, "version": document.version}}
            server.protocol.notify("tabwise/refresh", told)

    state.completions.on_grown = grown


def register_list(server: LanguageServer, state: State) -> None:
    """Answer completion with a list of one."""

    @server.feature(types.TEXT_DOCUMENT_COMPLETION)
    async def completion(params: types.CompletionParams) -> types.CompletionList | None:
        # "Invoked" covers typing a word as well, in lists: what is asked for by key cannot be told apart.
        answer = await _latest(state, params, Trigger.AUTOMATIC, None)
        if answer is None:
            return None
        first = answer.text.strip().split("\n")[0]
        item = types.CompletionItem(
            label=first if len(first) <= _LABEL_CHARS else first[: _LABEL_CHARS - 1] + "…",
            kind=types.CompletionItemKind.Text,
            detail="Tabwise",
            text_edit=types.TextEdit(_range(answer), answer.text),
            # The client filters by what stands before the cursor, and the completion begins only behind it.
            filter_text=answer.document.between(answer.start, answer.end) + answer.text,
            insert_text_format=types.InsertTextFormat.PlainText,
            insert_text_mode=types.InsertTextMode.AsIs,  # the text has its indentation already
        )
        return types.CompletionList(is_incomplete=True, items=[item])


async def _latest(
    state: State,
    params: types.InlineCompletionParams | types.CompletionParams,
    trigger: Trigger,
    selected: types.SelectedCompletionInfo | None,
) -> _Answer | None:
    document = state.library.documents.get(params.text_document.uri)
    if document is None:
        log.warning("a completion of a document that was never opened was asked for")
        return None
    place = document.place(params.position.line, params.position.character)
    answer = await state.requests.run(document.uri, _answer(state, document, place, trigger, selected))
    if state.library.documents.get(document.uri) is not document:
        return None  # the document went on meanwhile, and the text may not fit any more
    return answer


async def _answer(
    state: State, document: Document, place: Place, trigger: Trigger, selected: types.SelectedCompletionInfo | None
) -> _Answer | None:
    settings = (await state.settings.current()).completion
    if trigger is Trigger.AUTOMATIC and (not settings.automatic or document.language in settings.languages_off):
        return None
    start = end = place
    chosen = ""
    if selected is not None and selected.range.start.line != selected.range.end.line:
        return None  # an item's range lies on one line
    if selected is not None:
        # The editor's own list has an entry selected: our text goes on from there.
        start = document.place(selected.range.start.line, selected.range.start.character)
        end = max(place, document.place(selected.range.end.line, selected.range.end.character))
        chosen = selected.text
    asked = _asked(state, document, end, trigger, settings)
    if chosen:
        # As if the entry stood in the document in place of what it replaces.
        change = Change(chosen, _position(document, start), _position(document, end))
        above, newline, last = chosen.rpartition("\n")
        behind = (
            Place(start.line + above.count("\n") + 1, len(last))
            if newline
            else Place(start.line, start.column + len(chosen))
        )
        as_if = document.changed(document.version, [change])
        asked = replace(asked, document=as_if, place=behind, is_hypothetical=True)
    offer = await state.completions.offer(asked)
    if offer is None:
        return None
    text = chosen + offer.text.replace("\n", document.newline)
    return _Answer(document, start, Place(end.line, end.column + offer.replaced_chars), text)


def _cursor(state: State, params: Any) -> None:
    try:
        uri = params["textDocument"]["uri"]
        place = (int(params["position"]["line"]), int(params["position"]["character"]))
    except (KeyError, TypeError, ValueError):
        log.warning("tabwise/cursor takes textDocument: {uri} and position: {line, character}")
        return
    document = state.library.documents.get(uri) if isinstance(uri, str) else None
    if document is not None:
        state.spawn(_rest(state, document, document.place(*place)))


async def _rest(state: State, document: Document, place: Place) -> None:
    settings = (await state.settings.current()).completion
    is_wanted = settings.automatic and document.language not in settings.languages_off
    if is_wanted and state.library.documents.get(document.uri) is document:
        state.completions.rest(_asked(state, document, place, Trigger.AUTOMATIC, settings))


def _asked(state: State, document: Document, place: Place, trigger: Trigger, settings: "CompletionSettings") -> Asked:
    above, below = state.library.around(document)
    return Asked(
        document=document,
        facts=state.describe(document),
        place=place,
        around=Around(above, below),
        trigger=trigger,
        window=Window.of(settings.prefix_tokens, settings.suffix_tokens),
        deleted=state.deleted,
        refreshes=state.refreshes,
        activity_ms=state.activity_ms(),
    )


def _position(document: Document, place: Place) -> tuple[int, int]:
    return place.line, document.character(place)


def _range(answer: _Answer) -> types.Range:
    # On one line, as the protocol wants it: what is replaced never reaches beyond the cursor's line.
    ends = (_position(answer.document, place) for place in (answer.start, answer.end))
    return types.Range(*(types.Position(line, character) for line, character in ends))
