"""The real daemon process with a FakeEngine in it, over its socket and over TCP."""

import asyncio
import json
import os
import re
import socket
import stat
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agent import base_facts, catalog, fim
from agent.client import DaemonClient
from agent.errors import AdapterError, DaemonError, DaemonGoneError, InputError, RequestError
from agent.types import Completion, CompletionRequest, Document, Explanation, ExplanationRequest
from tests.conftest import StartDaemon, World


def request(prefix: str = "def add(a, b):\n    retur", suffix: str = "\n") -> CompletionRequest:
    return CompletionRequest(uuid.uuid4().hex, Document("file:///a.py", 3, "a.py", "python"), prefix, suffix)


@pytest.fixture
def http(fake_world: World) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(fake_world.runtime / "daemon.sock"))
    with httpx.Client(transport=transport, base_url="http://tabwise", timeout=20) as client:
        yield client


async def complete(client: DaemonClient, asked: CompletionRequest) -> Completion:
    async with aclosing(client.complete(asked)) as stream:
        async for part in stream:
            if isinstance(part, Completion):
                return part
    raise AssertionError("no completion")


async def test_a_completion_and_its_facts(fake_daemon: StartDaemon) -> None:
    fake_daemon()
    async with DaemonClient() as client:
        asked = request()
        completion = await complete(client, asked)
        assert (completion.id, completion.text) == (asked.id, "n a + b")
        facts = await client.generation(asked.id)
        assert facts.completion_id == asked.id
        assert facts.prompt_ids
        assert len(facts.output_ids) == len(facts.output_logps)
        with pytest.raises(RequestError):
            await client.generation("nonesuch")
        status = await client.status()
        assert status["served"]["completions"] == 1
        assert status["open_requests"] == 0
        assert status["model"]["state"] == "ready"
        assert status["last_activity"] > 0


async def test_a_client_that_goes_away_cancels_its_generation(fake_daemon: StartDaemon) -> None:
    fake_daemon(FAKE_TOKEN_S="0.02")
    async with DaemonClient() as client:
        for kind in ("explain", "complete"):
            asked: Any = (
                ExplanationRequest("e", "a.py", "python", "x = 'SLOW'")
                if kind == "explain"
                else request("# SLOW\n" + "if x:\n    ", "\n")
            )
            task = asyncio.create_task(drain(getattr(client, kind)(asked)))
            await asyncio.sleep(0.7)
            assert (await client.status())["open_requests"] == 1
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # The engine is free at once: the slow one would have gone on for eight seconds.
            began = time.monotonic()
            assert (await complete(client, request())).text == "n a + b"
            assert time.monotonic() - began < 3
            assert (await client.status())["open_requests"] == 0


async def drain(stream: Any) -> list[Any]:
    async with aclosing(stream):
        return [part async for part in stream]


async def test_a_completion_is_served_in_the_middle_of_an_explanation(fake_daemon: StartDaemon) -> None:
    fake_daemon(FAKE_TOKEN_S="0.02")
    async with DaemonClient() as client:
        long = asyncio.create_task(
            drain(client.explain(ExplanationRequest("e", "a.py", "python", "x = 'SLOW'", max_tokens=100)))
        )
        await asyncio.sleep(0.7)
        assert (await complete(client, request())).text == "n a + b"
        assert not long.done()
        parts = await long
        assert isinstance(parts[-1], Explanation)
        assert parts[-1].markdown.count("x") >= 100


async def test_nothing_of_a_text_is_logged(fake_daemon: StartDaemon, fake_world: World, http: httpx.Client) -> None:
    fake_world.config.write_text(fake_world.config.read_text() + '[log]\nlevel = "debug"\n')
    fake_daemon()
    secret = "TOP-SECRET"
    async with DaemonClient() as client:
        await complete(client, request(f"# {secret}\ndef add(a, b):\n    retur"))
        await drain(client.explain(ExplanationRequest("e", "a.py", "python", f"x = '{secret} EXPLAIN'")))
    http.post("/tabwise/complete", json={"prefix": secret})
    http.post("/v1/completions", json={"prompt": secret, "n": secret})
    assert "completion" in fake_world.log
    assert secret not in fake_world.log


def test_the_socket_is_its_owners_alone(fake_daemon: StartDaemon, fake_world: World) -> None:
    fake_daemon()
    assert stat.S_IMODE(fake_world.runtime.stat().st_mode) == 0o700
    for path in fake_world.runtime.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_nothing_listens_on_the_network_unless_asked(fake_daemon: StartDaemon) -> None:
    process = fake_daemon()
    assert psutil.Process(process.pid).net_connections("inet") == []


