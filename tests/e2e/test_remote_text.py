"""A server that takes and gives text, the real model behind it: this project's own daemon, asked by a second one."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import STARTER_DIR, World

pytestmark = pytest.mark.e2e

CODE = "import os\n\n\ndef home():\n    return os.path.expand\n"


@pytest.fixture
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A daemon of another world that listens on TCP; yields its address and its token's file."""
    root = tmp_path_factory.mktemp("far")
    with tempfile.TemporaryDirectory(prefix="tw-") as runtime:
        config = root / "config.toml"
        moved = {
            "TABWISE_CONFIG": str(config),
            "TABWISE_DATA_DIR": str(root / "data"),
            "TABWISE_MODELS_DIR": str(STARTER_DIR),
            "TABWISE_RUNTIME_DIR": runtime,
        }
        config.write_text(f"[daemon]\ntcp_port = {free_port()}\n")
        process = subprocess.Popen([sys.executable, "-m", "agent.serve"], env=os.environ | moved)
        try:
            until = time.monotonic() + 20
            while not (Path(runtime) / "port").exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            yield f"http://127.0.0.1:{(Path(runtime) / 'port').read_text()}/v1", Path(runtime) / "token"
        finally:
            process.terminate()
            process.wait(10)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def configure(world: World, far: tuple[str, Path], **more: str) -> None:
    url, token = far
    lines = [f'url = "{url}"', f'token_file = "{token}"', *(f'{key} = "{value}"' for key, value in more.items())]
    world.config.write_text('[engine]\nkind = "remote"\n[remote]\n' + "\n".join(lines) + "\n")


def test_completions_and_explanations_come_from_there(world: World, far: tuple[str, Path]) -> None:
    configure(world, far)
    path = world.root / "a.py"
    path.write_text(CODE)
    done = world.run("complete", f"{path}:5:26")
    assert done.stdout.startswith("user"), done.stderr
    done = world.run("explain", f"{path}:4-5")
    assert done.stdout.startswith("The function `home`"), done.stderr
    found = json.loads(world.run("status", "--json").stdout)
    assert found["engine"]["kind"] == "remote"
    assert found["model"]["fim"] == "suffix"
    assert far[1].read_text() not in world.log


def test_the_doctor_says_where_text_goes_and_what_is_served(world: World, far: tuple[str, Path]) -> None:
    configure(world, far)
    findings = {each["topic"]: each for each in json.loads(world.run("doctor", "--json").stdout)}
    assert findings["engine"]["ok"]
    assert "with a token" in findings["engine"]["text"]
    assert "on this machine" in findings["privacy"]["text"]
    assert "starter by text" in findings["server"]["text"]
    far[1].chmod(0o644)
    findings = {each["topic"]: each for each in json.loads(world.run("doctor", "--json").stdout)}
    assert findings["engine"]["ok"] is False
    assert "chmod 600" in findings["engine"]["text"]


def test_the_doctor_says_that_a_server_is_away_and_that_text_would_leave(world: World) -> None:
    world.config.write_text('[engine]\nkind = "remote"\n[remote]\nurl = "http://192.0.2.1:8000"\nconnect_s = 0.3\n')
    done = world.run("doctor", "--json", timeout=30)
    findings = {each["topic"]: each for each in json.loads(done.stdout)}
    assert done.returncode == 1
    assert findings["server"]["ok"] is False
    assert "text leaves this machine: it is sent to 192.0.2.1:8000, unencrypted" in findings["privacy"]["text"]


def test_an_address_alone_sends_nothing(world: World, far: tuple[str, Path]) -> None:
    # Only `engine.kind` sends text away; what stands in [remote] is a plan.
    url, token = far
    world.config.write_text(f'[remote]\nurl = "{url}"\ntoken_file = "{token}"\n')
    done = world.run("complete", f"{__file__}:1:1")
    assert done.returncode == 1
    assert "tabwise models pull starter" in done.stderr
    (daemon,) = world.daemons()
    assert daemon.net_connections("inet") == []


def test_the_engine_of_one_daemon_is_chosen_by_hand(world: World, far: tuple[str, Path]) -> None:
    url, token = far
    world.config.write_text(f'[remote]\nurl = "{url}"\ntoken_file = "{token}"\n')
    process = subprocess.Popen([sys.executable, "-m", "agent.cli", "serve", "--engine", "remote"], env=world.env)
    try:
        until = time.monotonic() + 20
        while not (world.runtime / "daemon.sock").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        path = world.root / "a.py"
        path.write_text(CODE)
        assert world.run("complete", f"{path}:5:26").stdout.startswith("user")
    finally:
        process.terminate()
        process.wait(10)
    done = world.run("serve", "--engine", "nonesuch")
    assert done.returncode == 1
    assert done.stderr.startswith("tabwise: the engine kind")
    assert done.stderr.count("\n") == 1
