"""vLLM's dialect, and its routes for adapters.

Its completions take token ids and name tokens by id where they are asked to; texts of single tokens are had by turning ids
back into text. Its tokenizer takes every mark for the special token: marks in text of the user's are cut in two before they
get there. Knows its routes, no HTTP. Tried with
vLLM 0.32 on a CPU.
"""

import secrets
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from agent.engines import chats, dialects, marks
from agent.engines.base import Alternative, Decoded, Event, GenerationRequest, Prefilled, Token
from agent.engines.dialects import Reader
from agent.engines.remote_http import Connection
from agent.types import Chat, Message

MOST_ALTERNATIVES = 20
"""vLLM refuses more, unless it was started with another `--max-logprobs`."""
_SEPARATOR = "\x1f"  # a control character that nobody writes; every byte is a token where tokens are made of bytes
_ID = "token_id:"
_AS_THE_MODEL_IS = {
    # Left out, vLLM takes these from the model's generation_config.json; Qwen's would punish every repeated token, and
    # code repeats itself.
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Vllm:
    """A vLLM server."""

    name = "vLLM"
    exact = True

    def __init__(self, connection: Connection, model: str, context_tokens: int | None) -> None:
        """Speak to the server at the other end of `connection` about `model`."""
        self.context_tokens = context_tokens
        self._connection = connection
        self._model = model
        self._texts: dict[int, str | None] = {}
        self._separator: int | None = None

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`."""
        tokens = await self._tokens(text)
        found = {token.text for token in tokens if token.text and marks.may_be_special(token.text)}
        if special or not any(mark.strip() in text for mark in found):
            return tokens
        return await self._without_marks(text, found)

    async def _without_marks(self, text: str, found: set[str]) -> list[Token]:
        """Return the tokens of a text in which these marks are none: cut within each, and the cut taken out again."""
        cut = text
        for mark in found:
            cut = _SEPARATOR.join(marks.parts(cut, mark))
        separator = await self._separator_id()
        tokens = [token for token in await self._tokens(cut) if token.id != separator]
        clean = not any(token.text and marks.may_be_special(token.text) for token in tokens)
        if clean and await self._text([token.id for token in tokens]) == text:
            return tokens
        # The text holds the separator itself, or this vocabulary joins it with its neighbours: piece by piece, then.
        pieces = marks.parts(text, next(mark for mark in found if mark.strip() in text))
        return [token for piece in pieces for token in await self.tokenize(piece)]

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt begins."""
        bare, whole = await self._ids("a"), await self._ids("a", start=True)
        return tuple(whole[: len(whole) - len(bare)]) if whole[-len(bare) :] == bare else ()

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat, in the model's own template."""
        return await chats.chat_ids(chat, self._rendered, self.tokenize)

    async def _rendered(self, messages: Sequence[Message]) -> str:
        body = {"model": self._model, "messages": dialects.turns(messages), "add_generation_prompt": True}
        answer = await self._connection.post("/tokenize", body)
        return await self._text([int(one) for one in answer["tokens"]])

    def asked(self, request: GenerationRequest, model: str) -> tuple[str, dict[str, Any]]:
        """Return the route and the body that ask for a streamed answer."""
        body = dialects.common_body(request, model) | _AS_THE_MODEL_IS
        body |= {
            "prompt": list(request.prompt_ids),
            "logprobs": min(request.alternatives, MOST_ALTERNATIVES),
            "return_tokens_as_token_ids": True,
        }
        if not request.cached:
            body["cache_salt"] = secrets.token_hex(16)  # nothing in the cache has it
        return "/v1/completions", body

    def reader(self, request: GenerationRequest) -> Reader:
        """Return what reads the answer."""
        return _VllmReader(self, request)

    async def names_tokens(self, ids: Sequence[int]) -> bool:
        """Have one token written behind `ids`, and tell whether the server takes ids and names what it writes by id.

        Raises:
            RemoteError: It does not take them, or fails.
        """
        path, body = self.asked(GenerationRequest(tuple(ids), 1, alternatives=1), self._model)
        named = True
        async with aclosing(self._connection.stream(path, body, lambda: 0)) as events:
            async for data in events:
                if "error" in data or data.get("object") == "error":
                    raise self._connection.failed(data)
                for choice in data.get("choices") or ():
                    tokens = (choice.get("logprobs") or {}).get("tokens") or ()
                    named = named and (bool(tokens) or not choice.get("text"))
                    named = named and all(str(token).startswith(_ID) for token in tokens)
        return named

    async def texts(self, ids: Sequence[int]) -> list[str | None]:
        """Return the text of each token; None where its bytes are no text on their own."""
        if new := [one for one in dict.fromkeys(ids) if one not in self._texts]:
            separator = await self._separator_id()
            new = [one for one in new if one != separator]
            joined = [separator, *(each for one in new for each in (one, separator))]
            found = (await self._text(joined)).split(_SEPARATOR)[1:-1]
            if len(found) != len(new):  # one of them holds the separator
                found = [await self._text([one]) for one in new]
            self._texts |= {one: None if "\ufffd" in text else text for one, text in zip(new, found, strict=True)}
        return [self._texts[one] for one in ids]

    async def _separator_id(self) -> int:
        if self._separator is None:
            self._separator = (await self._ids(_SEPARATOR))[-1]
            self._texts[self._separator] = _SEPARATOR  # asked for between others, it could not be told from these
        return self._separator

    async def _tokens(self, text: str) -> list[Token]:
        if not text:
            return []
        ids = await self._ids(text)
        return [Token(one, each) for one, each in zip(ids, await self.texts(ids), strict=True)]

    async def _ids(self, text: str, *, start: bool = False) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": start}
        return [int(one) for one in (await self._connection.post("/tokenize", body))["tokens"]]

    async def _text(self, ids: Sequence[int]) -> str:
        body = {"model": self._model, "tokens": list(ids)}
        return str((await self._connection.post("/detokenize", body))["prompt"])


class _VllmReader(Reader):
    def __init__(self, dialect: Vllm, request: GenerationRequest) -> None:
        super().__init__(len(request.prompt_ids))
        self._dialect = dialect
        self._alternatives = request.alternatives
        self._begun = False

    async def _choice(self, choice: dict[str, Any], data: dict[str, Any]) -> list[Event]:
        del data
        told = choice.get("logprobs") or {}
        ids = [_named(token) for token in told.get("tokens") or ()]
        if not ids:
            return await self._rest_of_text(choice.get("text") or "")
        logps = [each if each is not None else 0.0 for each in told["token_logprobs"]]
        exact = None not in told["token_logprobs"]
        others = [await self._likeliest(each) for each in told.get("top_logprobs") or [None] * len(ids)]
        begin: list[Event] = [] if self._begun else [Prefilled(self.total_tokens, self.total_tokens, 0)]
        self._begun = True
        text = choice.get("text") or ""
        texts = await self._texts(ids, text)
        if texts is None:
            return [*begin, Decoded(text, tuple(ids), tuple(logps), others[-1], exact)]
        steps = zip(texts, ids, logps, others, strict=True)
        return [*begin, *(Decoded(each, (one,), (logp,), other, exact) for each, one, logp, other in steps)]

    async def _texts(self, ids: Sequence[int], text: str) -> list[str] | None:
        """Return each token's part of `text`; None where that cannot be told, since a character has several tokens."""
        if len(ids) == 1:
            return [text]
        texts = [each or "" for each in await self._dialect.texts(ids)]
        # Special tokens have no text in an answer.
        shown = ["" if marks.may_be_special(each) else each for each in texts]
        return next((each for each in (texts, shown) if "".join(each) == text), None)

    async def _rest_of_text(self, text: str) -> list[Event]:
        # What was held back of the text comes without a token.
        if not text:
            return []
        ids = tuple(token.id for token in await self._dialect.tokenize(text))
        return [Decoded(text, ids, tuple(0.0 for _ in ids), (), exact=False)] if ids else []

    async def _likeliest(self, told: dict[str, float] | None) -> tuple[Alternative, ...]:
        if not told or not self._alternatives:
            return ()
        ranked = sorted(told.items(), key=lambda item: -item[1])[: self._alternatives]
        ids = [_named(name) for name, _ in ranked]
        texts = await self._dialect.texts(ids)
        return tuple(
            Alternative(one, text or "", logp) for one, text, (_, logp) in zip(ids, texts, ranked, strict=True)
        )


def _named(token: str) -> int:
    if not token.startswith(_ID):
        raise ValueError  # a text, which may well be a number
    return int(token.removeprefix(_ID))
