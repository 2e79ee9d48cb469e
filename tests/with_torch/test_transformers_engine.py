"""The transformers engine with small models: what `generate` writes, by whatever way it comes about."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")

import torch

from agent import adapters
from agent.adapters import BaseFacts
from agent.arbiter import Arbiter
from agent.catalog import LocalModel
from agent.config import EngineSettings
from agent.engines.base import Adapter, Decoded, Event, Finished, GenerationRequest, Prefilled, Task
from agent.engines.transformers import TransformersEngine
from agent.errors import AdapterError, EngineError, MemoryFullError, PromptTooLongError
from agent.loaded import prepare
from tests.with_torch.small_models import CODE, SPECIAL, save, small_module

SETTINGS = EngineSettings(context_tokens=1024, threads=1, batch_tokens=16)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return save(tmp_path_factory.mktemp("small"))


@pytest.fixture
async def engine(small: LocalModel) -> AsyncIterator[TransformersEngine]:
    made = await TransformersEngine.load(small, SETTINGS)
    yield made
    await made.close()


async def ids_of(engine: TransformersEngine, text: str) -> tuple[int, ...]:
    return tuple(token.id for token in await engine.tokenize(text))


async def events_of(engine: Any, request: GenerationRequest) -> list[Event]:
    async with aclosing(engine.generate(request)) as stream:
        return [event async for event in stream]


async def run(engine: Any, request: GenerationRequest) -> tuple[list[Decoded], Finished]:
    *before, last = await events_of(engine, request)
    assert isinstance(last, Finished)
    return [event for event in before if isinstance(event, Decoded)], last


def flat(said: list[Decoded]) -> list[int]:
    return [one for event in said for one in event.ids]


async def reference(engine: TransformersEngine, prompt: tuple[int, ...], count: int) -> list[int]:
    """What transformers' own loop writes."""
    ids, _ = await engine.generate_from_scratch(prompt, count)
    return ids


