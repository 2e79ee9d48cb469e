"""Benchmark of the decode loop: the same texts as transformers' `generate` writes, and how much sooner.

Three ways are held against each other, side by side in one run, on one model in one thread: `generate` from scratch, our
loop with its caches, and our loop with drafts, too. At random places of real files, prompts come about as typing brings
them about, with a slip in between, and the texts must be those of `generate`. Then typing is replayed: prompts that grow
by a token or a few, each asked of all three. At last, the two loops write repetitive code, where drafts are at home.
Knows engines and prompts, no editor.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import cache_bench, catalog, config, context, source_file
from agent.engines.base import Decoded, GenerationRequest
from agent.engines.transformers import TransformersEngine
from agent.errors import InputError
from agent.loaded import LoadedModel, prepare

_ALTERNATIVES = 10  # where two texts part, the other's token is nearly always among them
_MOST_TYPED = 3  # tokens by which a prompt grows: a key is one at most, a completion that was accepted several
_PREFIX_CHARS, _SUFFIX_CHARS = 1300, 430  # where typing is replayed: the 384 and 128 tokens of the settings, about
_ASTRAY_ID = 11  # of any token, in place of what was typed then
_REPETITIVE_PLACES = 8  # of the built-in code

_REPETITIVE = "".join(
    f"""\
    parser.add_argument(
        "--{name}",
        type={kind},
        default=defaults.{name},
        help="The {name} of the {thing} (default: %(default)s)",
    )
"""
    for thing in ("input", "output", "cache")
    for name, kind in (("width", "int"), ("height", "int"), ("depth", "int"), ("scale", "float"), ("label", "str"))
)
"""Code as it is written by the yard: options of a command line, each like the one before."""


@dataclass(slots=True)
class _Tally:
    """What the ways took, and whether they wrote the same."""

    times_s: dict[str, list[float]] = field(default_factory=dict)
    same: dict[str, list[bool]] = field(default_factory=dict)
    """By way, whether its text was that of the first way."""
    gaps_nats: list[float | None] = field(default_factory=list)
    """Where texts parted: how much likelier our token was than the other's; None where that was not among the likeliest."""

    def figures(self) -> dict[str, Any]:
        """Return medians and counts."""
        medians = {way: statistics.median(times) for way, times in self.times_s.items()}
        found: dict[str, Any] = {"completions": max((len(times) for times in self.times_s.values()), default=0)}
        found["median_ms"] = {way: round(1000 * median) for way, median in medians.items()}
        found["same"] = {way: f"{sum(same)} of {len(same)}" for way, same in self.same.items()}
        slowest, *others = medians
        for way in others:
            found[f"{way}_times_faster_than_{slowest}"] = round(medians[slowest] / medians[way], 2)
        if {"caches", "drafts"} <= medians.keys() and slowest != "caches":
            found["drafts_times_faster_than_caches"] = round(medians["caches"] / medians["drafts"], 2)
        found["gaps_nats"] = self.gaps_nats
        return found


