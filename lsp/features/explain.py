"""Explanations: the code action "Explain", the command behind it, and its stream.

The command returns the whole Markdown, so that every editor can use it. A client that can show a stream adds a token to
the argument, and gets the text so far in `$/progress` notifications on the way.
"""

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcException, JsonRpcInvalidParams
from pygls.lsp.server import LanguageServer

from agent.errors import TabwiseError
from agent.subject import enclosing
from agent.types import Explanation, ExplanationRequest
from lsp.documents import Document
from lsp.state import State

log = logging.getLogger(__name__)

COMMAND = "tabwise.explain"
_STREAM_S = 1 / 15  # between two notifications: the eye needs no more, and editors redraw the whole


@dataclass(frozen=True, slots=True)
class _Asked:
    document: Document
    code: str
    language: str | None
    token: str | int | None


def register(server: LanguageServer, state: State) -> None:
    """Offer the action and answer the command."""

    @server.feature(
        types.TEXT_DOCUMENT_CODE_ACTION, types.CodeActionOptions(code_action_kinds=[types.CodeActionKind.Empty])
    )
    async def code_action(params: types.CodeActionParams) -> list[types.CodeAction]:
        if params.text_document.uri not in state.library.documents or params.context.only:
            return []  # whoever wants actions of certain kinds, on saving for instance, does not want this one
        place = {"uri": params.text_document.uri, "range": _plain_range(params.range)}
        command = types.Command("Explain", COMMAND, arguments=[place])
        tags = [types.CodeActionTag.LlmGenerated] if _knows_tags(server) else None
        return [types.CodeAction("Explain", kind=types.CodeActionKind.Empty, command=command, tags=tags)]

    # For the list of commands among the capabilities; what is executed is below, where it can be cancelled.
    @server.command(COMMAND)
    async def advertised(argument: dict[str, Any]) -> str:
        return await explain(argument)

    @server.feature(types.WORKSPACE_EXECUTE_COMMAND)
    async def execute_command(params: types.ExecuteCommandParams) -> str:
        if params.command != COMMAND:
            raise JsonRpcInvalidParams(f"unknown command {params.command!r}; known is {COMMAND}")
        if not params.arguments or len(params.arguments) != 1 or not isinstance(params.arguments[0], dict):
            raise JsonRpcInvalidParams(f"{COMMAND} takes one object: uri, range or position, language, token")
        return await explain(params.arguments[0])

    async def explain(argument: dict[str, Any]) -> str:
        asked = _asked(state, argument)
        settings = await state.settings.current()
        request = ExplanationRequest(
            id=uuid.uuid4().hex,
            path=state.path_of(asked.document.uri),
            language=asked.document.language,
            code=asked.code,
            answer_language=asked.language or settings.explain.language,
            max_tokens=settings.explain.max_tokens,
        )

        def tell(text: str) -> None:
            if asked.token is not None:
                server.protocol.notify(types.PROGRESS, types.ProgressParams(asked.token, {"text": text}))

        try:
            return await _stream(state, request, tell)
        except TabwiseError as error:
            log.error("no explanation: %s", error)
            raise JsonRpcException(str(error), types.LSPErrorCodes.RequestFailed.value) from None


async def _stream(state: State, request: ExplanationRequest, tell: Callable[[str], None]) -> str:
    text, told = "", 0.0
    async with aclosing(state.link.explain(request)) as parts:
        async for part in parts:
            if isinstance(part, Explanation):
                tell(part.markdown)
                return part.markdown
            text += part
            if time.monotonic() - told >= _STREAM_S:
                tell(text)
                told = time.monotonic()
    return text


def _asked(state: State, argument: dict[str, Any]) -> _Asked:
    """Read the command's argument.

    Raises:
        JsonRpcInvalidParams: It names no open document, no place, or a wrong type.
    """
    uri = argument.get("uri")
    document = state.library.documents.get(uri) if isinstance(uri, str) else None
    if document is None:
        raise JsonRpcInvalidParams("uri: no open document of that URI")
    language, token = argument.get("language"), argument.get("token")
    if not isinstance(language, (str, type(None))) or not isinstance(token, (str, int, type(None))):
        raise JsonRpcInvalidParams("language is a string, token a string or integer")
    try:
        code = _code(document, argument)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise JsonRpcInvalidParams("range is {start, end}, position {line, character}, with integers") from None
    if not code.strip():
        raise JsonRpcInvalidParams("there is no code at that place")
    return _Asked(document, code, language, token)


def _code(document: Document, argument: dict[str, Any]) -> str:
    chosen = argument.get("range") or {"start": argument["position"], "end": argument["position"]}
    start = (int(chosen["start"]["line"]), int(chosen["start"]["character"]))
    end = (int(chosen["end"]["line"]), int(chosen["end"]["character"]))
    if start != end:
        first, last = sorted((document.place(*start), document.place(*end)))
        before = document.lines[first.line][: first.column]
        # From the beginning of the line where only its indentation was left out, so that the shape of the code shows.
        return (before if not before.strip() else "") + document.between(first, last)
    lines = [document.line(number) for number in range(document.n_lines)]
    begin, after = enclosing(lines, start[0])
    return "\n".join(lines[begin:after])


def _plain_range(chosen: types.Range) -> dict[str, Any]:
    ends = {"start": chosen.start, "end": chosen.end}
    return {name: {"line": place.line, "character": place.character} for name, place in ends.items()}


def _knows_tags(server: LanguageServer) -> bool:
    text_document = server.client_capabilities.text_document
    support = text_document.code_action.tag_support if text_document and text_document.code_action else None
    return support is not None and types.CodeActionTag.LlmGenerated in support.value_set
