"""The dialect of every other server of OpenAI's API, Ollama's for one: text in, text out.

Prefix and suffix go apart, and the server puts its model's sentinels between them; or, where the format was named in the
settings, they go as one text with the sentinels in it. A chat goes as messages. Marks in text of the user's are broken by a
blank, since the server takes them for special tokens. Token ids only spell text, no log-probabilities are known, and every
generation is marked inexact. Knows routes, no HTTP.
"""

from collections.abc import Sequence
from typing import Any

from agent.engines import dialects, marks
from agent.engines.base import Decoded, Event, GenerationRequest, Prefilled, Token
from agent.engines.dialects import Reader
from agent.engines.spelled import Spelling
from agent.fim import SUFFIX, FimFormat
from agent.types import Chat, Message

_ROLES = ("system", "user", "assistant")
_TURN = "<tabwise turn {}>"
_STOPS = 4  # OpenAI's API takes no more


class TextServer:
    """A server that takes and gives text."""

    name = "text"
    exact = False
    context_tokens: int | None = None

    def __init__(self, fmt: FimFormat = SUFFIX) -> None:
        """Write prompts in `fmt`; `SUFFIX` leaves that to the server."""
        self._fmt = fmt
        self._turns = {_TURN.format(role): role for role in _ROLES}
        self.spelling = Spelling((*fmt.sentinels(), *fmt.stops, *self._turns))

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return ids that spell `text`."""
        return self.spelling.tokens(text, special=special)

    async def start_ids(self) -> tuple[int, ...]:
        """Return nothing: the server begins its prompts itself."""
        return ()

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return ids that stand for the chat's turns, the last one the answer's beginning."""
        ids: list[int] = []
        for turn in (*chat.messages, Message("assistant", chat.opening)):
            mark = self.spelling.mark(_TURN.format(turn.role))
            ids += [] if mark is None else [mark]
            ids += [token.id for token in self.spelling.tokens(turn.content)]
        return tuple(ids)

    def asked(self, request: GenerationRequest, model: str) -> tuple[str, dict[str, Any]]:
        """Return the route and the body that ask for a streamed answer."""
        body, pieces = dialects.common_body(request, model), self.spelling.pieces(request.prompt_ids)
        if pieces and pieces[0][0] in self._turns:
            return "/v1/chat/completions", body | {"messages": dialects.turns(self._messages(pieces))}
        if self._fmt is SUFFIX:
            return "/v1/completions", body | _apart(pieces)
        prompt = "".join(text if mark else marks.broken(text) for text, mark in pieces)
        return "/v1/completions", body | {"prompt": prompt, "stop": list(self._fmt.stops[:_STOPS])}

    def reader(self, request: GenerationRequest) -> Reader:
        """Return what reads the answer."""
        pieces = self.spelling.pieces(request.prompt_ids)
        chat = bool(pieces) and pieces[0][0] in self._turns
        begun = pieces[-1][0] if chat and not pieces[-1][1] else ""
        return _TextReader(self.spelling, len(request.prompt_ids), begun)

    def _messages(self, pieces: Sequence[tuple[str, bool]]) -> list[Message]:
        found: list[Message] = []
        for text, mark in pieces:
            if mark:
                found.append(Message(self._turns.get(text, "user"), ""))
            else:
                found[-1] = Message(found[-1].role, marks.broken(text))
        # An empty turn of the assistant's would be an answer that is over.
        return found if found[-1].content else found[:-1]


def _apart(pieces: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    sides = {"": "", SUFFIX.suffix: ""}
    side = ""
    for text, mark in pieces:
        if mark:
            side = text if text == SUFFIX.suffix else ""
        else:
            sides[side] += marks.broken(text)
    if not any(mark for _, mark in pieces):
        return {"prompt": sides[""]}
    # Ollama takes an empty suffix for none, and the prompt for a chat's.
    return {"prompt": sides[""], "suffix": sides[SUFFIX.suffix] or "\n"}


class _TextReader(Reader):
    def __init__(self, spelling: Spelling, prompt_tokens: int, begun: str) -> None:
        super().__init__(prompt_tokens)
        self._spelling = spelling
        self._begun = begun
        self._held: str | None = "" if begun else None
        """What was said so far, while that may be the answer's given beginning, said once more."""
        self._told = False

    async def _choice(self, choice: dict[str, Any], data: dict[str, Any]) -> list[Event]:
        del data
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        text = self._without_beginning(text, last=bool(choice.get("finish_reason")))
        if not text:
            return []
        begin: list[Event] = [] if self._told else [Prefilled(self.total_tokens, self.total_tokens, 0)]
        self._told = True
        ids = tuple(token.id for token in self._spelling.tokens(text))
        return [*begin, Decoded(text, ids, tuple(0.0 for _ in ids), (), exact=False)]

    def _without_beginning(self, text: str, *, last: bool) -> str:
        # Some servers go on with the assistant's turn, others begin it anew.
        if self._held is None:
            return text
        self._held += text
        if self._begun.startswith(self._held) and not last and self._held != self._begun:
            return ""
        said, self._held = self._held, None
        return said.removeprefix(self._begun)