async def run(
    files: Sequence[Path],
    *,
    positions: int,
    keys: int,
    new_tokens: int,
    seed: int,
    model_name: str | None,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Load a model in this process and compare.

    Args:
        files: Files with the places and the typing.
        positions: Places at which texts are compared.
        keys: Steps of the typing that is replayed, over all files.
        new_tokens: Most tokens of a completion.
        seed: Chooses the places and the steps.
        model_name: Model to take; the configured one if None.
        advance: Called after each of the `steps`.

    Raises:
        InputError: A file cannot be read, or is empty.
        ModelError: The model cannot be loaded.
        EngineError: The engine broke or refused.
    """
    texts = [context.normal_newlines(source_file.read(file).text) for file in files]
    if empty := [str(file) for file, text in zip(files, texts, strict=True) if not text.strip()]:
        raise InputError(f"{empty[0]} is empty; give files with code")
    settings = config.load()
    model = catalog.find(model_name or settings.model.name)
    engine = await TransformersEngine.load(model, settings.engine)
    try:
        subject = _Subject(engine, engine.without_drafts(), await prepare(model, engine), new_tokens, advance)
        rng = random.Random(seed)
        return {
            "model": model.name,
            "device": engine.device,
            "quantisation": engine.quantisation.value,
            "new_tokens": new_tokens,
            "seed": seed,
            "places": (await _places(subject, texts, positions, rng)).figures(),
            "typing": (await _typing(subject, texts, keys, rng)).figures(),
            "repetitive": (await _repetitive(subject)).figures(),
        }
    finally:
        await engine.close()


def steps(positions: int, keys: int) -> int:
    """Return how many completions are compared in all."""
    return positions + keys + _REPETITIVE_PLACES


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is measured, and how it is asked."""

    drafts: TransformersEngine
    caches: TransformersEngine
    loaded: LoadedModel
    new_tokens: int
    advance: Callable[[], None]

    async def generate(self, prompt: Sequence[int]) -> tuple[list[int], float]:
        """Return what transformers' own loop writes, and the seconds that it took."""
        return await self.drafts.generate_from_scratch(prompt, self.new_tokens)

    async def ours(
        self, engine: TransformersEngine, prompt: Sequence[int], count: int | None = None
    ) -> tuple[list[cache_bench.Step], float]:
        """Return what our loop writes, and the seconds that it took."""
        steps: list[cache_bench.Step] = []
        request = GenerationRequest(
            tuple(prompt), self.new_tokens if count is None else count, alternatives=_ALTERNATIVES
        )
        began = time.perf_counter()
        async with aclosing(engine.generate(request)) as stream:
            async for event in stream:
                if isinstance(event, Decoded):
                    logps = {each.id: each.logp for each in event.alternatives}
                    steps += [cache_bench.Step(one, logps) for one in event.ids]
        return steps, time.perf_counter() - began


async def _places(subject: _Subject, texts: Sequence[str], positions: int, rng: random.Random) -> _Tally:
    tally = _Tally()
    for number in range(positions):
        text = texts[number % len(texts)]
        prompt = await cache_bench.prompt_at(subject.loaded, text, rng.randrange(len(text)))
        typed = rng.randint(1, _MOST_TYPED)
        # As it comes about: read in advance, asked for while typing, once with a slip.
        for before, count in ((prompt[:-typed], 0), (prompt[:-typed], 2), ((*prompt[:-typed], _ASTRAY_ID), 4)):
            await subject.ours(subject.drafts, before, count)
        theirs, took = await subject.generate(prompt)
        ours, took_ours = await subject.ours(subject.drafts, prompt)
        _enter(tally, {"generate": (theirs, took)}, {"drafts": (ours, took_ours)})
        subject.advance()
    return tally


async def _typing(subject: _Subject, texts: Sequence[str], keys: int, rng: random.Random) -> _Tally:
    tally = _Tally()
    for number, text in enumerate(texts):
        share = keys // len(texts) + (number < keys % len(texts))
        cursor = rng.randrange(max(1, len(text) * 3 // 4))
        prompt = list(await cache_bench.prompt_at(subject.loaded, text, cursor, _PREFIX_CHARS, _SUFFIX_CHARS))
        typing = [token.id for token in await subject.drafts.tokenize(text[cursor : cursor + 40 * share + 40])]
        for engine in (subject.caches, subject.drafts):
            await subject.ours(engine, prompt, 0)  # read while nobody types, as the language server has it done
        for _ in range(share):
            step = rng.randint(1, _MOST_TYPED)
            prompt, typing = prompt + typing[:step], typing[step:]
            theirs = await subject.generate(prompt)
            caches = await subject.ours(subject.caches, prompt)
            drafts = await subject.ours(subject.drafts, prompt)
            _enter(tally, {"generate": theirs}, {"caches": caches, "drafts": drafts})
            subject.advance()
    return tally


async def _repetitive(subject: _Subject) -> _Tally:
    tally = _Tally()
    lines = _REPETITIVE.splitlines(keepends=True)
    for place in range(_REPETITIVE_PLACES):
        cut = len(lines) // 2 + place
        tokens = await subject.drafts.tokenize("".join(lines[:cut]))
        prompt = [token.id for token in tokens] or [subject.loaded.start_ids[0]]
        for engine in (subject.caches, subject.drafts):
            await subject.ours(engine, prompt, 0)
        caches, took = await subject.ours(subject.caches, prompt)
        drafts = await subject.ours(subject.drafts, prompt)
        _enter(tally, {"caches": ([step.id for step in caches], took)}, {"drafts": drafts})
        subject.advance()
    return tally


def _enter(
    tally: _Tally,
    reference: dict[str, tuple[list[int], float]],
    others: dict[str, tuple[list[cache_bench.Step], float]],
) -> None:
    ((name, (ids, took)),) = reference.items()
    tally.times_s.setdefault(name, []).append(took)
    for way, (steps, seconds) in others.items():
        tally.times_s.setdefault(way, []).append(seconds)
        same = ids == [step.id for step in steps]
        tally.same.setdefault(way, []).append(same)
        if not same:
            tally.gaps_nats.append(gap(ids, steps))


def gap(ids: Sequence[int], steps: Sequence[cache_bench.Step]) -> float | None:
    """Return how much likelier our token was than theirs where two texts part; None where that is not known."""
    for one, step in zip(ids, steps, strict=False):
        if one != step.id:
            ours, theirs = step.logps.get(step.id), step.logps.get(one)
            return None if ours is None or theirs is None else round(ours - theirs, 6)
    return None
