"""Adapters that the transformers engine serves, from a request to PEFT's layers, with a small model: swaps and failures."""

import asyncio
import random
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; make train-deps")

from agent import base_facts, completer  # noqa: E402
from agent.catalog import LocalModel  # noqa: E402
from agent.completer import Completed, Layout  # noqa: E402
from agent.config import CompletionSettings, EngineSettings  # noqa: E402
from agent.crash_guard import CrashGuard  # noqa: E402
from agent.engine_host import EngineHost  # noqa: E402
from agent.engines.base import Engine, Task  # noqa: E402
from agent.engines.transformers import TransformersEngine  # noqa: E402
from agent.errors import AdapterError  # noqa: E402
from agent.fim import FORMATS  # noqa: E402
from agent.served_adapters import ServedAdapters  # noqa: E402
from agent.types import CompletionRequest, Document, Generation  # noqa: E402
from tests.conftest import World, count  # noqa: E402
from tests.with_torch import tiny  # noqa: E402
from tests.with_torch.small_models import save, small_module  # noqa: E402

SETTINGS = EngineSettings(context_tokens=512, completion_slots=4, threads=1)
PREFIXES = (
    "def area(width, height):\n    return ",
    "import os\n\nhere = ",
    "class Box:\n    width = 1\n    h",
    "for each in (1, 2):\n    print(",
)


class Daemon:
    """A host with a small model, and what it serves."""

    def __init__(self, root: Path, model: LocalModel) -> None:
        self.host = EngineHost(model.name, self._load, CrashGuard(root), unload_after_s=0, find=lambda _: model)
        self.served = ServedAdapters(self.host, root / "adapters.json")

    async def _load(self, model: LocalModel) -> Engine:
        return await TransformersEngine.load(model, SETTINGS)

    async def complete(self, prefix: str) -> Generation:
        asked = CompletionRequest(uuid.uuid4().hex, Document("file:///a.py", 0, "a.py", "python"), prefix, "\n")
        async with self.host.use() as loaded, self.served.held(Task.COMPLETION) as adapter:
            # Healing asks a model of random weights for tokens that it never writes, and the text is not the point here.
            answer = completer.complete(loaded, asked, CompletionSettings(), layout=Layout.LINE, adapter=adapter)
            async with aclosing(answer) as parts:
                async for part in parts:
                    if isinstance(part, Completed):
                        assert part.generation
                        return part.generation
        raise AssertionError("no completion")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return save(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def folders(small: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    facts, root = base_facts.of(small, FORMATS["qwen"]), tmp_path_factory.mktemp("adapters")
    for seed in (1, 2):
        tiny.make_adapter(small_module(), root / f"{seed}", facts, seed=seed)
    return [root / "1", root / "2"]


@pytest.fixture
async def daemon(world: World, small: LocalModel) -> AsyncIterator[Daemon]:
    made = Daemon(world.root, small)
    yield made
    await made.host.close()


async def test_each_answer_is_one_adapters_while_they_are_swapped(daemon: Daemon, folders: list[Path]) -> None:
    wanted: dict[tuple[str | None, str], tuple[int, ...]] = {}
    for folder in (None, *folders):
        await daemon.served.serve({Task.COMPLETION: folder})
        for prefix in PREFIXES:
            generation = await daemon.complete(prefix)
            wanted[generation.adapter, prefix] = generation.output_ids
    names = {name for name, _ in wanted}
    assert len(names) == 3  # the bare model has none
    for prefix in PREFIXES:
        assert len({wanted[name, prefix] for name in names}) == 3
    answers: Counter[str | None] = Counter()
    swapping = True

    async def client(prefix: str) -> None:
        while swapping:
            generation = await daemon.complete(prefix)
            assert generation.output_ids == wanted[generation.adapter, prefix]
            answers[generation.adapter] += 1

    clients = [asyncio.create_task(client(prefix)) for prefix in PREFIXES]
    rng, swaps = random.Random(4), count(200)
    for number in range(swaps):
        # The bare model in between takes the layers out again, and has others put in.
        if number % 10 == 9:
            await daemon.served.serve({Task.COMPLETION: None})
            assert daemon.served.describe() == {"completion": None, "explanation": None}
        await daemon.served.serve({Task.COMPLETION: folders[number % 2]})
        await asyncio.sleep(rng.uniform(0, 0.03))
        if any(task.done() for task in clients):
            break  # it failed: told below
    swapping = False
    await asyncio.gather(*clients)
    assert set(answers) >= names - {None}
    assert sum(answers.values()) >= swaps / 4  # or next to nothing was asked meanwhile


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory is left on cpu"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "no memory is left on cpu"),
        (ValueError("of PEFT's"), "ValueError: of PEFT's"),
    ],
)
async def test_one_that_cannot_be_attached_leaves_the_one_before_and_does_not_keep_the_model_from_loading(
    daemon: Daemon, folders: list[Path], monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    await daemon.served.serve({Task.COMPLETION: folders[0]})
    before = await daemon.complete(PREFIXES[0])

    def failing(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr("torch.tensor", failing)
        with pytest.raises(AdapterError, match=says):
            await daemon.served.serve({Task.COMPLETION: folders[1]})
    after = await daemon.complete(PREFIXES[0])
    assert (after.adapter, after.output_ids) == (before.adapter, before.output_ids)
    await daemon.host.unload()
    with monkeypatch.context() as broken:
        broken.setattr("agent.engines.lora.AdapterSwitch._add", failing)
        assert (await daemon.complete(PREFIXES[0])).adapter is None
    found = daemon.served.describe()["completion"]
    assert found is not None
    assert found["folder"] == str(folders[0])
    assert says in found["error"]
    await daemon.host.unload()
    again = await daemon.complete(PREFIXES[0])
    assert (again.adapter, again.output_ids) == (before.adapter, before.output_ids)


async def test_without_peft_the_bare_model_answers_and_it_is_said(
    daemon: Daemon, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "agent.engines.lora", raising=False)
        without.setitem(sys.modules, "peft", None)
        with pytest.raises(AdapterError, match="the package peft; run: make train-deps"):
            await daemon.served.serve({Task.COMPLETION: folders[0]})
        assert (await daemon.complete(PREFIXES[0])).adapter is None
    await daemon.served.serve({Task.COMPLETION: folders[0]})
    assert (await daemon.complete(PREFIXES[0])).adapter is not None
