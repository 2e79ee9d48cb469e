import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from agent.arbiter import Arbiter
from agent.engines.base import Adapter, Decoded, Event, Finished, GenerationRequest, Task
from tests.conftest import count
from tests.fakes import FakeEngine, decode, encode

STORY = "abcdefghijklmnopqrstuvwxyz" * 4


def tells(prompt: str) -> str:
    """Continues the story from wherever a prompt has come to, so that a resumed prompt gives the same whole."""
    said = prompt.partition(">")[2]
    return STORY[len(said) :] if prompt.startswith("story>") else "ok"


def ask(prompt: str, task: Task, max_tokens: int = 1000) -> GenerationRequest:
    return GenerationRequest(tuple(token.id for token in encode(prompt)), max_tokens, task)


async def text_of(stream: AsyncGenerator[Event, None]) -> tuple[str, Finished]:
    text = ""
    async with aclosing(stream):
        async for event in stream:
            if isinstance(event, Decoded):
                text += event.text
            elif isinstance(event, Finished):
                return text, event
    raise AssertionError("the stream had no end")


async def test_a_completion_overtakes_an_explanation_which_goes_on_where_it_was() -> None:
    engine = FakeEngine(say=tells, token_s=0.002)
    arbiter = Arbiter(engine)
    order: list[str] = []

    async def explanation() -> tuple[str, Finished]:
        result = await text_of(arbiter.generate(ask("story>", Task.EXPLANATION)))
        order.append("explanation")
        return result

    running = asyncio.create_task(explanation())
    while len(engine.requests) < 1 or not engine.open_streams:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    assert (await text_of(arbiter.generate(ask("now", Task.COMPLETION))))[0] == "ok"
    order.append("completion")
    text, finished = await running
    assert order == ["completion", "explanation"]
    assert text == STORY
    assert finished.decoded_tokens == len(STORY)
    assert finished.ended
    assert engine.most_open == 1
    assert decode(engine.requests[-1].prompt_ids).startswith("story>ab")


async def test_an_explanation_is_overtaken_in_its_prefill_too() -> None:
    engine = FakeEngine(say=tells, batch_s=0.02, batch_tokens=1)
    arbiter = Arbiter(engine)
    running = asyncio.create_task(text_of(arbiter.generate(ask("story>", Task.EXPLANATION))))
    await asyncio.sleep(0.03)
    engine.batch_s = 0
    await text_of(arbiter.generate(ask("now", Task.COMPLETION)))
    assert not running.done()
    assert (await running)[0] == STORY


async def test_the_allowance_holds_across_interruptions() -> None:
    engine = FakeEngine(say=tells, token_s=0.002)
    arbiter = Arbiter(engine)
    running = asyncio.create_task(text_of(arbiter.generate(ask("story>", Task.EXPLANATION, max_tokens=30))))
    await asyncio.sleep(0.02)
    await text_of(arbiter.generate(ask("now", Task.COMPLETION)))
    text, finished = await running
    assert text == STORY[:30]
    assert not finished.ended


async def test_giving_up_while_waiting_leaves_the_engine_to_others() -> None:
    engine = FakeEngine(say=tells, token_s=0.005)
    arbiter = Arbiter(engine)
    first = asyncio.create_task(text_of(arbiter.generate(ask("story>", Task.COMPLETION))))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(text_of(arbiter.generate(ask("story>", Task.COMPLETION))))
    third = asyncio.create_task(text_of(arbiter.generate(ask("story>", Task.EXPLANATION))))
    await asyncio.sleep(0.02)
    for task in (second, first):
        task.cancel()
    assert (await third)[0] == STORY
    assert engine.open_streams == 0


async def test_an_engine_that_breaks_is_free_for_the_next() -> None:
    class Breaks(FakeEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
            if request.max_tokens == 13:
                raise RuntimeError("broken")
            async for event in super().generate(request):
                yield event

    arbiter = Arbiter(Breaks(say=tells))
    for task in Task:
        with pytest.raises(RuntimeError):
            await text_of(arbiter.generate(ask("x", task, max_tokens=13)))
        assert (await text_of(arbiter.generate(ask("x", task))))[0] == "ok"


async def test_whatever_is_asked_and_given_up_one_stream_is_open_and_every_answer_whole() -> None:
    rng = random.Random(7)
    for _ in range(count(200)):
        engine = FakeEngine(say=tells, token_s=0.0002)
        arbiter = Arbiter(engine)

        async def one(arbiter: Arbiter = arbiter) -> None:
            await asyncio.sleep(rng.random() * 0.03)
            prompt, task = ("story>", Task.EXPLANATION) if rng.random() < 0.4 else ("now", Task.COMPLETION)
            work = asyncio.create_task(text_of(arbiter.generate(ask(prompt, task))))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.02)
                work.cancel()
            try:
                assert (await work)[0] == (STORY if prompt == "story>" else "ok")
            except asyncio.CancelledError:
                assert work.cancelled()

        await asyncio.gather(*(one() for _ in range(8)))
        assert engine.most_open <= 1
        assert engine.open_streams == 0


def test_a_context_that_shrinks_is_seen() -> None:
    engine = FakeEngine(context_tokens=4096)
    arbiter = Arbiter(engine)
    engine.context_tokens = 600
    assert arbiter.context_tokens == 600


async def test_adapters_are_attached_between_two_streams_and_explanations_give_way() -> None:
    engine = FakeEngine(say=tells, token_s=0.002)
    arbiter = Arbiter(engine)
    adapter = Adapter("one-1", Path("/one"))
    running = asyncio.create_task(text_of(arbiter.generate(ask("story>", Task.EXPLANATION))))
    while not engine.open_streams:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    await arbiter.attach([adapter])  # FakeEngine fails where a stream is open
    assert engine.attached == [adapter]
    assert not running.done()
    assert (await running)[0] == STORY
