"""textDocument/inlineCompletion: ghost text; and textDocument/completion for clients that do not know it."""

import logging
import uuid
from dataclasses import dataclass

from lsprotocol import types
from pygls.lsp.server import LanguageServer

from agent.errors import TabwiseError
from agent.types import Completion, CompletionRequest, Trigger
from lsp.documents import Document, length
from lsp.state import State

log = logging.getLogger(__name__)

_LABEL_CHARS = 60  # of a completion's first line, in lists


@dataclass(frozen=True, slots=True)
class _Answer:
    document: Document
    completion: Completion
    start: int
    """Offset from which the text is inserted."""
    end: int
    """Offset of the first character that stays."""
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
            filter_text=answer.document.text[answer.start : answer.end] + answer.text,
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
    place = document.offset(params.position.line, params.position.character)
    work = _answer(state, document, place, trigger, selected)
    return await state.completions.run(document.uri, work)


async def _answer(
    state: State, document: Document, place: int, trigger: Trigger, selected: types.SelectedCompletionInfo | None
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
        start = document.offset(selected.range.start.line, selected.range.start.character)
        end = max(place, document.offset(selected.range.end.line, selected.range.end.character))
        chosen = selected.text
    prefix, suffix = state.window(document, start)
    behind = suffix[end - start :]
    request = CompletionRequest(
        id=uuid.uuid4().hex,
        document=state.describe(document),
        prefix=prefix + chosen,
        suffix=behind,
        trigger=trigger,
        activity_ms=state.activity_ms(),
    )
    try:
        completion = await state.link.complete(request)
    except TabwiseError as error:
        log.error("no completion: %s", error)
        return None
    if not completion.text:
        return None
    text = chosen + completion.text.replace("\n", _newline(document))
    return _Answer(document, completion, start, end + completion.replaced_chars, text)


def _newline(document: Document) -> str:
    return "\r\n" if "\r\n" in document.text else "\n"


def _range(answer: _Answer) -> types.Range:
    document = answer.document
    line, start = document.position(answer.start)
    # On one line, as the protocol wants it: what is replaced never reaches beyond the cursor's line.
    end = start + length(document.text[answer.start : answer.end], document.units)
    return types.Range(types.Position(line, start), types.Position(line, end))
