import asyncio
import gc
import weakref
from pathlib import Path

import pytest

from agent.catalog import LocalModel
from agent.crash_guard import CrashGuard
from agent.engine_host import EngineHost, HostState
from agent.engines.base import Engine
from agent.errors import EngineError, ModelCorruptError, ModelMissingError, RemoteError, TabwiseError
from tests.conftest import World
from tests.fakes import FakeEngine
from tests.gguf_files import write_gguf


class Loader:
    """Loads FakeEngines and counts."""

    def __init__(self, slow_s: float = 0.0) -> None:
        self.engines: list[FakeEngine] = []
        self.slow_s = slow_s
        self.error: Exception | None = None

    async def __call__(self, model: LocalModel) -> Engine:
        await asyncio.sleep(self.slow_s)
        if self.error:
            raise self.error
        self.engines.append(FakeEngine())
        return self.engines[-1]


def host(world: World, load: Loader, unload_after_s: float = 0) -> EngineHost:
    model = write_gguf(world.root / "m.gguf")
    return EngineHost(str(model), load, guard(world.root), unload_after_s=unload_after_s)


def guard(folder: Path) -> CrashGuard:
    return CrashGuard(folder)


async def test_many_who_ask_at_once_load_once(world: World) -> None:
    load = Loader(0.02)
    subject = host(world, load)

    async def use() -> None:
        async with subject.use():
            pass

    await asyncio.gather(*(use() for _ in range(10)))
    assert len(load.engines) == 1
    assert subject.state is HostState.READY
    assert subject.users == 0


async def test_who_gives_up_waiting_does_not_break_the_load(world: World) -> None:
    load = Loader(0.05)
    subject = host(world, load)

    async def use() -> None:
        async with subject.use():
            pass

    impatient, patient = asyncio.create_task(use()), asyncio.create_task(use())
    await asyncio.sleep(0.01)
    impatient.cancel()
    await patient
    assert len(load.engines) == 1


async def test_a_quiet_model_leaves_memory_and_comes_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.engine_host._LOOK_EVERY_S", 0.01)
    load = Loader()
    subject = host(world, load, unload_after_s=0.05)
    watcher = asyncio.create_task(subject.watch())
    async with subject.use():
        await asyncio.sleep(0.2)
        assert subject.state is HostState.READY  # in use, however long
    while subject.state is HostState.READY:
        await asyncio.sleep(0.01)
    assert load.engines[0].closed
    async with subject.use():
        assert len(load.engines) == 2
    watcher.cancel()


async def test_an_unload_that_fails_does_not_end_the_watch(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("agent.engine_host._LOOK_EVERY_S", 0.01)
    load = Loader()
    subject = host(world, load, unload_after_s=0.02)
    watcher = asyncio.create_task(subject.watch())
    async with subject.use():

        async def close() -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

        monkeypatch.setattr(load.engines[0], "close", close)
    while subject.state is HostState.READY:
        await asyncio.sleep(0.01)
    assert "an illegal memory access" in caplog.text
    assert not (world.root / "engine.json").exists()
    async with subject.use():
        assert len(load.engines) == 2
    async with asyncio.timeout(5):
        while not load.engines[1].closed:
            await asyncio.sleep(0.01)
    assert not watcher.done()
    watcher.cancel()


async def test_a_failed_load_is_told_and_tried_again(world: World) -> None:
    load = Loader()
    load.error = ModelCorruptError("broken")
    subject = host(world, load)
    with pytest.raises(ModelCorruptError):
        async with subject.use():
            pass
    assert subject.state is HostState.FAILED
    assert str(subject.error) == "broken"
    load.error = None
    async with subject.use():
        assert subject.state is HostState.READY
        assert subject.error is None


class Tree:
    """What a loader had in hand; it refers to itself, as module trees do."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("error", [ModelCorruptError("broken"), RemoteError("refused", 503), ValueError("odd")])
async def test_a_failed_load_leaves_nothing_in_memory(world: World, error: Exception) -> None:
    trees: list[weakref.ref[Tree]] = []
    gc.disable()  # or it might come by at the right time
    try:

        async def load(model: LocalModel) -> Engine:
            del model
            tree = Tree()
            trees.append(weakref.ref(tree))
            try:
                raise KeyError(7)
            except KeyError:
                raise type(error)(*error.args)  # noqa: B904 - the other one is its context

        subject = EngineHost(str(write_gguf(world.root / "m.gguf")), load, guard(world.root), unload_after_s=0)
        with pytest.raises(TabwiseError) as told:
            async with subject.use():
                pass
        assert [tree() for tree in trees] == [None]
    finally:
        gc.enable()
    assert subject.error is not None
    assert subject.error.__traceback__ is subject.error.__context__ is None
    assert str(subject.error) == str(told.value)


async def test_a_model_that_is_not_here(world: World) -> None:
    subject = EngineHost("starter", Loader(), guard(world.root), unload_after_s=0)
    with pytest.raises(ModelMissingError, match="models pull"):
        async with subject.use():
            pass


async def test_warming_tells_the_states(world: World) -> None:
    subject = host(world, Loader())
    assert [state async for state in subject.warm()] == [HostState.LOADING, HostState.READY]
    assert [state async for state in subject.warm()] == [HostState.READY]


async def test_a_model_that_is_not_understood_does_not_stay_in_memory(world: World) -> None:
    class Odd(FakeEngine):
        async def start_ids(self) -> tuple[int, ...]:
            raise OSError(5, "Input/output error")

    odd = Odd()

    async def load(model: LocalModel) -> Engine:
        del model
        return odd

    subject = EngineHost(str(write_gguf(world.root / "m.gguf")), load, guard(world.root), unload_after_s=0)
    with pytest.raises(EngineError, match="Input/output error"):
        async with subject.use():
            pass
    assert odd.closed
    assert subject.state is HostState.FAILED
    assert not (world.root / "engine.json").exists()


async def test_closing_in_the_middle_of_a_load_leaves_nothing_behind(world: World) -> None:
    load = Loader(0.05)
    subject = host(world, load)

    async def use() -> None:
        async with subject.use():
            pass

    task = asyncio.create_task(use())
    await asyncio.sleep(0.01)
    await subject.close()
    await task
    assert load.engines[0].closed
    assert not (world.root / "engine.json").exists()


async def test_a_model_folder_is_handed_to_the_loader_too(world: World) -> None:
    (world.root / "config.json").write_text("{}")
    found: list[LocalModel] = []

    async def load(model: LocalModel) -> Engine:
        found.append(model)
        return FakeEngine()

    subject = EngineHost(str(world.root), load, guard(world.root), unload_after_s=0)
    async with subject.use() as loaded:
        assert loaded.fim is None
    assert [(model.format, model.path) for model in found] == [("safetensors", world.root)]
