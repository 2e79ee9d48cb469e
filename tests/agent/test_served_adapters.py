"""Which adapter answers which task, with a FakeEngine; the adapters' folders are real."""

import asyncio
import json
import shutil
import uuid
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import pytest

from agent import base_facts, completer
from agent.catalog import LocalModel
from agent.completer import Completed
from agent.config import CompletionSettings
from agent.crash_guard import CrashGuard
from agent.engine_host import EngineHost
from agent.engines.base import Engine, Task
from agent.errors import AdapterError
from agent.served_adapters import ServedAdapters
from agent.types import CompletionRequest, Document, Generation
from tests.adapter_folders import write_adapter
from tests.conftest import World, count
from tests.fakes import FakeEngine
from tests.gguf_files import write_gguf

pytest.importorskip("safetensors", reason="safetensors is not installed; make train-deps")
pytest.importorskip("numpy", reason="numpy is not installed; make train-deps")


class Daemon:
    """A host, what it serves, and the engines that it loaded."""

    def __init__(self, world: World) -> None:
        self.root = world.root
        self.engines: list[FakeEngine] = []
        self.record = world.root / "state" / "adapters.json"
        self.refused: set[str] = set()
        model = write_gguf(world.root / "m.gguf")
        self.host = EngineHost(str(model), self._load, CrashGuard(world.root), unload_after_s=0)
        self.served = ServedAdapters(self.host, self.record)

    async def _load(self, model: LocalModel) -> Engine:
        del model
        self.engines.append(FakeEngine(refused=self.refused))
        return self.engines[-1]

    async def adapter(self, name: str, seed: int) -> Path:
        """Write an adapter for the model."""
        async with self.host.use() as loaded:
            facts = base_facts.of(loaded.model, loaded.fim)
        return write_adapter(self.root / name, seed=seed, facts=facts)

    def name(self, task: Task = Task.COMPLETION) -> str | None:
        found = self.served.describe()[task.value]
        return found["name"] if found else None

    @property
    def attached(self) -> list[str]:
        return [adapter.folder.name for adapter in self.engines[-1].attached]

    async def complete(self) -> Generation:
        async with self.host.use() as loaded, self.served.held(Task.COMPLETION) as adapter:
            asked = CompletionRequest(uuid.uuid4().hex, Document("file:///a.py", 0, "a.py", "python"), "x = ", "\n")
            answer = completer.complete(loaded, asked, CompletionSettings(), adapter=adapter)
            async with aclosing(answer) as parts:
                async for part in parts:
                    if isinstance(part, Completed):
                        assert part.generation
                        assert part.completion.adapter == part.generation.adapter
                        return part.generation
        raise AssertionError("no completion")


@pytest.fixture
def daemon(world: World) -> Daemon:
    return Daemon(world)


async def test_an_adapter_answers_its_task_and_no_other(daemon: Daemon) -> None:
    assert daemon.served.describe() == {"completion": None, "explanation": None}
    await daemon.served.serve({Task.COMPLETION: await daemon.adapter("one", 1)})
    assert (await daemon.complete()).adapter == daemon.name()
    assert daemon.engines[-1].requests[-1].adapter == daemon.name()
    async with daemon.served.held(Task.EXPLANATION) as adapter:
        assert adapter is None
    await daemon.served.serve({Task.EXPLANATION: await daemon.adapter("two", 2)})
    assert (await daemon.complete()).adapter == daemon.name()
    async with daemon.served.held(Task.EXPLANATION) as adapter:
        assert adapter == daemon.name(Task.EXPLANATION) != daemon.name()
    await daemon.served.serve({Task.COMPLETION: None})
    assert (await daemon.complete()).adapter is None
    assert daemon.name(Task.EXPLANATION) is not None


async def test_one_that_is_refused_changes_nothing(daemon: Daemon) -> None:
    await daemon.served.serve({Task.COMPLETION: await daemon.adapter("one", 1)})
    before, recorded = daemon.served.describe(), daemon.record.read_bytes()
    foreign = write_adapter(daemon.root / "foreign", seed=2)
    with pytest.raises(AdapterError, match=r"foreign is refused: made for the base model"):
        await daemon.served.serve({Task.COMPLETION: foreign})
    whole = await daemon.adapter("whole", 3)
    with pytest.raises(AdapterError, match="foreign"):
        await daemon.served.serve({Task.COMPLETION: whole, Task.EXPLANATION: foreign})
    daemon.refused.add(await named(daemon, whole))
    with pytest.raises(AdapterError, match="refused by this engine"):
        await daemon.served.serve({Task.COMPLETION: whole})
    assert daemon.served.describe() == before
    assert daemon.record.read_bytes() == recorded
    assert (await daemon.complete()).adapter == daemon.name()


async def named(daemon: Daemon, folder: Path) -> str:
    from agent import adapters

    async with daemon.host.use() as loaded:
        return adapters.inspect(folder, base_facts.of(loaded.model, loaded.fim)).name


