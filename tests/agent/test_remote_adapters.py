"""Adapters of a remote server as the daemon serves them: by its own route, against FakeVllm; the folders are real."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from agent import base_facts, catalog, engine_choice, fim
from agent.catalog import LocalModel
from agent.config import EngineSettings, RemoteSettings, Settings
from agent.crash_guard import CrashGuard
from agent.daemon import Daemon, create_app
from agent.engine_choice import EngineLoader
from agent.engine_host import EngineHost
from agent.engines.base import Task
from agent.errors import AdapterError
from agent.served_adapters import ServedAdapters
from agent.types import CompletionRequest, Document
from agent.wire import plain
from tests.adapter_folders import write_adapter
from tests.conftest import World
from tests.fakes import FakeVllm, scripted
from tests.fault_server import MODEL, FaultServer, status
from tests.gguf_files import write_gguf

pytest.importorskip("safetensors", reason="safetensors is not installed; make train-deps")
pytest.importorskip("numpy", reason="numpy is not installed; make train-deps")


@pytest.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as made:
        yield made


class Remote:
    """A daemon whose model is on a server, and a client of its routes."""

    def __init__(self, world: World, server: FaultServer, base: str, unload_after_s: float = 0) -> None:
        remote = RemoteSettings(url=server.url, base=base, first_s=5.0, between_s=5.0)
        settings = Settings(remote=remote, engine=EngineSettings(kind="remote"))
        self.loader = EngineLoader(settings, world.runtime)
        self.host = EngineHost(
            engine_choice.model_name(settings),
            self.loader.load,
            CrashGuard(world.root),
            unload_after_s=unload_after_s,
            find=lambda _: engine_choice.find(settings),
        )
        self.served = ServedAdapters(
            self.host, world.root / "adapters.json", partial(engine_choice.adapters_base, settings)
        )
        app = create_app(Daemon(settings, self.host, self.served, lambda: None))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://daemon")

    async def serve(self, folder: Path | None) -> httpx.Response:
        return await self.http.put("/tabwise/adapters", json={"completion": str(folder) if folder else None})

    async def complete(self, prefix: str = "def add(a, b):\n    retur") -> str:
        asked = CompletionRequest("1", Document("file:///a.py", 1, "a.py", "python"), prefix, "\n")
        return (await self.http.post("/tabwise/complete", json=plain(asked))).text

    async def close(self) -> None:
        await self.http.aclose()
        await self.host.close()


@pytest.fixture
def base(world: World) -> Path:
    return write_gguf(world.root / "base.gguf")


def adapter(world: World, base: Path, name: str = "mine") -> Path:
    model = LocalModel(str(base), base, "gguf", None, 0, "")
    return write_adapter(world.root / name, facts=base_facts.of(model, fim.FORMATS["qwen"]))


async def test_an_adapter_is_served_through_the_daemon(world: World, server: FaultServer, base: Path) -> None:
    fake = FakeVllm(server, scripted)
    remote = Remote(world, server, str(base))
    answer = await remote.serve(adapter(world, base))
    assert answer.status_code == 200, answer.text
    name = answer.json()["completion"]["name"]
    assert fake.adapters == {name: str(world.root / "mine")}
    assert "n a + b" in await remote.complete()
    assert server.bodies("/v1/completions")[-1]["model"] == name
    assert (await remote.serve(None)).status_code == 200
    await remote.complete()
    assert server.bodies("/v1/completions")[-1]["model"] == MODEL
    await remote.close()


async def test_one_for_another_base_is_refused(world: World, server: FaultServer, base: Path) -> None:
    fake = FakeVllm(server, scripted)
    remote = Remote(world, server, str(base))
    answer = await remote.serve(write_adapter(world.root / "foreign"))
    assert answer.status_code >= 400
    assert "made for the base model" in answer.text
    assert fake.adapters == {}
    await remote.close()


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("", "remote.base is not set"),
        ("starter", "tabwise models pull starter"),
        ("no-such", "unknown model 'no-such'"),
    ],
)
async def test_a_base_that_is_not_here_is_named(
    world: World, server: FaultServer, base: Path, named: str, told: str
) -> None:
    FakeVllm(server, scripted)
    remote = Remote(world, server, named)
    with pytest.raises(AdapterError, match=r"remote\.base") as caught:
        await remote.served.serve({Task.COMPLETION: adapter(world, base)})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    await remote.close()


def test_a_model_that_is_here_is_its_own_base(base: Path) -> None:
    model = catalog.find(str(base))
    assert engine_choice.adapters_base(Settings(), model) is model


async def test_an_adapter_stays_while_nobody_types_and_goes_at_the_daemons_end(
    world: World, server: FaultServer, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.engine_host._LOOK_EVERY_S", 0.01)
    fake = FakeVllm(server, scripted)
    remote = Remote(world, server, str(base), unload_after_s=0.02)
    watching = asyncio.create_task(remote.host.watch())
    await remote.serve(adapter(world, base))
    await asyncio.sleep(0.3)
    assert len(fake.adapters) == 1
    assert remote.host.loaded is not None
    assert server.bodies("/v1/unload_lora_adapter") == []
    watching.cancel()
    await remote.close()
    assert fake.adapters == {}


async def test_an_adapter_that_the_server_lost_is_loaded_once_more(
    world: World, server: FaultServer, base: Path
) -> None:
    fake = FakeVllm(server, scripted)
    remote = Remote(world, server, str(base))
    name = (await remote.serve(adapter(world, base))).json()["completion"]["name"]
    fake.adapters.clear()  # it was started anew
    assert "n a + b" in await remote.complete()
    assert list(fake.adapters) == [name]
    assert server.bodies("/v1/completions")[-1]["model"] == name
    assert remote.host.loads == 1
    fake.adapters.clear()
    server.usual["/v1/load_lora_adapter"] = status(500)
    assert f"the adapter {name!r} is not served" in await remote.complete("def add(a, b):\n    ret")
    await remote.close()
