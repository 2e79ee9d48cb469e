"""Adapters that are swapped while completions run: the whole way from a request to the engine, with a tiny model."""

import asyncio
import uuid
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; make train-deps")

from agent import adapters, base_facts, completer  # noqa: E402
from agent.arbiter import Arbiter  # noqa: E402
from agent.catalog import LocalModel  # noqa: E402
from agent.completer import Completed, Layout  # noqa: E402
from agent.config import CompletionSettings, EngineSettings  # noqa: E402
from agent.crash_guard import CrashGuard  # noqa: E402
from agent.engine_host import EngineHost  # noqa: E402
from agent.engines.base import Adapter, Decoded, Engine, GenerationRequest, Task  # noqa: E402
from agent.engines.llamacpp import LlamaCppEngine  # noqa: E402
from agent.engines.transformers import TransformersEngine  # noqa: E402
from agent.fim import FORMATS  # noqa: E402
from agent.served_adapters import ServedAdapters  # noqa: E402
from agent.types import CompletionRequest, Document, Generation  # noqa: E402
from tests.conftest import World, count  # noqa: E402
from tests.with_torch import tiny  # noqa: E402

SETTINGS = EngineSettings(context_tokens=512, completion_slots=4, threads=1)
PREFIXES = (
    "def add(a, b):\n    ",
    "import os\n\nhere = ",
    "class A:\n    x = 1\n    y",
    "for each in (1, 2):\n    print(",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")


@pytest.fixture
def folders(base: Path, tmp_path: Path) -> list[Path]:
    facts = base_facts.of(LocalModel("tiny", base, "gguf", None, 512, ""), FORMATS["qwen"])
    for seed in (1, 2):
        tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / f"{seed}", facts, seed=seed)
    return [tmp_path / "1", tmp_path / "2"]


async def complete(host: EngineHost, served: ServedAdapters, prefix: str) -> Generation:
    asked = CompletionRequest(uuid.uuid4().hex, Document("file:///a.py", 0, "a.py", "python"), prefix, "\n")
    async with host.use() as loaded, served.held(Task.COMPLETION) as adapter:
        # Healing asks a model of random weights for tokens that it never writes, and the text is not the point here.
        answer = completer.complete(loaded, asked, CompletionSettings(), layout=Layout.LINE, adapter=adapter)
        async with aclosing(answer) as parts:
            async for part in parts:
                if isinstance(part, Completed):
                    assert part.generation
                    return part.generation
    raise AssertionError("no completion")


@pytest.mark.parametrize("kind", ["llama.cpp", "transformers"])
async def test_each_answer_is_one_adapters(kind: str, world: World, base: Path, folders: list[Path]) -> None:
    async def load(model: LocalModel) -> Engine:
        if kind == "transformers":
            return await TransformersEngine.load(model, SETTINGS)
        return await LlamaCppEngine.load(model.path, SETTINGS, world.runtime)

    host = EngineHost(str(base), load, CrashGuard(world.root), unload_after_s=0)
    served = ServedAdapters(host, world.root / "adapters.json")
    wanted: dict[tuple[str | None, str], tuple[int, ...]] = {}
    for folder in folders:
        await served.serve({Task.COMPLETION: folder})
        for prefix in PREFIXES:
            generation = await complete(host, served, prefix)
            wanted[generation.adapter, prefix] = generation.output_ids
    names = {name for name, _ in wanted}
    assert len(names) == 2
    for prefix in PREFIXES:
        one, other = (wanted[name, prefix] for name in names)
        assert one != other
    answers: Counter[str | None] = Counter()
    swapping = True

    async def client(prefix: str) -> None:
        while swapping:
            generation = await complete(host, served, prefix)
            assert generation.output_ids == wanted[generation.adapter, prefix]
            answers[generation.adapter] += 1

    clients = [asyncio.create_task(client(prefix)) for prefix in PREFIXES]
    swaps = count(200)
    for number in range(swaps):
        await served.serve({Task.COMPLETION: folders[number % 2]})
        await asyncio.sleep(0.01)
    swapping = False
    await asyncio.gather(*clients)
    await host.close()
    assert set(answers) == names
    assert sum(answers.values()) >= swaps / 4  # or next to nothing was asked meanwhile


async def test_servers_are_replaced_between_two_streams(world: World, base: Path, folders: list[Path]) -> None:
    facts = base_facts.of(LocalModel("tiny", base, "gguf", None, 512, ""), FORMATS["qwen"])
    pair = [adapters.inspect(folder, facts) for folder in folders]
    engine = await LlamaCppEngine.load(base, SETTINGS, world.runtime)
    arbiter = Arbiter(engine)
    prompt_ids = tuple(b"def add(a, b):")

    async def ids(adapter: Adapter, task: Task) -> list[int]:
        said: list[int] = []
        request = GenerationRequest(prompt_ids, 24, task, adapter=adapter.name)
        async with aclosing(arbiter.generate(request)) as stream:
            async for event in stream:
                if isinstance(event, Decoded):
                    said += event.ids
        return said

    wanted: list[list[int]] = []
    for adapter in pair:
        await arbiter.attach([adapter])
        wanted.append(await ids(adapter, Task.COMPLETION))
    assert wanted[0] != wanted[1]
    tokens = 0
    for number in range(count(40)):
        which = number % 2
        await arbiter.attach([pair[which]])  # the other one is not in the server that is loaded now
        long = asyncio.create_task(ids(pair[which], Task.EXPLANATION))
        short, words = await asyncio.gather(ids(pair[which], Task.COMPLETION), arbiter.tokenize("def add"))
        assert short == wanted[which]
        assert await long == wanted[which]
        tokens += len(words)
    # Short requests come while nobody holds the engine's turn, and wait for the server that is being loaded.
    for number in range(count(40)):
        swap = asyncio.create_task(arbiter.attach([pair[number % 2]]))
        while not swap.done():
            assert [token.id for token in await arbiter.tokenize("add")] == list(b"add")
        await swap
    await engine.close()
    assert list(world.runtime.glob("engine-*.sock")) == []
    assert tokens