@pytest.fixture
def tcp(fake_world: World, fake_daemon: StartDaemon) -> tuple[int, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fake_world.config.write_text(fake_world.config.read_text() + f"[daemon]\ntcp_port = {port}\n")
    process = fake_daemon()
    until = time.monotonic() + 10
    while not (fake_world.runtime / "port").exists() and time.monotonic() < until:
        time.sleep(0.02)
    listening = [one.laddr for one in psutil.Process(process.pid).net_connections("inet") if one.status == "LISTEN"]
    assert [tuple(one) for one in listening] == [("127.0.0.1", port)]
    return port, (fake_world.runtime / "token").read_text()


def test_tcp_wants_the_token_and_this_machines_name(tcp: tuple[int, str]) -> None:
    port, token = tcp
    base = f"http://127.0.0.1:{port}"
    good = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{base}/healthz").status_code == 401
    assert httpx.get(f"{base}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert httpx.post(f"{base}/shutdown").status_code == 401
    assert httpx.get(f"{base}/healthz", headers=good | {"Host": "evil.example"}).status_code == 421
    answer = httpx.get(f"{base}/healthz", headers=good | {"Origin": "https://evil.example"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "server" not in answer.headers


def test_openai_completions(fake_daemon: StartDaemon, http: httpx.Client) -> None:
    fake_daemon()
    body = {"model": "tabwise", "prompt": "def add(a, b):\n    retur", "suffix": "\n", "max_tokens": 50}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == "n a + b\n"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 8
    stopped = http.post("/v1/completions", json=body | {"stop": [" +", "zzz"]}).json()
    assert stopped["choices"][0]["text"] == "n a"
    short = http.post("/v1/completions", json=body | {"max_tokens": 3}).json()
    assert (short["choices"][0]["text"], short["choices"][0]["finish_reason"]) == ("n a", "length")
    plain = http.post("/v1/completions", json={"prompt": "anything"}).json()
    assert plain["choices"][0]["text"] == "value = 1\n"


def test_openai_streams(fake_daemon: StartDaemon, http: httpx.Client) -> None:
    fake_daemon()
    body = {"prompt": "def add(a, b):\n    retur", "suffix": "\n", "stream": True, "stop": "\n"}
    chunks = events(http, "/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "n a + b"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "EXPLAIN"}]}], "stream": True}
    chunks = events(http, "/v1/chat/completions", chat)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).startswith(" adds two")
    whole = http.post("/v1/chat/completions", json=chat | {"stream": False}).json()
    assert whole["choices"][0]["message"]["content"].startswith(" adds two")
    models = http.get("/v1/models").json()
    assert len(models["data"]) == 1


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b"{"),
        ("/v1/completions", b"{}"),
        ("/v1/completions", b'{"prompt": "x", "n": 2}'),
        ("/v1/completions", b'{"prompt": "x", "model": "gpt-4"}'),
        ("/v1/chat/completions", b'{"messages": []}'),
        ("/tabwise/complete", b"[]"),
        ("/tabwise/explain", b'{"id": 3}'),
        ("/tabwise/complete", b"x" * (5 << 20)),
    ],
)
def test_requests_that_do_not_fit_are_refused(
    fake_daemon: StartDaemon, http: httpx.Client, path: str, body: bytes
) -> None:
    fake_daemon()
    answer = http.post(path, content=body)
    assert answer.status_code == 400
    assert "\n" not in answer.json()["error"]["message"]


def test_a_second_daemon_does_not_start(fake_daemon: StartDaemon, fake_world: World) -> None:
    fake_daemon()
    done = fake_world.run("serve")
    assert done.returncode == 1
    assert "runs already" in done.stderr


async def test_status_and_stop(fake_daemon: StartDaemon, fake_world: World) -> None:
    assert json.loads(fake_world.run("status", "--json").stdout) == {"running": False}
    assert "no daemon runs" in fake_world.run("stop").stdout
    process = fake_daemon()
    assert json.loads(fake_world.run("status", "--json").stdout)["pid"] == process.pid
    assert fake_world.run("stop").stdout.strip() == "stopped"
    assert process.wait(10) == 0
    left = {path.name for path in fake_world.runtime.iterdir()}
    assert not left & {"daemon.sock", "port", "token"}
    async with DaemonClient() as client:
        with pytest.raises(DaemonGoneError):
            await client.status()


def test_an_open_request_does_not_hold_the_end(fake_daemon: StartDaemon, fake_world: World) -> None:
    process = fake_daemon(FAKE_TOKEN_S="0.2")

    async def ask() -> None:
        async with DaemonClient() as client:
            with pytest.raises(DaemonError):
                await drain(client.explain(ExplanationRequest("e", "a.py", "python", "x = 'SLOW'")))

    async def run() -> None:
        task = asyncio.create_task(ask())
        await asyncio.sleep(1)
        done = await asyncio.to_thread(fake_world.run, "stop")
        assert done.stdout.strip() == "stopped"
        await task

    asyncio.run(run())
    assert process.wait(10) == 0


async def test_a_daemon_of_another_version_is_replaced_when_it_is_idle(
    fake_daemon: StartDaemon, fake_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fake_daemon(FAKE_TOKEN_S="0.02")
    async with DaemonClient() as client:
        await client.ensure_daemon()
        assert old.poll() is None
        monkeypatch.setattr("agent.client.__version__", "9.9.9")
        busy = asyncio.create_task(
            drain(client.explain(ExplanationRequest("e", "a.py", "python", "x = 'SLOW'", max_tokens=100)))
        )
        await asyncio.sleep(0.7)
        with pytest.raises(DaemonError, match="is at work"):
            await client.ensure_daemon()
        await busy
        assert old.poll() is None
        await client.ensure_daemon()
        assert old.wait(10) == 0
        health = await client.health()
        assert health is not None
        assert health["pid"] != old.pid


def test_why_a_daemon_cannot_start_is_told(fake_world: World) -> None:
    fake_world.config.write_text("[daemon]\ntcp_port = 1\n[engine]\nthreads = -1\n")
    done = fake_world.run("explain", __file__)
    assert done.returncode == 1
    assert re.fullmatch(r"tabwise: .*engine\.threads.*\n", done.stderr)
    fake_world.config.unlink()
    (fake_world.runtime / "daemon.sock").mkdir()
    done = fake_world.run("complete", f"{Path(__file__)}:1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("tabwise: the daemon cannot start")


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_come_near(fake_daemon: StartDaemon, fake_world: World) -> None:
    fake_daemon()
    script = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "runtime = sys.argv[1]\n"
        "for what in (lambda: os.listdir(runtime),\n"
        "             lambda: socket.socket(socket.AF_UNIX).connect(runtime + '/daemon.sock')):\n"
        "    try:\n"
        "        what()\n"
        "    except PermissionError:\n"
        "        print('refused')\n"
    )
    done = subprocess.run(
        ["python3", "-c", script, str(fake_world.runtime)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["refused", "refused"], done.stderr


async def test_odd_characters_travel_whole(fake_daemon: StartDaemon) -> None:
    fake_daemon()
    async with DaemonClient() as client:
        completion = await complete(client, request("# \ud83d \u2028 \x85\ndef add(a, b):\n    retur"))
        assert completion.text == "n a + b"
        parts = await drain(client.explain(ExplanationRequest("e", "a.py", "python", "x = 'ODD'")))
        assert "\u2028and\x85" in parts[-1].markdown
        with pytest.raises(InputError, match="holds secrets"):
            await drain(client.explain(ExplanationRequest("e", "prod/.env", "plaintext", "KEY=1")))


def test_a_whole_answer_that_nobody_waits_for_any_more_frees_the_engine(
    fake_daemon: StartDaemon, http: httpx.Client
) -> None:
    fake_daemon(FAKE_TOKEN_S="0.05")
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})  # the model is loaded
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={"prompt": "SLOW", "max_tokens": 400}, timeout=0.5)
    began = time.monotonic()
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert time.monotonic() - began < 5  # of twenty that the other one takes


async def test_adapters_are_served_and_refused_by_name(
    fake_daemon: StartDaemon, fake_world: World, http: httpx.Client
) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed; make train-deps")
    from tests.adapter_folders import write_adapter

    facts = base_facts.of(catalog.find(str(fake_world.root / "fake.gguf")), fim.FORMATS["qwen"])
    mine, foreign = write_adapter(fake_world.root / "mine", facts=facts), write_adapter(fake_world.root / "foreign")
    fake_daemon()
    async with DaemonClient() as client:
        assert await client.adapters() == {"completion": None, "explanation": None}
        with pytest.raises(AdapterError, match="foreign is refused"):
            await client.serve_adapters({"completion": str(foreign)})
        with pytest.raises(RequestError, match="absolute"):
            await client.serve_adapters({"completion": "mine"})
        with pytest.raises(RequestError):
            await client.serve_adapters({"nonesuch": str(mine)})
        found = await client.serve_adapters({"completion": str(mine)})
        assert found["completion"] is not None
        name = found["completion"]["name"]
        completion = await complete(client, asked := request())
        assert completion.adapter == (await client.generation(asked.id)).adapter == name
        assert (await client.status())["adapters"] == found == await client.adapters()
        parts = await drain(client.explain(ExplanationRequest("e", "a.py", "python", "x = 'EXPLAIN'")))
        assert parts[-1].adapter is None
    assert http.post("/v1/completions", json={"prompt": "x = "}).status_code == 200
    listed = fake_world.run("adapters", "list")
    assert listed.stdout == f"completion: {name} from {mine}\nexplanation: the bare model\n"
    assert name in fake_world.run("status").stdout.replace("\n", "")
    refused = fake_world.run("adapters", "serve", str(foreign))
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    both = fake_world.run("adapters", "serve", str(mine), "--task", "explanation", "--json")
    assert {task: each["name"] for task, each in json.loads(both.stdout).items()} == {
        "completion": name,
        "explanation": name,
    }
    none = fake_world.run("adapters", "none", "--task", "completion", "--task", "explanation")
    assert none.stdout == "completion: the bare model\nexplanation: the bare model\n"
