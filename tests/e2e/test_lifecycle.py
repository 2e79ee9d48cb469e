"""Daemons that are started, killed and crashed, with the real model."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import World, count
from tests.rpc import Rpc

pytestmark = pytest.mark.e2e

Start = Callable[..., Awaitable[Rpc]]
URI = "file:///work/main.py"
CODE = "import os\n\n\ndef home():\n    return os.path.expand\n"


def test_twenty_processes_that_start_at_once_make_one_daemon(real_world: World) -> None:
    script = (
        "import asyncio\n"
        "from agent.client import DaemonClient\n"
        "async def main():\n"
        "    async with DaemonClient() as client:\n"
        "        await client.ensure_daemon()\n"
        "        print((await client.status())['pid'])\n"
        "asyncio.run(main())\n"
    )
    for _ in range(count(10)):
        processes = [
            subprocess.Popen([sys.executable, "-c", script], env=real_world.env, stdout=subprocess.PIPE, text=True)
            for _ in range(20)
        ]
        pids = {process.communicate(timeout=120)[0].strip() for process in processes}
        assert len(pids) == 1
        assert pids != {""}
        assert [str(process.pid) for process in real_world.daemons()] == list(pids)
        real_world.end()


async def test_a_daemon_killed_in_the_middle_of_a_request(real_world: World, server: Start) -> None:
    # A prompt so long that reading it takes seconds, on fast machines too.
    real_world.config.write_text("[engine]\ncontext_tokens = 16384\n[completion]\nprefix_tokens = 6000\n")
    rpc = await server()
    await rpc.initialize()
    filler = "".join(f"value_{number} = compute({number}, 'x' * {number})\n" for number in range(600))
    rpc.open(URI, CODE)
    rpc.open("file:///work/long.py", filler)
    assert (await rpc.inline(URI, 4, 25))[0]["insertText"].startswith("user")
    for round_number in range(count(20)):
        change = {
            "range": {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": 0}},
            "text": f"# {round_number}\n",
        }
        version = {"uri": "file:///work/long.py", "version": round_number + 2}
        rpc.notify("textDocument/didChange", {"textDocument": version, "contentChanges": [change]})
        _, future = rpc.begin_inline("file:///work/long.py", 550, 8, triggerKind=1)
        await asyncio.sleep(1.0)
        assert not future.done()
        (daemon,) = real_world.daemons()
        daemon.send_signal(signal.SIGKILL)
        began = time.monotonic()
        response = await asyncio.wait_for(future, 10)
        assert time.monotonic() - began < 1
        assert response["result"] is None
        # The document is still what it was, and a new daemon serves it: at its end it is changed, so that no answer is
        # known.
        end = {"line": CODE.count("\n"), "character": 0}
        change = {"range": {"start": end, "end": end}, "text": f"# {round_number}\n"}
        version = {"uri": URI, "version": round_number + 2}
        rpc.notify("textDocument/didChange", {"textDocument": version, "contentChanges": [change]})
        assert (await rpc.inline(URI, 4, 25))[0]["insertText"].startswith("user")
        (after,) = real_world.daemons()
        assert after.pid != daemon.pid
    assert b"no completion: the daemon broke off" in rpc.stderr


async def test_a_daemon_that_ended_between_two_requests_is_not_noticed(real_world: World, server: Start) -> None:
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, CODE)
    assert await rpc.inline(URI, 4, 25)
    assert real_world.run("stop").returncode == 0
    # By key, since the answer to the other is known.
    assert (await rpc.inline(URI, 4, 25, triggerKind=1))[0]["insertText"].startswith("user")
    assert len(real_world.daemons()) == 1


def test_a_crash_of_native_code_is_survived_until_it_happens_too_often(real_world: World) -> None:
    path = real_world.root / "a.py"
    path.write_text(CODE)
    for _ in range(3):
        assert real_world.run("complete", f"{path}:5:26").stdout.startswith("user")
        (daemon,) = real_world.daemons()
        daemon.send_signal(signal.SIGSEGV)
        psutil.wait_procs([daemon], 10)
    done = real_world.run("complete", f"{path}:5:26")
    assert done.returncode == 1
    assert "set aside" in done.stderr
    assert "tabwise models retry starter" in done.stderr
    assert real_world.run("models", "retry", "starter").returncode == 0
    assert real_world.run("complete", f"{path}:5:26").stdout.startswith("user")
    assert "Segmentation fault" in real_world.log


def test_a_quiet_model_leaves_memory_and_comes_back(real_world: World) -> None:
    real_world.config.write_text("[engine]\nunload_after_s = 1\n")
    path = real_world.root / "a.py"
    path.write_text(CODE)
    assert real_world.run("complete", f"{path}:5:26").stdout.startswith("user")
    (daemon,) = real_world.daemons()
    full = daemon.memory_info().rss
    for _ in range(100):
        status = json.loads(real_world.run("status", "--json").stdout)
        if status["model"]["state"] == "unloaded":
            break
        time.sleep(0.1)
    assert status["model"]["state"] == "unloaded"
    assert daemon.memory_info().rss < full - 200_000_000
    assert real_world.run("complete", f"{path}:5:26").stdout.startswith("user")
    assert json.loads(real_world.run("status", "--json").stdout)["model"]["loads"] == 2
    assert [one.pid for one in real_world.daemons()] == [daemon.pid]


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="a network namespace of one's own takes root")
def test_without_any_route_everything_works_once_the_model_is_here(real_world: World) -> None:
    if subprocess.run(["unshare", "--net", "true"], check=False).returncode != 0:
        pytest.skip("this system does not allow network namespaces")
    path = real_world.root / "a.py"
    path.write_text(CODE)
    command = ["unshare", "--net", sys.executable, "-m", "agent.cli", "complete", f"{path}:5:26"]
    done = subprocess.run(command, env=real_world.env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("user"), done.stderr
    (daemon,) = real_world.daemons()
    assert daemon.net_connections("inet") == []
    routes = Path(f"/proc/{daemon.pid}/net/route").read_text()
    assert len(routes.splitlines()) <= 1  # the heading, at most


def test_nothing_connects_to_another_machine(real_world: World) -> None:
    path = real_world.root / "a.py"
    path.write_text(CODE)
    assert real_world.run("complete", f"{path}:5:26").stdout.startswith("user")
    (daemon,) = real_world.daemons()
    assert daemon.net_connections("inet") == []
