"""A model that is in memory and understood: its engine, its prompt format, its special tokens.

Turns pieces of a prompt into token ids; knows no documents. The check that every sentinel is exactly one token of the
loaded tokenizer is made here, once.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from agent import fim, gguf_header, tokenizer_json
from agent.arbiter import Arbiter
from agent.catalog import LocalModel
from agent.engines.base import Engine, Token
from agent.fim import FimFormat, Piece

log = logging.getLogger(__name__)

_REMEMBERED_TEXTS = 64
"""Texts whose tokens are kept: of each place that is worked at a few, and asking the engine again costs a millisecond
or more with each keystroke."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to answer."""

    model: LocalModel
    engine: Arbiter
    fim: FimFormat | None
    """None where the model cannot fill in the middle, and only continues the prefix."""
    sentinel_ids: dict[str, int]
    stop_ids: frozenset[int]
    start_ids: tuple[int, ...]
    _remembered: OrderedDict[str, list[Token]] = field(default_factory=OrderedDict)

    async def tokens(self, text: str) -> list[Token]:
        """Return the tokens of a text that is likely to be asked for again: the lines above the cursor, or below."""
        found = self._remembered.pop(text, None)
        if found is None:
            found = await self.engine.tokenize(text)
        self._remembered[text] = found
        while len(self._remembered) > _REMEMBERED_TEXTS:
            self._remembered.popitem(last=False)
        return found

    async def ids(self, pieces: Iterable[Piece]) -> tuple[int, ...]:
        """Return the token ids of a prompt; text of the user's never becomes a special token."""
        ids = list(self.start_ids)
        for piece in pieces:
            if piece.special:
                ids.append(self.sentinel_ids[piece.text])
            else:
                ids += [token.id for token in await self.tokens(piece.text)]
        return tuple(ids)


async def prepare(model: LocalModel, engine: Engine) -> LoadedModel:
    """Find out how the model that `engine` has loaded wants to be asked."""
    fmt = await _format_of(model, engine)
    sentinel_ids: dict[str, int] = {}
    for sentinel in fmt.sentinels() if fmt else ():
        tokens = await engine.tokenize(sentinel, special=True)
        if len(tokens) == 1:
            sentinel_ids[sentinel] = tokens[0].id
    if fmt and (missing := [s for s in (fmt.prefix, fmt.suffix, fmt.middle) if s and s not in sentinel_ids]):
        log.warning("%s has no single token for %s: completing from the prefix alone", model.name, ", ".join(missing))
        fmt = None
    if fmt and fmt.file not in sentinel_ids:
        fmt = replace(fmt, file="", repository="")
    stops = [await engine.tokenize(stop, special=True) for stop in (fmt.stops if fmt else ())]
    stop_ids = frozenset(tokens[0].id for tokens in stops if len(tokens) == 1)
    return LoadedModel(model, Arbiter(engine), fmt, sentinel_ids, stop_ids, await engine.start_ids())


async def _format_of(model: LocalModel, engine: Engine) -> FimFormat | None:
    if model.fim is not None:
        return fim.FORMATS.get(model.fim)
    if model.format == "gguf":
        return fim.detect((await asyncio.to_thread(gguf_header.read, model.path)).vocabulary)  # reads 150,000 words
    if model.format == "safetensors":
        return fim.detect(await asyncio.to_thread(tokenizer_json.vocabulary, model.path))
    # No file tells its vocabulary: the tokenizer is asked, as far as it takes to rule a format out.
    for fmt in fim.FORMATS.values():
        if await _knows(engine, fmt.sentinels()):
            return fmt
    return None


async def _knows(engine: Engine, sentinels: Iterable[str]) -> bool:
    for sentinel in sentinels:
        if len(await engine.tokenize(sentinel, special=True)) != 1:
            return False
    return True
