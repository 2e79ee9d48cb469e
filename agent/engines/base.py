"""The protocol that every engine speaks: token ids in, a stream of events out.

Knows nothing of documents, prompts' layouts or HTTP clients. Cancelling is closing the stream: an engine notices it
between two decode steps and between two batches of prefill, frees what it holds, and is ready for the next request.
Callers wrap streams in `contextlib.aclosing`, so that leaving the loop closes them at once.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from agent.types import Chat


class Task(StrEnum):
    """What a generation is for. Each task keeps a key-value cache of its own."""

    COMPLETION = "completion"
    EXPLANATION = "explanation"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter on disk that was found to belong to the loaded model."""

    name: str
    """Unlike any other's: it ends with a hash of the weights."""
    folder: Path
    """As PEFT saves one: adapter_config.json and adapter_model.safetensors."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to be continued."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    """With 0 the prompt is only read into the cache."""
    task: Task = Task.COMPLETION
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    seed: int = 0
    alternatives: int = 0
    """How many of the likeliest tokens to report with each one."""
    adapter: str | None = None
    """Name of an attached adapter; None for the bare model."""
    ahead: bool = False
    """Nobody waits for it: it is broken off as soon as anything else is asked, and displaces no prompt in use."""
    cached: bool = True
    """Whether what is in the key-value cache may be used; without it all of the prompt is computed anew."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that might have been chosen."""

    id: int
    text: str
    logp: float


@dataclass(frozen=True, slots=True)
class Prefilled:
    """So much of the prompt is computed."""

    done_tokens: int
    total_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """A token was chosen, or several where text is complete only with the last of them."""

    text: str
    ids: tuple[int, ...]
    logps: tuple[float, ...]
    alternatives: tuple[Alternative, ...] = ()
    exact: bool = True
    """False where `ids` were recovered from the text."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The stream is over."""

    ended: bool
    """True where the model ended the text itself."""
    prefill_tokens: int
    cached_tokens: int
    decoded_tokens: int
    gave_way: bool = False
    """Whether it was broken off for somebody who waits."""


Event = Prefilled | Decoded | Finished


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a text: its id, and the text it stands for."""

    id: int
    text: str | None
    """None where its bytes are no text on their own."""


class Engine(Protocol):
    """A loaded model."""

    on_gpu: bool
    """Whether a GPU computes: prompts are then read ten times as fast and more."""

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together. May shrink, where the device turns out to have too little memory."""

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`.

        Args:
            text: Text of any length.
            special: Whether words that name special tokens become these. Never for text of the user's.
        """

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt of this model begins; most code models have none."""

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat, in the model's own template; contents never become special tokens."""

    def held(self, prompt_ids: tuple[int, ...], adapter: str | None = None) -> int:
        """Return how many tokens at the beginning of a completion's prompt are computed already, as far as is known.

        Args:
            prompt_ids: The prompt.
            adapter: What they must have been computed with: the name of an adapter, or None for the bare model.
        """

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Continue a prompt.

        Returns:
            Any number of `Prefilled`, then of `Decoded`, then one `Finished`. Closing it cancels the work.

        Raises:
            PromptTooLongError: Prompt and allowance exceed the context.
            EngineError: The engine broke or refused.
        """

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters, each to the requests that name it, in place of those that were attached before.

        Called between two streams. All or nothing: where one is refused, those from before stay.

        Raises:
            AdapterError: One of them is damaged, or was made for another model; the message names it.
        """

    async def close(self) -> None:
        """Free the model's memory. Streams still open end with an error."""
