"""llama-server's dialect: llama.cpp's own server, somewhere else.

Its completions take token ids and name every token they answer with, as in `llamacpp.py`, but for those within a character
of several tokens. Knows its routes, no HTTP.
"""

from collections.abc import Sequence
from typing import Any

from agent.engines import chats, dialects
from agent.engines.base import Alternative, Decoded, Event, GenerationRequest, Prefilled, Token
from agent.engines.dialects import Reader
from agent.engines.remote_http import Connection
from agent.types import Chat, Message


class LlamaServer:
    """A llama-server."""

    name = "llama-server"
    exact = True

    def __init__(self, connection: Connection, context_tokens: int | None) -> None:
        """Speak to the server at the other end of `connection`, whose slots hold `context_tokens`."""
        self.context_tokens = context_tokens
        self._connection = connection
        # It closes a connection after each stream without saying so beforehand.
        connection.keeps_open = False

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`."""
        if not text:
            return []
        body = {"content": text, "add_special": False, "parse_special": special, "with_pieces": True}
        answer = await self._connection.post("/tokenize", body)
        return [
            Token(int(item["id"]), item["piece"] if isinstance(item["piece"], str) else None)
            for item in answer["tokens"]
        ]

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt begins."""
        answer = await self._connection.post("/tokenize", {"content": "", "add_special": True})
        return tuple(int(each) for each in answer["tokens"])

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat, in the model's own template."""
        return await chats.chat_ids(chat, self._rendered, self.tokenize)

    async def _rendered(self, messages: Sequence[Message]) -> str:
        return str((await self._connection.post("/apply-template", {"messages": dialects.turns(messages)}))["prompt"])

    def asked(self, request: GenerationRequest, model: str) -> tuple[str, dict[str, Any]]:
        """Return the route and the body that ask for a streamed answer."""
        return "/v1/completions", dialects.common_body(request, model) | {
            "prompt": list(request.prompt_ids),
            "logprobs": max(1, request.alternatives),
            "cache_prompt": request.cached,
            "return_progress": True,
            "timings_per_token": True,  # the only place where the number of tokens is told
        }

    def reader(self, request: GenerationRequest) -> Reader:
        """Return what reads the answer."""
        return _LlamaReader(self, len(request.prompt_ids))


class _LlamaReader(Reader):
    def __init__(self, dialect: LlamaServer, prompt_tokens: int) -> None:
        super().__init__(prompt_tokens)
        self._dialect = dialect
        self._predicted = 0

    async def _choice(self, choice: dict[str, Any], data: dict[str, Any]) -> list[Event]:
        if "prompt_progress" in data:
            progress = data["prompt_progress"]
            self.cached_tokens = progress["cache"]
            return [Prefilled(progress["processed"], progress["total"], progress["cache"])]
        if not choice.get("logprobs"):
            return []
        chosen = choice["logprobs"]["content"][0]
        ids: tuple[int, ...] = (int(chosen["id"]),)
        logps: tuple[float, ...] = (float(chosen["logprob"]),)
        exact = True
        predicted = int(data["timings"]["predicted_n"])
        before, self._predicted = self._predicted, predicted
        if predicted - before > 1:
            # Tokens that end within a character are held back, and only the last of them is reported with the text.
            ids, exact = tuple(token.id for token in await self._dialect.tokenize(choice["text"])), False
            logps = (*(0.0 for _ in ids[1:]), logps[0])
        alternatives = tuple(
            Alternative(int(item["id"]), bytes(item["bytes"]).decode("utf-8", errors="ignore"), float(item["logprob"]))
            for item in chosen["top_logprobs"]
        )
        return [Decoded(choice["text"], ids, logps, alternatives, exact)]