async def test_greedy_text_is_that_of_generate_however_the_prompt_came_about(engine: TransformersEngine) -> None:
    rng = random.Random(3)
    whole = await ids_of(engine, CODE * 4)
    plain = engine.without_drafts()
    for _ in range(25):
        length = rng.randint(1, len(whole))
        prompt = whole[:length]
        expected = await reference(engine, prompt, 20)
        for subject in (engine, plain):
            # Read in advance, typed at, with a slip.
            await run(subject, GenerationRequest(prompt[: rng.randint(1, length)], 0, ahead=True))
            await run(subject, GenerationRequest(prompt[: rng.randint(1, length)], rng.randint(1, 5)))
            await run(subject, GenerationRequest((*prompt[: length // 2], 7, 7), 3))
            said, finished = await run(subject, GenerationRequest(prompt, 20))
            assert flat(said) == expected
            assert finished.decoded_tokens == len(expected)
            assert finished.prefill_tokens + finished.cached_tokens == length
            anew, finished = await run(subject, GenerationRequest(prompt, 20, cached=False))
            assert flat(anew) == expected
            assert finished.cached_tokens == 0


@pytest.mark.parametrize("kind", ["llama", "mistral", "starcoder2"])
async def test_other_kinds_of_models_too(kind: str, tmp_path: Path) -> None:
    # Windows of 24 tokens: prompts are longer, and what is cropped lies outside of the window.
    changes = {"sliding_window": 24} if kind != "llama" else {}
    engine = await TransformersEngine.load(save(tmp_path, small_module(kind, **changes)), SETTINGS)
    whole = await ids_of(engine, CODE)
    for length in (5, 40, 90):
        expected = await reference(engine, whole[:length], 16)
        for before in (length // 2, length - 1, length):
            await run(engine, GenerationRequest(whole[:before], 30))
            assert flat((await run(engine, GenerationRequest(whole[:length], 16)))[0]) == expected
    await engine.close()


async def test_every_token_has_its_log_probability_and_alternatives(engine: TransformersEngine) -> None:
    prompt = await ids_of(engine, CODE)
    said, _ = await run(engine, GenerationRequest(prompt, 12, alternatives=5))
    text = torch.tensor([[*prompt, *flat(said)]])
    logits = await engine.with_model(lambda module: module(text).logits[0].detach())
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    logps = [logp for event in said for logp in event.logps]
    for place, (one, logp) in enumerate(zip(flat(said), logps, strict=True)):
        assert logp == pytest.approx(expected[place, one].item(), abs=1e-3)
    place = 0
    for event in said:
        assert event.exact
        assert len(event.alternatives) == 5
        assert event.alternatives[0].id == event.ids[0]
        assert event.alternatives[1].logp == pytest.approx(expected[place].topk(2).values[1].item(), abs=1e-3)
        place += len(event.ids)


async def test_text_is_that_of_the_tokens(engine: TransformersEngine) -> None:
    # A model with random weights writes bytes of all kinds.
    prompt = await ids_of(engine, "日本")
    said, _ = await run(engine, GenerationRequest(prompt, 300, temperature=9.0, seed=4))
    vocabulary = engine._vocabulary
    raw = b"".join(vocabulary.bytes_of(one) for one in flat(said))
    assert "".join(event.text for event in said) == raw.decode(errors="replace").rstrip("\ufffd") or (
        "".join(event.text for event in said) == raw.decode(errors="replace")
    )
    assert any(len(event.ids) > 1 for event in said)


async def test_a_seed_makes_sampling_repeatable_drafts_or_not_broken_off_or_not(engine: TransformersEngine) -> None:
    prompt = await ids_of(engine, CODE)
    whole, _ = await run(engine, GenerationRequest(prompt, 24, temperature=0.8, seed=1))
    again, _ = await run(engine, GenerationRequest(prompt, 24, temperature=0.8, seed=1))
    plain, _ = await run(engine.without_drafts(), GenerationRequest(prompt, 24, temperature=0.8, seed=1))
    other, _ = await run(engine, GenerationRequest(prompt, 24, temperature=0.8, seed=2))
    assert flat(whole) == flat(again) == flat(plain) != flat(other)
    first = flat(whole)[:9]
    rest, _ = await run(engine, GenerationRequest((*prompt, *first), 24 - len(first), temperature=0.8, seed=1))
    assert first + flat(rest) == flat(whole)


def spy(engine: TransformersEngine) -> list[int]:
    """Note how many tokens each pass reads."""
    passes: list[int] = []
    loop: Any = engine._loop
    original = loop._pass

    def noted(module: Any, cache: Any, ids: list[int], keep: int) -> Any:
        passes.append(len(ids))
        return original(module, cache, ids, keep)

    loop._pass = noted
    return passes


async def test_what_is_held_is_not_read_again(engine: TransformersEngine) -> None:
    prompt = await ids_of(engine, CODE * 2)
    assert engine.held(prompt) == 0
    events = await events_of(engine, GenerationRequest(prompt, 0, ahead=True))
    done = [event.done_tokens for event in events if isinstance(event, Prefilled)]
    assert done[-1] == len(prompt)
    assert all(later - earlier <= 16 for earlier, later in zip([0, *done], done, strict=False))
    assert engine.held(prompt) == len(prompt)
    passes = spy(engine)
    _, finished = await run(engine, GenerationRequest((*prompt, 7), 1))
    assert (finished.prefill_tokens, finished.cached_tokens) == (1, len(prompt))
    assert passes == [1]
    _, finished = await run(engine, GenerationRequest((*prompt, 7), 0, ahead=True))
    assert (finished.prefill_tokens, finished.cached_tokens) == (0, len(prompt) + 1)


async def test_drafts_save_passes(engine: TransformersEngine) -> None:
    prompt = await ids_of(engine, CODE)
    said, _ = await run(engine, GenerationRequest(prompt, 32))
    passes = spy(engine)
    # The same again: all of it is expected, and the first passes of a size are not held against it.
    again, _ = await run(engine, GenerationRequest(prompt, 32))
    assert flat(again) == flat(said)
    assert len(passes) <= 6


async def test_an_end_of_text_ends_the_stream_and_is_not_told(engine: TransformersEngine) -> None:
    prompt = await ids_of(engine, CODE)
    said, _ = await run(engine, GenerationRequest(prompt, 8))
    ids = flat(said)
    stop = next(place for place, one in enumerate(ids) if place and one not in ids[:place])

    def make_it_an_end() -> None:
        engine._vocabulary.end_ids |= {ids[stop]}

    make_it_an_end()
    said, finished = await run(engine, GenerationRequest(prompt, 8))
    assert flat(said) == ids[:stop]
    assert finished.ended
    assert finished.decoded_tokens == stop


async def test_streams_that_interleave_do_not_mix(engine: TransformersEngine) -> None:
    one, other = await ids_of(engine, CODE), await ids_of(engine, CODE[:80])
    alone = [flat((await run(engine, GenerationRequest(prompt, 16, cached=False)))[0]) for prompt in (one, other)]
    first, second = (engine.generate(GenerationRequest(prompt, 16)) for prompt in (one, other))
    said: tuple[list[int], list[int]] = ([], [])
    async with aclosing(first), aclosing(second):
        open_streams = [(first, said[0]), (second, said[1])]
        while open_streams:
            for stream, ids in list(open_streams):
                event = await anext(stream, None)
                if event is None:
                    open_streams.remove((stream, ids))
                elif isinstance(event, Decoded):
                    ids += event.ids
    assert list(said) == alone


async def test_a_closed_stream_leaves_the_thread_free_and_keeps_what_was_read(engine: TransformersEngine) -> None:
    prompt = await ids_of(engine, CODE * 4)
    passes = spy(engine)
    async with aclosing(engine.generate(GenerationRequest(prompt, 500))) as stream:
        async for event in stream:
            if isinstance(event, Prefilled):
                break
    count = len(passes)
    await asyncio.sleep(0.05)
    assert len(passes) == count  # nothing goes on behind it
    assert engine.held(prompt) == 16
    _, finished = await run(engine, GenerationRequest(prompt, 1))
    assert finished.cached_tokens == 16


async def test_a_cancel_in_the_middle_of_a_pass_waits_for_that_pass_only(engine: TransformersEngine) -> None:
    prompt = await ids_of(engine, CODE * 4)
    entered, release = threading.Event(), threading.Event()
    loop: Any = engine._loop
    original = loop._pass

    def slow(*arguments: Any) -> Any:
        entered.set()
        release.wait(5)
        return original(*arguments)

    loop._pass = slow

    async def ask() -> None:
        await run(engine, GenerationRequest(prompt, 500))

    task = asyncio.create_task(ask())
    await asyncio.to_thread(entered.wait, 5)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()  # the thread is not free yet
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    loop._pass = original
    assert engine.held(prompt) == 16
    assert flat((await run(engine, GenerationRequest(prompt, 4)))[0]) == await reference(engine, prompt, 4)


def full_after(engine: TransformersEngine, allowed: Callable[[int], bool]) -> None:
    """Have the device run out of memory whenever a pass would leave a cache of a length that is not allowed."""
    loop: Any = engine._loop
    original = loop._pass

    def scarce(module: Any, cache: Any, ids: list[int], keep: int) -> Any:
        if not allowed(len(cache) + len(ids)):
            cache.layers.layers[0].update(torch.zeros(1, 2, len(ids), 16), torch.zeros(1, 2, len(ids), 16))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(module, cache, ids, keep)

    loop._pass = scarce


async def test_out_of_memory_gives_up_other_places_first(engine: TransformersEngine) -> None:
    prompt, other = await ids_of(engine, CODE * 2), await ids_of(engine, "# elsewhere\n" * 9)
    expected = await reference(engine, prompt, 12)
    await run(engine, GenerationRequest(other, 4))
    failures = [True]
    full_after(engine, lambda length: length < 60 or not failures or not failures.pop())
    said, _ = await run(engine, GenerationRequest(prompt, 12))
    assert flat(said) == expected
    assert engine.held(other) < len(other)
    assert engine.context_tokens == 1024


async def test_out_of_memory_in_the_middle_of_a_text_reads_it_again(engine: TransformersEngine) -> None:
    prompt = await ids_of(engine, CODE)
    expected = await reference(engine, prompt, 12)
    await run(engine, GenerationRequest((9, 9, 9), 1))
    failures = [True]
    full_after(engine, lambda length: length < len(prompt) + 4 or not failures or not failures.pop())
    said, _ = await run(engine, GenerationRequest(prompt, 12))
    assert flat(said) == expected
    assert not failures


async def test_out_of_memory_shortens_the_context_and_never_kills(engine: TransformersEngine) -> None:
    subject = Arbiter(engine)
    whole = await ids_of(engine, CODE * 30)
    prompt = whole[:800]
    full_after(engine, lambda length: length <= 620)
    with pytest.raises(MemoryFullError, match=r"no memory left for \d+ tokens; the context is 60\d tokens from now on"):
        await run(subject, GenerationRequest(prompt, 8))
    assert 600 <= subject.context_tokens <= 610
    with pytest.raises(PromptTooLongError):
        await run(subject, GenerationRequest(prompt, 8))
    shorter = prompt[: subject.context_tokens - 8]
    assert flat((await run(subject, GenerationRequest(shorter, 8)))[0]) == await reference(engine, shorter, 8)


async def test_where_nothing_fits_it_says_so_each_time(engine: TransformersEngine) -> None:
    full_after(engine, lambda length: False)
    for _ in range(3):
        with pytest.raises(MemoryFullError, match=r"engine\.context_tokens"):
            await run(engine, GenerationRequest((7, 8, 9), 4))
    assert engine.context_tokens == 512  # no further than the settings allow


async def test_memory_of_the_cpu_is_told_apart_from_other_errors(engine: TransformersEngine) -> None:
    loop: Any = engine._loop
    original = loop._pass

    def fail(message: str, *arguments: Any) -> Any:
        raise RuntimeError(message)

    loop._pass = partial(
        fail, "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
    )
    with pytest.raises(MemoryFullError, match="this machine has no memory left"):
        await run(engine, GenerationRequest((7, 8, 9), 4))
    loop._pass = partial(fail, "CUDA error: an illegal\nmemory access")
    with pytest.raises(EngineError, match="the model broke off: CUDA error: an illegal memory access"):
        await run(engine, GenerationRequest((7, 8, 9), 4))
    loop._pass = original
    assert flat((await run(engine, GenerationRequest((7, 8, 9), 4)))[0]) == await reference(engine, (7, 8, 9), 4)


async def test_too_long_a_prompt_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(PromptTooLongError, match=r"needs 1030 tokens, the context has 1024.*engine\.context_tokens"):
        await run(engine, GenerationRequest(tuple([7] * 1000), 30))
    assert (await run(engine, GenerationRequest(tuple([7] * 1000), 24)))[1].decoded_tokens == 24


async def test_the_models_own_limit_counts(small: LocalModel) -> None:
    engine = await TransformersEngine.load(small, EngineSettings(context_tokens=4096, threads=1))
    assert engine.context_tokens == 1024
    await engine.close()


async def test_an_empty_prompt_begins_a_text(engine: TransformersEngine) -> None:
    blank = engine._vocabulary.blank_id
    assert flat((await run(engine, GenerationRequest((), 6)))[0]) == await reference(engine, (blank,), 6)


async def test_an_adapter_that_is_not_attached_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(AdapterError, match="'mine' is not attached"):
        await run(engine, GenerationRequest((7,), 1, adapter="mine"))
    await engine.attach([])


async def test_sentinels_and_format_are_found_in_a_folder(engine: TransformersEngine, small: LocalModel) -> None:
    loaded = await prepare(small, engine)
    assert loaded.fim is not None
    assert loaded.fim.name == "qwen"
    ends = {(await engine.tokenize(word, special=True))[0].id for word in SPECIAL}
    assert len(loaded.stop_ids & ends) == 2
    for sentinel in loaded.fim.sentinels():
        assert len(await engine.tokenize(sentinel, special=True)) == 1
        plain = await engine.tokenize(sentinel)
        assert not {token.id for token in plain} & set(loaded.sentinel_ids.values())


async def test_the_two_tasks_keep_caches_of_their_own(engine: TransformersEngine) -> None:
    first, second = await ids_of(engine, CODE), await ids_of(engine, "# prose, " * 9)
    await run(engine, GenerationRequest(first, 1))
    await run(engine, GenerationRequest(second, 1, task=Task.EXPLANATION))
    _, finished = await run(engine, GenerationRequest(first, 1))
    assert finished.cached_tokens == len(first) - 1


async def test_closing_ends_open_streams_with_an_error(small: LocalModel) -> None:
    engine = await TransformersEngine.load(small, SETTINGS)
    stream = engine.generate(GenerationRequest((7, 8), 100))
    await anext(stream)
    await engine.close()
    with pytest.raises(EngineError, match="unloaded"):
        async for _ in stream:
            pass
    with pytest.raises(EngineError, match="unloaded"):
        await run(engine, GenerationRequest((7, 8), 1))
    await engine.close()


FACTS = BaseFacts("base", "tokenizer", "format")


def lora(folder: Path, seed: int) -> Adapter:
    """An adapter with random weights, for the small model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    module = small_module()
    torch.manual_seed(seed)
    wrapped: Any = get_peft_model(module, config)
    wrapped.save_pretrained(folder)
    adapters.write_manifest(folder, FACTS)
    return adapters.inspect(folder, FACTS)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
async def test_each_request_is_served_by_its_adapter_alone(engine: TransformersEngine, tmp_path: Path) -> None:
    one, other = (lora(tmp_path / str(seed), seed) for seed in (1, 2))
    prompt = await ids_of(engine, CODE)

    async def ask(name: str | None, *, cached: bool = True) -> list[int]:
        said, _ = await run(engine, GenerationRequest(prompt, 12, adapter=name, cached=cached))
        return flat(said)

    bare = await ask(None)
    await engine.attach([one, other])
    expected = {name: await ask(name, cached=False) for name in (None, one.name, other.name)}
    assert expected[None] == bare
    assert len({tuple(ids) for ids in expected.values()}) == 3
    rng = random.Random(1)
    for _ in range(20):
        name = rng.choice([None, one.name, other.name])
        assert await ask(name) == expected[name]
    # In turns, token by token.
    streams = {name: engine.generate(GenerationRequest(prompt, 12, adapter=name)) for name in expected}
    said: dict[str | None, list[int]] = {name: [] for name in expected}
    while streams:
        for name, stream in list(streams.items()):
            event = await anext(stream, None)
            if event is None:
                del streams[name]
            elif isinstance(event, Decoded):
                said[name] += event.ids
    assert said == expected

    await engine.attach([other])
    assert await ask(other.name) == expected[other.name]
    with pytest.raises(AdapterError, match="not attached"):
        await ask(one.name)
    (tmp_path / "1" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError):
        await engine.attach([one])
    assert await ask(other.name) == expected[other.name]  # those from before stay
    await engine.attach([])
    assert await ask(None, cached=False) == bare
    with pytest.raises(AdapterError, match="not attached"):
        await ask(other.name)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
async def test_a_twin_is_had_at_any_time_and_is_bare(engine: TransformersEngine, tmp_path: Path) -> None:
    await engine.attach([lora(tmp_path / "a", 1)])
    twin = await engine.twin()
    assert not any("lora" in name for name, _ in twin.named_modules())
    weights = await engine.with_model(lambda module: module.model.embed_tokens.weight.data_ptr())
    assert twin.model.embed_tokens.weight.data_ptr() == weights
    assert (await engine.twin()) is not twin