async def test_after_an_unload_the_same_adapters_answer_again(daemon: Daemon) -> None:
    one, two = await daemon.adapter("one", 1), await daemon.adapter("two", 2)
    await daemon.served.serve({Task.COMPLETION: one, Task.EXPLANATION: two})
    before = daemon.served.describe()
    await daemon.host.unload()
    assert (await daemon.complete()).adapter == daemon.name()
    assert len(daemon.engines) == 2
    assert daemon.served.describe() == before
    assert set(daemon.attached) == {"one", "two"}


async def test_another_daemon_serves_what_was_served(daemon: Daemon, world: World) -> None:
    await daemon.served.serve({Task.COMPLETION: await daemon.adapter("one", 1)})
    await daemon.host.close()
    other = Daemon(world)
    assert other.served.describe()["completion"] == {"folder": str(world.root / "one"), "name": None, "error": None}
    assert (await other.complete()).adapter == daemon.name()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"completion": 3}', '{"more": "x"}'])
async def test_a_record_that_is_damaged_serves_the_bare_model(daemon: Daemon, world: World, content: str) -> None:
    daemon.record.parent.mkdir()
    daemon.record.write_text(content)
    assert (await Daemon(world).complete()).adapter is None


async def test_one_that_went_away_is_said_and_the_other_answers(daemon: Daemon) -> None:
    one, two = await daemon.adapter("one", 1), await daemon.adapter("two", 2)
    await daemon.served.serve({Task.COMPLETION: one, Task.EXPLANATION: two})
    shutil.move(one, daemon.root / "away")
    await daemon.host.unload()
    assert (await daemon.complete()).adapter is None
    found = daemon.served.describe()
    assert found["completion"] is not None
    assert "no such folder" in found["completion"]["error"]
    assert daemon.name(Task.EXPLANATION) is not None
    shutil.move(daemon.root / "away", one)
    await daemon.host.unload()
    assert (await daemon.complete()).adapter == daemon.name() is not None


async def test_an_engine_that_takes_no_adapter_serves_the_bare_model_and_says_so(daemon: Daemon) -> None:
    await daemon.served.serve({Task.COMPLETION: await daemon.adapter("one", 1)})
    daemon.refused.add(str(daemon.name()))
    await daemon.host.unload()
    assert (await daemon.complete()).adapter is None
    found = daemon.served.describe()["completion"]
    assert found is not None
    assert "refused by this engine" in found["error"]


async def test_what_an_answer_holds_stays_attached(daemon: Daemon) -> None:
    folders = [await daemon.adapter(f"{number}", number) for number in range(8)]
    await daemon.served.serve({Task.COMPLETION: folders[0]})
    async with daemon.served.held(Task.COMPLETION):
        for folder in folders[1:]:
            await daemon.served.serve({Task.COMPLETION: folder})
            assert "0" in daemon.attached
        assert len(daemon.attached) <= 5  # the new one, the one before, the one that is held, and two to spare
    await daemon.served.serve({Task.COMPLETION: folders[1]})
    await daemon.served.serve({Task.COMPLETION: folders[2]})
    await daemon.served.serve({Task.COMPLETION: folders[3]})
    await daemon.served.serve({Task.COMPLETION: folders[4]})
    assert daemon.attached[:2] == ["4", "3"]
    assert "0" not in daemon.attached


async def test_one_to_spare_that_went_wrong_does_not_keep_a_new_one_out(daemon: Daemon) -> None:
    folders = [await daemon.adapter(f"{number}", number) for number in range(3)]
    for folder in folders[:2]:
        await daemon.served.serve({Task.COMPLETION: folder})
    daemon.refused.add(await named(daemon, folders[0]))
    await daemon.served.serve({Task.COMPLETION: folders[2]})
    assert daemon.attached == ["2", "1"]


async def test_swaps_under_load(daemon: Daemon) -> None:
    folders = [await daemon.adapter(name, seed) for seed, name in enumerate(("one", "two"))]
    names = [await named(daemon, folder) for folder in folders]
    engine = daemon.engines[-1]
    engine.token_s = 0.0005
    engine.voices = {name: lambda prompt, index=index: f"answer{index}{'!' * 20}\n" for index, name in enumerate(names)}  # type: ignore[misc]
    wanted = {name: f"answer{index}{'!' * 20}" for index, name in enumerate(names)}
    await daemon.served.serve({Task.COMPLETION: folders[0]})
    answers: Counter[str | None] = Counter()
    swapping = True

    async def client() -> None:
        while swapping:
            generation = await daemon.complete()
            assert generation.adapter in wanted
            said = bytes(generation.output_ids).decode()
            assert said.rstrip().endswith(wanted[generation.adapter])
            answers[generation.adapter] += 1

    clients = [asyncio.create_task(client()) for _ in range(4)]
    for number in range(count(200)):
        await daemon.served.serve({Task.COMPLETION: folders[(number + 1) % 2]})
        await asyncio.sleep(0.01)
    swapping = False
    await asyncio.gather(*clients)
    assert set(answers) == set(names)
    assert engine.most_open == 1


async def test_the_record_is_private(daemon: Daemon) -> None:
    await daemon.served.serve({Task.COMPLETION: await daemon.adapter("one", 1)})
    assert daemon.record.stat().st_mode & 0o777 == 0o600
    assert json.loads(daemon.record.read_text()) == {"completion": str(daemon.root / "one")}
