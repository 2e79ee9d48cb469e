"""The routes that other editors and tools know: OpenAI's completions, chat completions and models.

`/v1/completions` with `suffix` fills in the middle. Texts are the model's own, cut at `stop` and `max_tokens`; none of
our stop rules and filters apply, since these tools have their own. Knows the OpenAI wire format and nothing of daemons.
"""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent import fim, stopping, wire
from agent.context import surroundings
from agent.engine_host import EngineHost
from agent.engines.base import Decoded, Finished, GenerationRequest, Prefilled, Task
from agent.errors import RequestError, TabwiseError
from agent.http_io import OpenRequests, Streamed, body_of, status_of, while_connected
from agent.loaded import LoadedModel
from agent.served_adapters import ServedAdapters
from agent.types import Chat, Message

_DEFAULT_TOKENS = 256  # where a request names no limit; a local machine answers in seconds, not minutes


class _Body(BaseModel):
    # Tools send many fields that a local model has no use for; what is not named here is ignored.
    model_config = ConfigDict(extra="ignore")

    model: str = "tabwise"
    stream: bool = False
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int = 0
    n: int = Field(1, ge=1, le=1)

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(_Body):
    """Body of `/v1/completions`."""

    prompt: str
    suffix: str | None = None


class _Turn(BaseModel):
    role: str
    content: str | list[dict[str, Any]]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part.get("text", "")) for part in self.content if part.get("type") == "text")


class ChatBody(_Body):
    """Body of `/v1/chat/completions`."""

    messages: list[_Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


def routes(host: EngineHost, adapters: ServedAdapters, open_requests: OpenRequests) -> list[Route]:
    """Return the routes.

    Args:
        host: The model to ask.
        adapters: What it is asked with.
        open_requests: Counts what is open.
    """

    def guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                with open_requests:
                    return await handler(request)
            except TabwiseError as error:
                return JSONResponse(_error(error), status_of(error))

        return endpoint

    async def models(request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [{"id": host.name, "object": "model", "owned_by": "local"}]})

    async def completions(request: Request) -> Response:
        body = wire.structure(CompletionBody, await body_of(request))
        _check_model(body.model, host)
        return await _answer(request, host, adapters, open_requests, body, _COMPLETION)

    async def chat(request: Request) -> Response:
        body = wire.structure(ChatBody, await body_of(request))
        _check_model(body.model, host)
        return await _answer(request, host, adapters, open_requests, body, _CHAT)

    return [
        Route("/v1/models", guarded(models)),
        Route("/v1/completions", guarded(completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
    ]


class _Shape:
    """How the two kinds of answers differ on the wire."""

    def __init__(self, name: str, whole: str, part: str, *, chat: bool) -> None:
        self.prefix, self.whole, self.part, self.chat = name, whole, part, chat

    def choice(self, text: str, reason: str | None, *, streamed: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if not self.chat:
            return choice | {"text": text, "logprobs": None}
        content = {"content": text} if text or not streamed else {}
        return choice | {("delta" if streamed else "message"): {"role": "assistant"} | content}


_COMPLETION = _Shape("cmpl", "text_completion", "text_completion", chat=False)
_CHAT = _Shape("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)


async def _answer(
    request: Request,
    host: EngineHost,
    adapters: ServedAdapters,
    open_requests: OpenRequests,
    body: CompletionBody | ChatBody,
    shape: _Shape,
) -> Response:
    head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": host.name}

    async def chunks() -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(_texts(host, adapters, body)) as stream:
                async for text, end in stream:
                    choice = shape.choice(text, end["finish_reason"] if end else None, streamed=True)
                    usage = {"usage": end["usage"]} if end else {}
                    yield _event(head | {"object": shape.part, "choices": [choice]} | usage)
            yield b"data: [DONE]\n\n"
        except TabwiseError as error:
            yield _event(_error(error))

    if body.stream:
        return Streamed(chunks(), "text/event-stream", open_requests)

    answer: dict[str, Any] = {}
    async with while_connected(request.receive):
        said = ""
        async with aclosing(_texts(host, adapters, body)) as stream:
            async for text, end in stream:
                said += text
                if end:
                    choice = shape.choice(said, end["finish_reason"], streamed=False)
                    answer = head | {"object": shape.whole, "choices": [choice], "usage": end["usage"]}
    return Response(json.dumps(answer, ensure_ascii=False), media_type="application/json")


async def _texts(
    host: EngineHost, adapters: ServedAdapters, body: CompletionBody | ChatBody
) -> AsyncGenerator[tuple[str, dict[str, Any] | None], None]:
    """Yield texts, the last one with the reason for its end and the usage."""
    task = Task.EXPLANATION if isinstance(body, ChatBody) else Task.COMPLETION
    async with host.use() as loaded, adapters.held(task) as adapter:
        ask = replace(await _request(loaded, body), adapter=adapter)
        stops = body.stops()
        text, told, decoded, prompt = "", 0, 0, len(ask.prompt_ids)
        reason = "length"
        async with aclosing(loaded.engine.generate(ask)) as stream:
            async for event in stream:
                if isinstance(event, Finished):
                    reason = "stop" if event.ended else "length"
                elif isinstance(event, Decoded):
                    decoded += len(event.ids)
                    if event.ids[-1] in loaded.stop_ids and ask.task is Task.COMPLETION:
                        reason = "stop"
                        break
                    text += event.text
                    place = stopping.find_stop_string(text, stops)
                    if place is not None:
                        text, reason = text[:place], "stop"
                        break
                    sure = len(text) - stopping.held_back(text, stops)
                    if sure > told:
                        yield text[told:sure], None
                        told = sure
                else:
                    assert isinstance(event, Prefilled)
        usage = {"prompt_tokens": prompt, "completion_tokens": decoded, "total_tokens": prompt + decoded}
        yield text[told:], {"finish_reason": reason, "usage": usage}


async def _request(loaded: LoadedModel, body: CompletionBody | ChatBody) -> GenerationRequest:
    if isinstance(body, ChatBody):
        turns = tuple(Message(turn.role, turn.text()) for turn in body.messages)
        ids, task = await loaded.engine.chat_ids(Chat(turns)), Task.EXPLANATION
        limit = body.max_completion_tokens or body.max_tokens
    else:
        around = surroundings(body.prompt, body.suffix or "")
        # Without a suffix there is no middle: the text is continued as it stands.
        pieces = fim.render(
            loaded.fim if body.suffix else None,
            head=around.head,
            live=around.live,
            suffix=around.closers + around.suffix,
        )
        ids, task, limit = await loaded.ids(pieces), Task.COMPLETION, body.max_tokens
    room = loaded.engine.context_tokens - len(ids)
    return GenerationRequest(
        ids, min(limit or _DEFAULT_TOKENS, max(1, room)), task=task, temperature=body.temperature, seed=body.seed
    )


def _check_model(name: str, host: EngineHost) -> None:
    if name not in {"tabwise", host.name}:
        raise RequestError(f"the model {name!r} is not served here; use {host.name!r} or 'tabwise'")


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _error(error: TabwiseError) -> dict[str, Any]:
    kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
    return {"error": {"message": str(error), "type": kind, "code": error.code}}
