"""An engine on a server: vLLM, llama-server, Ollama, or any other that speaks OpenAI's API.

Finds out which dialect the server speaks (`dialects.py`) and which model it serves; then asks it as the engines' protocol
has it. Cancelling is closing the connection. Knows no prompts' layouts and no settings but its own.

Invariants: it connects to the configured address and no other; no token id of one model is ever sent to another that took
its place.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Any

from agent import fim, remote_server
from agent.config import EngineSettings, RemoteSettings
from agent.engines import dialects
from agent.engines.base import Adapter, Decoded, Event, Finished, GenerationRequest, Prefilled, Task, Token
from agent.engines.dialects import Dialect
from agent.engines.llama_server import LlamaServer
from agent.engines.remote_adapters import RemoteAdapters
from agent.engines.remote_http import Connection
from agent.engines.slots import Slots
from agent.engines.text_server import TextServer
from agent.engines.vllm import Vllm
from agent.errors import AdapterError, ConfigError, ModelChangedError, PromptTooLongError, RemoteError
from agent.types import Chat

_SURE_S = 60.0
"""For so long after it was asked the server is taken to serve the same model; asking costs a round trip."""
_NO_ROUTE = {
    # With a token that was good for /v1/models; a gateway lets it through to the routes of OpenAI's API alone.
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.NOT_IMPLEMENTED,
}
"""How servers say that they do not tokenise, or take no token ids."""
_LOOSE = 8  # ids that spell text are cut finer than a model's: a token of theirs may be a line of dashes
_TOLD_NAMES, _NAME_CHARS = 8, 80  # of a server's models, in a message of one line


class RemoteEngine:
    """A model on a server."""

    on_gpu = True
    """A server for others has a GPU; where it has none, `completion.snippet_tokens` makes prompts shorter."""

    def __init__(
        self,
        connection: Connection,
        dialect: Dialect,
        card: dict[str, Any],
        adapters: RemoteAdapters,
        room: int,
        slots: int,
    ) -> None:
        """Wrap a connection; use `load`."""
        self.context_tokens = room
        self.dialect = dialect
        self._connection = connection
        self._card = card
        self._adapters = adapters
        self._slots = Slots(slots)
        self._sure_until = time.monotonic() + _SURE_S

    @classmethod
    async def load(cls, settings: RemoteSettings, engine: EngineSettings) -> "RemoteEngine":
        """Find out what the server serves.

        Args:
            settings: Where it is.
            engine: Bounds on the context, and how many prompts are taken to be cached.

        Raises:
            ConfigError: A setting cannot be.
            RemoteError: The server cannot be reached, refuses, or does not serve the model.
        """
        if settings.fim not in {"auto", "none", *fim.FORMATS}:
            raise ConfigError(f"remote.fim is {settings.fim!r}; give auto, none, or one of {', '.join(fim.FORMATS)}")
        connection = Connection(settings, remote_server.token(settings))
        try:
            card = await _card(connection, settings.model)
            dialect = await _dialect(connection, card, settings.fim)
        except BaseException:
            await connection.close()
            raise
        room = min(engine.context_tokens, dialect.context_tokens or engine.context_tokens)
        adapters = RemoteAdapters(connection, settings, takes=isinstance(dialect, Vllm))
        return cls(connection, dialect, card, adapters, room, engine.completion_slots)

    @property
    def model(self) -> str:
        """Name of the model on the server."""
        return str(self._card["id"])

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`."""
        async with self._asking():
            with dialects.understood():
                return await self.dialect.tokenize(text, special=special)

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt begins."""
        async with self._asking():
            with dialects.understood():
                return await self.dialect.start_ids()

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat."""
        async with self._asking():
            with dialects.understood():
                return await self.dialect.chat_ids(chat)

    def held(self, prompt_ids: tuple[int, ...], adapter: str | None = None) -> int:
        """Return how many tokens of a completion's prompt the server was asked about lately; others may push them out."""
        return self._slots.held(prompt_ids, adapter)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Continue a prompt."""
        if request.adapter is not None and request.adapter not in self._adapters.served:
            raise AdapterError(f"the adapter {request.adapter!r} is not attached; attach it first")
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.context_tokens:
            raise PromptTooLongError(
                f"the prompt needs {needed} tokens, the context has {self.context_tokens}; "
                "raise engine.context_tokens (and the server's), or shorten the text"
            )
        slot = None
        if request.task is Task.COMPLETION:
            slot, _ = self._slots.choose(request.prompt_ids, request.adapter, ahead=request.ahead)
        async with self._asking(), aclosing(self._answered(request)) as events:
            async for event in events:
                if slot is not None and isinstance(event, Prefilled):
                    self._slots.read(slot, event.done_tokens)
                if request.max_tokens or not isinstance(event, Decoded):
                    yield event

    async def _answered(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Ask; once more where the server has lost the adapter, as by a new start. No event came before a refusal."""
        try:
            async with aclosing(self._stream(request, request.adapter or self.model)) as events:
                async for event in events:
                    yield event
            return
        except RemoteError as error:
            if request.adapter is None or error.status != HTTPStatus.NOT_FOUND:
                raise
        await self._same_model()
        await self._adapters.again(request.adapter)
        async with aclosing(self._stream(request, request.adapter)) as events:
            async for event in events:
                yield event

    async def _stream(self, request: GenerationRequest, model: str) -> AsyncGenerator[Event, None]:
        path, body = self.dialect.asked(request, model)
        reader = self.dialect.reader(request)
        most = max(1, request.max_tokens) * (1 if self.dialect.exact else _LOOSE)
        async with aclosing(self._connection.stream(path, body, lambda: reader.progress)) as chunks:
            async for data in chunks:
                if data.get("error") or data.get("object") == "error":
                    raise self._connection.failed(data)
                for event in await reader.read(data):
                    yield event
                if reader.decoded_tokens > most:
                    break  # it was told where to stop
        if reader.reason is None and reader.decoded_tokens <= most:
            raise self._connection.broke_off()
        yield Finished(
            ended=reader.reason == "stop",
            prefill_tokens=max(0, reader.total_tokens - reader.cached_tokens),
            cached_tokens=reader.cached_tokens,
            decoded_tokens=reader.decoded_tokens if request.max_tokens else 0,
        )

    async def prepare(self, adapters: Sequence[Adapter]) -> None:
        """Do nothing: the server loads adapters beside its streams."""

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        """Have the server load these adapters, and unload those that this engine loaded before and are not among them."""
        await self._adapters.attach(adapters)

    async def close(self) -> None:
        """Unload the adapters that this engine loaded, and close the connection."""
        await self._adapters.release()
        await self._connection.close()

    @asynccontextmanager
    async def _asking(self) -> AsyncGenerator[None, None]:
        """Ask within it: first which model the server has, where it may have been started anew with another."""
        if time.monotonic() >= self._sure_until:
            await self._same_model()
        try:
            yield
        except RemoteError as error:
            self._sure_until = 0.0
            if error.status not in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
                raise
            await self._same_model(kind=self.dialect.exact)
            raise RemoteError(
                f"{error}, and yet it serves {self.model!r} as before; ask a server that has this route",
                error.status,
            ) from None

    async def _same_model(self, *, kind: bool = False) -> None:
        """Raise where the server has another model than before; with `kind`, also where it is another kind of server."""
        try:
            card = await _card(self._connection, self.model)
        except _NotServedError as error:
            raise ModelChangedError(str(error)) from None
        if _identity(card) != _identity(self._card):
            raise ModelChangedError(f"{self._connection.where} serves another model than before; ask again")
        if kind and (await _dialect(self._connection, card, "auto")).name != self.dialect.name:
            raise ModelChangedError(f"{self._connection.where} is another kind of server than before; ask again")
        self._sure_until = time.monotonic() + _SURE_S


