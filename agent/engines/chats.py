"""A chat as token ids, where a server applies the model's template: contents never become special tokens.

The template is applied to placeholders in the contents' stead, so that only its own text is tokenised with special tokens.
Knows neither servers nor templates: both are handed to it as callables.
"""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from agent.engines.base import Token
from agent.errors import EngineError
from agent.types import Chat, Message


class Tokenize(Protocol):
    """An engine's `tokenize`."""

    def __call__(self, text: str, *, special: bool = False) -> Awaitable[list[Token]]:
        """Return the tokens of `text`."""


async def chat_ids(
    chat: Chat, render: Callable[[Sequence[Message]], Awaitable[str]], tokenize: Tokenize
) -> tuple[int, ...]:
    """Return the prompt for a chat.

    Args:
        chat: The chat, its opening included.
        render: Applies the model's template and opens the answer.
        tokenize: Turns text into tokens.

    Raises:
        EngineError: The template leaves a turn out.
    """
    mark = secrets.token_hex(8)
    marked = [Message(turn.role, f"<{mark}:{index}>") for index, turn in enumerate(chat.messages)]
    rest = await render(marked)
    ids: list[int] = []
    for turn, placeholder in zip(chat.messages, marked, strict=True):
        frame, found, rest = rest.partition(placeholder.content)
        if not found:
            raise EngineError(f"the model's chat template leaves out a turn of {turn.role!r}; choose another model")
        ids += [token.id for token in await tokenize(frame, special=True)]
        ids += [token.id for token in await tokenize(turn.content)]
    ids += [token.id for token in await tokenize(rest, special=True)]
    ids += [token.id for token in await tokenize(chat.opening)]
    return tuple(ids)
