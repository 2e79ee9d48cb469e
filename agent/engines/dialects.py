"""What servers that speak OpenAI's API differ in: how they tokenise, how they are asked, and how their answers are read.

OpenAI's API has no token ids, and the engines' protocol speaks nothing else. So each kind of server has a dialect: one for
llama-server and one for vLLM, whose extensions name every token, and one for all others, where ids only spell the text.
Knows no HTTP and no settings.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from agent.engines.base import Decoded, Event, GenerationRequest, Prefilled, Token
from agent.errors import RemoteError
from agent.types import Chat, Message


@contextmanager
def understood() -> Iterator[None]:
    """Read an answer within it: where that has another form than it should, that is the server's error.

    Raises:
        RemoteError: It has.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RemoteError(f"the server's answer has another form than expected ({type(error).__name__})") from None


class Reader:
    """Reads one streamed answer; each dialect reads choices in its own way."""

    def __init__(self, prompt_tokens: int) -> None:
        """Have read nothing yet, of the answer to a prompt of so many tokens."""
        self.total_tokens = prompt_tokens
        self.cached_tokens = 0
        """Of the prompt, as far as the server tells."""
        self.decoded_tokens = 0
        self._read_tokens = 0
        self.reason: str | None = None
        """Why the answer ended; None before it has."""

    async def read(self, data: dict[str, Any]) -> list[Event]:
        """Return what an event of the stream tells.

        Raises:
            RemoteError: It is none of this dialect's.
        """
        with understood():
            self._usage(data.get("usage"))
            choices = data.get("choices") or ()
            events = await self._choice(choices[0], data) if choices else await self._rest(data)
            if choices and choices[0].get("finish_reason"):
                self.reason = str(choices[0]["finish_reason"])
            self.decoded_tokens += sum(len(event.ids) for event in events if isinstance(event, Decoded))
            read = (event.done_tokens for event in events if isinstance(event, Prefilled))
            self._read_tokens = max((self._read_tokens, *read))
        return events

    @property
    def progress(self) -> int:
        """How much the answer has brought: it grows with tokens read or written, and at the end."""
        return self._read_tokens + self.decoded_tokens + (self.reason is not None)

    def _usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            details = usage.get("prompt_tokens_details") or {}
            self.cached_tokens = int(details.get("cached_tokens") or 0)

    async def _choice(self, choice: dict[str, Any], data: dict[str, Any]) -> list[Event]:
        raise NotImplementedError

    async def _rest(self, data: dict[str, Any]) -> list[Event]:
        """Read an event without choices."""
        del data
        return []


class Dialect(Protocol):
    """One kind of server."""

    name: str
    exact: bool
    """Whether token ids are the model's own."""
    context_tokens: int | None
    """Room for prompt and answer, where the server tells."""

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`; without `special`, no text becomes a special token."""

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt begins."""

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat."""

    def asked(self, request: GenerationRequest, model: str) -> tuple[str, dict[str, Any]]:
        """Return the route and the body that ask for a streamed answer."""

    def reader(self, request: GenerationRequest) -> Reader:
        """Return what reads the answer."""


def common_body(request: GenerationRequest, model: str) -> dict[str, Any]:
    """Return what is asked of every server alike."""
    return {
        "model": model,
        "max_tokens": max(1, request.max_tokens),  # with none, servers refuse or write one all the same
        "temperature": request.temperature,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as they travel."""
    return [{"role": turn.role, "content": turn.content} for turn in messages]