class _NotServedError(RemoteError):
    """The server answers, and does not have the model."""


async def _card(connection: Connection, model: str) -> dict[str, Any]:
    """Return what the server says of a model; of the only one it lists where `model` is empty."""
    listed = (await connection.get("/v1/models")).get("data")
    cards = [
        card
        for card in (listed if isinstance(listed, list) else ())
        if isinstance(card, dict) and isinstance(card.get("id"), str)
    ]
    bases = [card for card in cards if not card.get("parent")]
    if not cards:
        raise _NotServedError(
            f"{connection.where}/v1/models lists no model; is it an OpenAI server, and is a model loaded?"
        )
    if not model and len(bases) == 1:
        return bases[0]
    for card in cards:
        if model and card["id"] in (model, f"{model}:latest"):  # Ollama's names end so
            return card
    names = ", ".join(ascii(card["id"][:_NAME_CHARS]) for card in bases[:_TOLD_NAMES])
    wanted = f"does not serve {model!r}, but" if model else "serves several models:"
    raise _NotServedError(f"{connection.where} {wanted} {names}; set remote.model")


async def _dialect(connection: Connection, card: dict[str, Any], fmt: str) -> Dialect:
    """Have the server tokenise something, and tell by the answer what it is."""
    model = str(card["id"])
    probe = {"model": model, "prompt": "x", "add_special_tokens": False}
    probe |= {"content": "x", "add_special": False, "with_pieces": True}
    try:
        found = await connection.post("/tokenize", probe, private=False)
    except RemoteError as error:
        if error.status not in _NO_ROUTE:
            raise
        found = {}
    tokens = found.get("tokens")
    if isinstance(tokens, list) and tokens and isinstance(tokens[0], dict):
        meta = card.get("meta")
        return LlamaServer(connection, _count(meta.get("n_ctx")) if isinstance(meta, dict) else None)
    if isinstance(tokens, list) and tokens and isinstance(tokens[0], int) and "max_model_len" in found:
        vllm = Vllm(connection, model, _count(found["max_model_len"]))
        if await _names_tokens(vllm, tokens):
            return vllm
    return TextServer(fim.FORMATS.get(fmt, fim.SUFFIX))


async def _names_tokens(vllm: Vllm, ids: list[int]) -> bool:
    # Others have vLLM's route of the name and tell texts, by which no token can be learned from or gone on with.
    try:
        with dialects.understood():
            return await vllm.names_tokens(ids)
    except RemoteError as error:
        if error.status not in _NO_ROUTE:
            raise
        return False


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _identity(card: dict[str, Any]) -> tuple[Any, ...]:
    # What of a card stays while the same model is served; its time of creation does not.
    return tuple(card.get(name) for name in ("id", "root", "meta", "max_model_len"))
