"""Stand-ins for speed and for scripted timing: a tokenizer of bytes, an engine that says what it is told, a clock."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from agent.catalog import LocalModel
from agent.engines.base import (
    Adapter,
    Alternative,
    Decoded,
    Engine,
    Event,
    Finished,
    GenerationRequest,
    Prefilled,
    Token,
)
from agent.errors import AdapterError, PromptTooLongError
from agent.types import Chat, Completion, CompletionRequest, Source, StopReason, Timing

SPECIALS = (
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|file_sep|>",
    "<|repo_name|>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|fim_pad|>",
)
END_ID = 256 + SPECIALS.index("<|endoftext|>")

Say = Callable[[str], str]
"""From the prompt's text, with specials spelled out, to the answer's."""


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def encode(text: str, *, special: bool = False) -> list[Token]:
    """One token for each character's bytes; specials are tokens only where that is allowed."""
    tokens: list[Token] = []
    while text:
        found = next((name for name in SPECIALS if special and text.startswith(name)), None)
        if found:
            tokens.append(Token(256 + SPECIALS.index(found), found))
            text = text[len(found) :]
        else:
            raw = text[0].encode()
            tokens += [Token(byte, text[0] if len(raw) == 1 else None) for byte in raw]
            text = text[1:]
    return tokens


def decode(ids: Sequence[int]) -> str:
    """The text of some tokens, with specials spelled out."""
    parts = [SPECIALS[one - 256].encode() if one >= 256 else bytes([one]) for one in ids]
    return b"".join(parts).decode(errors="replace")


@dataclass
class FakeEngine:
    """Says what `say` returns, a character a token, at a pace."""

    say: Say = lambda prompt: "pass\n"
    token_s: float = 0.0
    batch_s: float = 0.0
    batch_tokens: int = 64
    context_tokens: int = 4096
    on_gpu: bool = False
    alternatives: dict[str, str] = field(default_factory=dict)
    """For a character that would be said: the characters that are offered besides it."""
    holds: bool = True
    """Whether it claims to have computed every prompt already."""
    voices: dict[str, Say] = field(default_factory=dict)
    """What it says with an adapter; without one in here, the same as ever."""
    attached: list[Adapter] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    """Names of adapters that it cannot attach."""
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: int = 0
    open_streams: int = 0
    most_open: int = 0
    closed: bool = False

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        return encode(text, special=special)

    async def start_ids(self) -> tuple[int, ...]:
        return ()

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        text = "".join(f"<|{turn.role}|>{turn.content}\n" for turn in chat.messages) + chat.opening
        return tuple(token.id for token in encode(text))

    def held(self, prompt_ids: tuple[int, ...], adapter: str | None = None) -> int:
        del adapter
        return len(prompt_ids) if self.holds else 0

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        assert not self.open_streams
        if wrong := self.refused & {adapter.name for adapter in adapters}:
            raise AdapterError(f"the adapter {wrong.pop()} is refused by this engine")
        self.attached = list(adapters)

    async def close(self) -> None:
        self.closed = True

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        if len(request.prompt_ids) + request.max_tokens > self.context_tokens:
            raise PromptTooLongError("too long")
        if request.adapter and request.adapter not in {adapter.name for adapter in self.attached}:
            raise AdapterError(f"the adapter {request.adapter} is not attached")
        self.open_streams += 1
        self.most_open = max(self.most_open, self.open_streams)
        finished = False
        try:
            total = len(request.prompt_ids)
            for done in range(0, total + self.batch_tokens, self.batch_tokens):
                await asyncio.sleep(self.batch_s)
                yield Prefilled(min(done, total), total, 0)
            said = 0
            say = self.voices.get(request.adapter or "", self.say)
            for character in say(decode(request.prompt_ids)):
                if said == request.max_tokens:
                    break
                await asyncio.sleep(self.token_s)
                yield self._decoded(character)
                said += 1
            else:
                yield Finished(ended=True, prefill_tokens=total, cached_tokens=0, decoded_tokens=said)
                finished = True
                return
            yield Finished(ended=False, prefill_tokens=total, cached_tokens=0, decoded_tokens=said)
            finished = True
        finally:
            self.open_streams -= 1
            self.cancelled += not finished

    def _decoded(self, character: str) -> Decoded:
        if character == "\0":  # the end of text, as a special token that the engine passes on
            return Decoded("", (END_ID,), (-0.1,))
        ids = tuple(character.encode())
        others = [Alternative(ord(other), other, -2.0) for other in self.alternatives.get(character, "")]
        chosen = Alternative(ids[0], character, -0.1)
        return Decoded(character, ids, tuple(-0.1 for _ in ids), (chosen, *others))


def scripted(prompt: str) -> str:
    """Answer by what stands in the prompt, so that tests of whole processes can choose."""
    if "ELSEWHERE" in prompt:
        return "elsewhere\n"
    if "SLOW" in prompt:
        return "x" * 400
    if "ODD" in prompt:
        return " is odd\u2028and\x85 so on.\n"
    if "EXPLAIN" in prompt:
        return " adds two numbers.\n\n- `a`: the first\n"
    if "def mul(" in prompt:
        return "(a, b):\n" if prompt.endswith("def mul") else "a, b):\n"
    line = prompt.rpartition("<|fim_middle|>")[2]
    # What stands before the cursor was partly taken back, and is written again.
    return {"    retur": "n a + b\n", "    ret": "urn a + b\n"}.get(line, "value = 1\n")


async def load_fake(model: LocalModel) -> Engine:
    """Load a FakeEngine, paced by the environment: `FAKE_TOKEN_S`, `FAKE_BATCH_S`."""
    del model
    token_s, batch_s = (float(os.environ.get(name, "0")) for name in ("FAKE_TOKEN_S", "FAKE_BATCH_S"))
    # Without a pace a prompt is read in one go: steps that take no time would only be counted as ours.
    return FakeEngine(say=scripted, token_s=token_s, batch_s=batch_s, batch_tokens=64 if batch_s else 4096)


@dataclass
class FakeLink:
    """A line to a daemon that writes what `say` returns for a request's text before the cursor, at a pace."""

    say: Say
    character_s: float = 0.0
    requests: list[CompletionRequest] = field(default_factory=list)
    given_up: int = 0
    gives_way: bool = False
    """Whether what is asked in advance is broken off after its first character."""
    forgets: bool = False
    """Whether the daemon has lost long prompts and answers from short ones."""
    read_s: float = 0.0
    """How long a prompt takes to be read where nothing is to be written."""
    adapter: str | None = None
    """What the daemon answers with."""

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[str | Completion, None]:
        self.requests.append(request)
        text, done = self.say(request.prefix), False
        reason = StopReason.LINE if text else StopReason.END
        try:
            if request.max_tokens == 0:
                await asyncio.sleep(self.read_s)
            for character in text if request.max_tokens != 0 else "":
                await asyncio.sleep(self.character_s)
                yield character
                if request.ahead and self.gives_way:
                    reason = StopReason.CANCELLED
                    break
            await asyncio.sleep(0)
            done = True
            timing = Timing(0, None, 0, 0, 0)
            brief = request.brief or (self.forgets and request.impatient)
            yield Completion(
                request.id, text, Source.ENGINE, reason, timing, settled=text, brief=brief, adapter=self.adapter
            )
        finally:
            self.given_up += not done
