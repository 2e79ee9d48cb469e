"""Worlds of their own for tests: no test touches the user's settings, sockets or state."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from agent import catalog, paths
from tests.gguf_files import write_gguf
from tests.rpc import Rpc

SOAK = os.environ.get("TABWISE_SOAK") == "1"
STARTER_DIR = paths.models_dir()
"""Where `make model` has put the starter model: read before any test moves the directories."""


def count(full: int) -> int:
    """The number of rounds of a long test: all of them under `make soak`, a tenth otherwise."""
    return full if SOAK else max(1, full // 10)


@dataclass
class World:
    """Directories, environment and processes of one test."""

    root: Path
    runtime: Path
    env: dict[str, str]

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def log(self) -> str:
        file = self.root / "data" / "logs" / "daemon.log"
        return file.read_text() if file.exists() else ""

    def run(self, *arguments: str, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the command `tabwise`."""
        command = [sys.executable, "-m", "agent.cli", *arguments]
        return subprocess.run(
            command, env=self.env | more, capture_output=True, text=True, timeout=timeout, check=False
        )

    def daemons(self) -> list[psutil.Process]:
        """The daemon processes of this world."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if line[-1:] in (["agent.serve"], ["tests.fake_daemon"]) and (
                    process.environ().get("TABWISE_RUNTIME_DIR") == str(self.runtime)
                ):
                    found.append(process)
        return found

    def end(self) -> None:
        for process in self.daemons():
            with suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(self.daemons(), 5)
        for process in alive:
            process.kill()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world without a model; in this process, too."""
    # Sockets' paths must be short, and pytest's are not.
    with tempfile.TemporaryDirectory(prefix="tw-") as runtime:
        moved = {
            "TABWISE_CONFIG": str(tmp_path / "config.toml"),
            "TABWISE_DATA_DIR": str(tmp_path / "data"),
            "TABWISE_MODELS_DIR": str(tmp_path / "models"),
            "TABWISE_RUNTIME_DIR": runtime,
        }
        for name, value in moved.items():
            monkeypatch.setenv(name, value)
        made = World(tmp_path, Path(runtime), os.environ | moved)
        yield made
        made.end()


@pytest.fixture
def real_world(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world with the real starter model."""
    monkeypatch.setenv("TABWISE_MODELS_DIR", str(STARTER_DIR))
    world.env["TABWISE_MODELS_DIR"] = str(STARTER_DIR)
    if not catalog.is_pulled("starter"):
        pytest.fail("the starter model is not here; run: make model")
    return world


@pytest.fixture
def fake_world(world: World) -> World:
    """A world whose model is a file without weights, for daemons with a FakeEngine."""
    model = write_gguf(world.root / "fake.gguf")
    world.config.write_text(f'[model]\nname = "{model}"\n')
    return world


StartDaemon = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def fake_daemon(fake_world: World) -> Iterator[StartDaemon]:
    """Start the real daemon process with a FakeEngine."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(**env: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", "tests.fake_daemon"], env=fake_world.env | env)
        processes.append(process)
        until = time.monotonic() + 20
        while not (fake_world.runtime / "daemon.sock").exists():
            assert process.poll() is None, "the daemon ended at once"
            assert time.monotonic() < until, "the daemon did not come up"
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        process.terminate()
        process.wait(10)


@pytest.fixture
async def server(world: World) -> AsyncIterator[Callable[..., "asyncio.Future[Rpc]"]]:
    """Start language servers in this test's world."""
    running: list[Rpc] = []

    async def start(*arguments: str, **env: str) -> Rpc:
        rpc = await Rpc.start(world.env | env, *arguments)
        running.append(rpc)
        return rpc

    yield start  # type: ignore[misc]
    for rpc in running:
        await rpc.close()
