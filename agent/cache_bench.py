"""Benchmark of sameness: whether tokens that come by way of caches are those that are computed anew.

At random places of real files, the prompt is asked for as typing brings it about: read in advance piece by piece, grown
token by token, behind a slip. What follows is held against what comes without any cache; and its second half, which may
have been written in advance, against what is asked for once the first half stands in the text. Quantised
kernels sum in another order for other batches, so that two tokens which are nearly as likely may change places: such a
difference counts as a near tie. Knows engines and prompts, no editor.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import catalog, config, context, fim, source_file
from agent.engines.base import Decoded, Engine, GenerationRequest
from agent.errors import InputError
from agent.loaded import LoadedModel, prepare

NEAR_NATS = 0.05  # between the two candidates, at the first difference
_TOKENS = 24  # of a continuation: half of it a line, half of it what is written in advance
_PREFIX_CHARS, _SUFFIX_CHARS = 600, 250  # 250 tokens or so: what is read when the cursor comes to a new place
_ALTERNATIVES = 10
_MOST_TYPED = 6  # tokens by which the prompt before was shorter
_ASTRAY_ID = 11  # of any token, in place of what was typed then


@dataclass(frozen=True, slots=True)
class Step:
    """A token that was chosen, and the likeliest ones."""

    id: int
    logps: dict[int, float]


async def run(files: Sequence[Path], positions: int, seed: int, advance: Callable[[], None]) -> dict[str, Any]:
    """Load the configured model in this process and compare.

    Args:
        files: Files with the places.
        positions: How many places, over all files.
        seed: Chooses them.
        advance: Called after each place.

    Raises:
        InputError: A file cannot be read, or is empty.
        ModelError: The model cannot be loaded.
        EngineError: The engine broke or refused.
    """
    from agent.engines.llamacpp import LlamaCppEngine  # 100 MB of native code that other commands do without

    texts = [context.normal_newlines(source_file.read(file).text) for file in files]
    if empty := [str(file) for file, text in zip(files, texts, strict=True) if not text.strip()]:
        raise InputError(f"{empty[0]} is empty; give files with code")
    settings = config.load()
    model = catalog.find(settings.model.name)
    rng = random.Random(seed)
    kinds: dict[str, list[str]] = {"cached": [], "speculated": []}
    with tempfile.TemporaryDirectory(prefix="tabwise-") as folder:
        engine = await LlamaCppEngine.load(model.path, settings.engine, Path(folder))
        try:
            loaded = await prepare(model, engine)
            for number in range(positions):
                text = texts[number % len(texts)]
                prompt_ids = await prompt_at(loaded, text, rng.randrange(len(text)))
                for kind, told in (await _compare(engine, prompt_ids, rng.randint(1, _MOST_TYPED))).items():
                    kinds[kind].append(told)
                advance()
        finally:
            await engine.close()
    found: dict[str, Any] = {"positions": positions, "near_nats": NEAR_NATS, "model": settings.model.name, "seed": seed}
    for kind, verdicts in kinds.items():
        found[kind] = {name: verdicts.count(name) for name in ("same", "near_tie", "different", "empty")}
    return found


async def prompt_at(
    loaded: LoadedModel,
    text: str,
    cursor: int,
    prefix_chars: int = _PREFIX_CHARS,
    suffix_chars: int = _SUFFIX_CHARS,
) -> tuple[int, ...]:
    """Return the prompt for a place of a text; if not said otherwise, cut to what is read at a new place."""
    head = text[max(0, cursor - prefix_chars) : cursor]
    line = head.rfind("\n") + 1
    pieces = fim.render(
        loaded.fim,
        head=head[:line],
        live=head[line:],
        suffix=text[cursor : cursor + suffix_chars],
        path="a",
        snippets=(),
    )
    return await loaded.ids(pieces)


async def _compare(engine: Engine, prompt_ids: tuple[int, ...], typed: int) -> dict[str, str]:
    # As it comes about: read in advance in pieces, typed at, once with a slip, and continued from what that left.
    read = prompt_ids[: -min(typed, len(prompt_ids) - 1)]
    await _continue(engine, read, 0)
    for end in range(len(read), len(prompt_ids)):
        await _continue(engine, prompt_ids[:end], 2)
    await _continue(engine, (*read, _ASTRAY_ID), 4)
    cached = await _continue(engine, prompt_ids, _TOKENS)
    half = len(cached) // 2
    accepted = (*prompt_ids, *(step.id for step in cached[:half]))
    asked = await _continue(engine, accepted, len(cached) - half)
    anew = await _continue(engine, prompt_ids, _TOKENS, cached=False)
    return {"cached": verdict(anew, cached), "speculated": verdict(cached[half:], asked)}


def verdict(one: Sequence[Step], other: Sequence[Step]) -> str:
    """Compare two continuations: "same", "near_tie", "different", or "empty" where both are.

    What follows the first difference follows from it and is not looked at.
    """
    for first, second in zip(one, other, strict=False):
        if first.id == second.id:
            continue
        gaps = [
            abs(step.logps[first.id] - step.logps[second.id])
            for step in (first, second)
            if first.id in step.logps and second.id in step.logps
        ]
        return "near_tie" if gaps and min(gaps) <= NEAR_NATS else "different"
    if not one and not other:
        return "empty"
    return "same" if len(one) == len(other) else "different"


async def _continue(engine: Engine, prompt_ids: tuple[int, ...], count: int, *, cached: bool = True) -> list[Step]:
    steps: list[Step] = []
    request = GenerationRequest(prompt_ids, count, alternatives=_ALTERNATIVES, cached=cached, ahead=not count)
    async with aclosing(engine.generate(request)) as stream:
        async for event in stream:
            if isinstance(event, Decoded):
                logps = {each.id: each.logp for each in event.alternatives} | {event.ids[-1]: event.logps[-1]}
                steps += [Step(one, {}) for one in event.ids[:-1]] + [Step(event.ids[-1], logps)]
    return steps
