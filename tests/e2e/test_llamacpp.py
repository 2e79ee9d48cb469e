"""What is llama.cpp's own, with the real starter model in this process; what every engine must do is in test_engines.py."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from agent import catalog
from agent.config import EngineSettings
from agent.engines.base import Decoded, Finished, GenerationRequest, Prefilled, Task
from agent.engines.llamacpp import LlamaCppEngine
from tests.conftest import STARTER_DIR, World

pytestmark = pytest.mark.e2e

CODE = "def area(width, height):\n    return width * height\n\n\n"


@pytest.fixture
async def engine(real_world: World) -> AsyncIterator[LlamaCppEngine]:
    path = STARTER_DIR / "starter" / catalog.entry("starter").file
    made = await LlamaCppEngine.load(path, EngineSettings(), real_world.runtime)
    yield made
    await made.close()


async def ids_of(engine: LlamaCppEngine, text: str) -> tuple[int, ...]:
    return tuple(token.id for token in await engine.tokenize(text))


async def run(engine: LlamaCppEngine, request: GenerationRequest) -> tuple[list[Decoded], Finished]:
    said: list[Decoded] = []
    async with aclosing(engine.generate(request)) as stream:
        async for event in stream:
            if isinstance(event, Decoded):
                said.append(event)
            elif isinstance(event, Finished):
                return said, event
    raise AssertionError("the stream had no end")


async def test_tokens_within_a_character_are_recovered_and_marked(engine: LlamaCppEngine) -> None:
    prompt = await ids_of(engine, "# Three faces: 🙂 🙃 😀\n# Three faces: 🙂 🙃 😀\n# Three faces:")
    said, _ = await run(engine, GenerationRequest(prompt, 14))
    text = "".join(event.text for event in said)
    assert "🙂" in text
    assert "\ufffd" not in text
    several = [event for event in said if len(event.ids) > 1]
    assert several
    assert all(not event.exact and len(event.logps) == len(event.ids) for event in several)


async def test_the_two_tasks_keep_caches_of_their_own(engine: LlamaCppEngine) -> None:
    first, second = await ids_of(engine, CODE * 4), await ids_of(engine, "# prose, " * 40)
    await run(engine, GenerationRequest(first, 1))
    await run(engine, GenerationRequest(second, 1, task=Task.EXPLANATION))
    _, finished = await run(engine, GenerationRequest(first, 1))
    assert finished.cached_tokens >= len(first) - 1


async def test_documents_that_are_typed_at_in_turn_keep_their_prompts(engine: LlamaCppEngine) -> None:
    prompts = [
        await ids_of(engine, "<|fim_prefix|>" + f"# file {name}\n" * 8) for name in ("one", "two", "three", "four")
    ]
    for prompt in prompts:
        await run(engine, GenerationRequest(prompt, 1))
    for prompt in prompts:
        _, finished = await run(engine, GenerationRequest((*prompt, 750), 1))
        assert finished.cached_tokens >= len(prompt) - 1
        assert finished.prefill_tokens <= 2


async def test_no_port_is_opened(engine: LlamaCppEngine, real_world: World) -> None:
    assert [one for one in psutil.Process().net_connections("inet") if one.status == "LISTEN"] == []
    (socket,) = real_world.runtime.glob("engine-*.sock")
    assert socket.stat().st_mode & 0o777 == 0o600


async def test_closing_frees_memory_and_removes_the_socket(real_world: World) -> None:
    path = Path(catalog.find("starter").path)
    made = await LlamaCppEngine.load(path, EngineSettings(), real_world.runtime)
    full = psutil.Process().memory_info().rss
    await made.close()
    until = time.monotonic() + 5
    while psutil.Process().memory_info().rss > full - 200_000_000:
        assert time.monotonic() < until, "the model is still in memory"
        await asyncio.sleep(0.05)
    assert list(real_world.runtime.glob("engine-*.sock")) == []


async def test_what_is_read_in_advance_is_read_in_batches_and_gone_on_with(engine: LlamaCppEngine) -> None:
    prompt = await ids_of(engine, "# in advance\n" + CODE * 8)
    request = GenerationRequest(prompt, 0, ahead=True)
    async with aclosing(engine.generate(request)) as stream:
        async for event in stream:
            if isinstance(event, Prefilled) and event.done_tokens >= 48:
                break
    done = [0]
    async with aclosing(engine.generate(request)) as stream:
        async for event in stream:
            if isinstance(event, Prefilled):
                done.append(event.done_tokens)
            elif isinstance(event, Finished):
                assert event.cached_tokens >= 32
                assert event.prefill_tokens <= len(prompt) - event.cached_tokens
    assert done[-1] == len(prompt)
    first = next(count for count in done if count)
    assert all(after - before <= 16 for before, after in pairwise([first, *done[1:]]) if after > before)
    _, finished = await run(engine, GenerationRequest(prompt, 1))
    assert finished.cached_tokens >= len(prompt) - 1
