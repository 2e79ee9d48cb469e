"""Recorded steps: the same text as by passes that are laid out for each token. Recording itself needs a GPU."""

import random
import weakref
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")

import torch

from agent.catalog import LocalModel
from agent.config import EngineSettings
from agent.engines.base import Decoded, GenerationRequest
from agent.engines.kv_cache import PrefixCache
from agent.engines.recorded_step import RecordedSteps, Recording, can_be_recorded
from agent.engines.transformers import TransformersEngine
from tests.with_torch.small_models import CODE, save, small_module


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return save(tmp_path_factory.mktemp("small"))


@pytest.fixture
async def engine(small: LocalModel) -> AsyncIterator[TransformersEngine]:
    made = await TransformersEngine.load(small, EngineSettings(context_tokens=1024, threads=1, batch_tokens=16))
    yield made
    await made.close()


async def said(engine: TransformersEngine, request: GenerationRequest) -> list[tuple[int, float]]:
    async with aclosing(engine.generate(request)) as stream:
        events = [event async for event in stream]
    return [pair for event in events if isinstance(event, Decoded) for pair in zip(event.ids, event.logps, strict=True)]


async def test_recorded_steps_write_what_other_passes_write(engine: TransformersEngine) -> None:
    rng = random.Random(5)
    whole = tuple(token.id for token in await engine.tokenize(CODE * 8))
    recorded, launched = (engine.without_drafts(recorded=each) for each in (True, False))
    lengths = [
        1,
        2,
        250,
        *(rng.randint(1, len(whole)) for _ in range(8)),
    ]  # 250: the room grows in the midst of the text
    for length in lengths:
        request = GenerationRequest(whole[:length], 24)
        expected = await said(launched, request)
        for _ in range(2):  # anew, and from the cache, which is cropped first
            found = await said(recorded, request)
            assert [one for one, _ in found] == [one for one, _ in expected]
            assert [logp for _, logp in found] == pytest.approx([logp for _, logp in expected], abs=1e-4)


async def test_a_slip_is_taken_back(engine: TransformersEngine) -> None:
    whole = tuple(token.id for token in await engine.tokenize(CODE * 2))
    recorded, launched = (engine.without_drafts(recorded=each) for each in (True, False))
    await said(recorded, GenerationRequest(whole[:40], 30))
    for prompt in ((*whole[:30], 7), whole[:39], whole[:41]):
        found, expected = [await said(each, GenerationRequest(prompt, 12)) for each in (recorded, launched)]
        assert [one for one, _ in found] == [one for one, _ in expected]


def filled(count: int) -> PrefixCache:
    cache = PrefixCache(2)
    for layer in cache._rooms:
        layer.update(torch.ones(1, 2, count, 4), torch.ones(1, 2, count, 4))
    cache.ids = [1] * count
    return cache


def test_a_recording_is_for_the_rooms_that_it_was_laid_out_for() -> None:
    cache = filled(255)
    recording = Recording(rooms := list(cache.make_room(256)))
    assert recording.is_for(rooms)
    assert recording.is_for(cache.make_room(256))
    grown = cache.make_room(257)
    assert not recording.is_for(grown)
    assert grown[0].shape[-2] == 512
    assert bool((grown[0][:, :, :255] == 1).all())


def test_a_recording_keeps_no_memory() -> None:
    cache = filled(3)
    recording = cache.recordings[None] = Recording(cache.make_room(4))
    rooms = [weakref.ref(room) for room in cache.make_room(4)]
    assert all(room() is not None for room in rooms)
    cache.give_up()
    assert not cache.recordings
    assert [room() for room in rooms] == [None] * 4
    assert not recording.is_for([torch.ones(1)] * 4)


def test_a_step_leaves_the_cache_as_other_passes_do() -> None:
    module, cache = small_module("llama").eval(), PrefixCache(2)
    with torch.no_grad():
        module(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache.layers, use_cache=True)
        cache.ids = [5, 6, 7]
        logits = RecordedSteps(torch.device("cpu")).step(module, cache, 8, None)
        expected = module(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1:]
    assert cache.layers.get_seq_length() == 4
    assert torch.allclose(logits, expected, atol=1e-5)
    assert all(layer.place is None for layer in cache._rooms)


def test_a_model_with_windows_is_not_recorded() -> None:
    assert can_be_recorded(small_module("llama"))
    assert not can_be_recorded(small_module("mistral", sliding_window=24))


def test_a_model_that_would_not_take_the_mask_is_not_recorded() -> None:
    assert not can_be_recorded(small_module("llama", attn_implementation="eager"))  # which adds it to the scores
    placeless = small_module("llama")
    placeless.forward = lambda input_ids, attention_mask, past_key_values: None
    assert not can_be_recorded(placeless)


def steps_that_record(monkeypatch: pytest.MonkeyPatch, fails: str, then: str = "") -> tuple[RecordedSteps, PrefixCache]:
    """Return steps on a device that cannot record, and that breaks off right behind it if `then` says so."""

    def record(self: Recording, module: Any, layers: Any, pool: Any) -> None:
        monkeypatch.setattr(self, "run", run if then else self.run)
        raise RuntimeError(fails)

    def run(module: Any, layers: Any) -> Any:
        raise RuntimeError(then)

    monkeypatch.setattr(Recording, "record", record)
    steps = RecordedSteps(torch.device("cpu"))
    steps._records = True
    cache = PrefixCache(2)
    return steps, cache


def begin(cache: PrefixCache, module: Any) -> None:
    with torch.no_grad():
        module(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache.layers, use_cache=True)
    cache.ids = [5, 6, 7]


@torch.no_grad()
def test_a_step_that_cannot_be_recorded_is_launched_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, cache = steps_that_record(monkeypatch, "operation not permitted when stream is capturing")
    module = small_module("llama")
    begin(cache, module)
    for one in (8, 9):
        logits = steps.step(module, cache, one, None)
        cache.ids.append(one)
    assert not steps._records
    assert torch.allclose(logits, module(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, -1:], atol=1e-5)


@torch.no_grad()
def test_what_the_model_stumbles_over_says_nothing_of_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, cache = steps_that_record(monkeypatch, "capture failed", then="shapes do not fit")
    module = small_module("llama")
    begin(cache, module)
    steps.step(module, cache, 8, None)
    cache.ids.append(8)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        steps.step(module, cache, 9, None)
    assert steps._records
