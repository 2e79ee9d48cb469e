"""The real language server and the real daemon, with a remote server behind it that fails in every way."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count, repeat
from typing import Any

import pytest

from tests.conftest import World
from tests.fault_server import Behaviour, FaultServer, cut_after, drip, hang, hang_after, raw, status, texts
from tests.rpc import Rpc, RpcError

Start = Callable[..., Awaitable[Rpc]]

URI = "file:///work/main.py"
BODY = "def add(a, b):\n    retur\n"
SECRET = "sk-very-secret"
PATIENCE_S = 1.0
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
VERSIONS = count(2)


@pytest.fixture
async def remote(world: World) -> AsyncIterator[FaultServer]:
    """A server of text that this world's daemon is told to use."""
    async with FaultServer() as made:
        made.usual |= {COMPLETIONS: texts("    return a", " + b\n"), CHATS: texts(" adds", " two numbers.")}
        token = world.root / "token"
        token.write_text(SECRET)
        token.chmod(0o600)
        world.config.write_text(
            '[engine]\nkind = "remote"\n[log]\nlevel = "debug"\n'
            f'[remote]\nurl = "{made.url}"\ntoken_file = "{token}"\n'
            f"connect_s = 0.5\nfirst_s = {PATIENCE_S}\nbetween_s = {PATIENCE_S}\n"
        )
        yield made


async def begun(server: Start) -> Rpc:
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, BODY)
    return rpc


def change(rpc: Rpc, text: str) -> None:
    spot = {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": 0}}
    content = {
        "textDocument": {"uri": URI, "version": next(VERSIONS)},
        "contentChanges": [{"range": spot, "text": text}],
    }
    rpc.notify("textDocument/didChange", content)


async def explain(rpc: Rpc, line: int) -> Any:
    place = {"uri": URI, "position": {"line": line, "character": 0}}
    return await rpc.request(
        "workspace/executeCommand", {"command": "tabwise.explain", "arguments": [place]}, timeout=20
    )


async def test_a_completion_and_an_explanation_from_elsewhere(world: World, remote: FaultServer, server: Start) -> None:
    rpc = await begun(server)
    (item,) = await rpc.inline(URI, 1, 9)
    assert item["insertText"] == "n a + b"
    assert "adds two numbers." in await explain(rpc, 0)
    assert {one.headers["authorization"] for one in remote.asked} == {f"Bearer {SECRET}"}
    (daemon,) = world.daemons()
    assert {
        line.rpartition("/")[2] for line in (each.path for each in daemon.memory_maps()) if "torch" in line
    } == set()
    assert not [each.path for each in daemon.memory_maps() if "xllamacpp" in each.path]
    found = json.loads((await asyncio.to_thread(world.run, "status", "--json")).stdout)
    assert found["engine"]["kind"] == "remote"
    assert found["engine"]["text_leaves_machine"] is False
    assert SECRET not in world.log + rpc.stderr.decode()


FAULTS: dict[str, Behaviour] = {
    "the token is refused": status(401, f"wrong key {SECRET}"),
    "the server fails": status(500, "def add(a, b)"),
    "it is busy": status(429),
    "it hangs before the headers": hang,
    "it hangs behind the headers": hang_after(),
    "it hangs in the middle": hang_after("    re"),
    "it keeps the connection open with comments": drip(repeat(b": still here\n\n"), 0.1),
    "it sends single bytes": drip((b"%c" % sign for sign in b"data: " + b"x" * 10_000), 0.1),
    "it sends broken JSON": drip([b"data: {no\n\n"], 0),
    "it closes the connection in the middle": cut_after("    re"),
    "it sends on": status(302, Location="http://127.0.0.1:1/"),
    "it sends without end": drip(repeat(b"data: " + b"x" * 65536 + b"\n"), 0),
    "it speaks something else": raw(b"SSH-2.0-OpenSSH\r\n\r\n"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_the_editor_keeps_working(world: World, remote: FaultServer, server: Start, name: str) -> None:
    rpc = await begun(server)
    (item,) = await rpc.inline(URI, 1, 9)
    assert item["insertText"] == "n a + b"
    good = dict(remote.usual)
    remote.usual |= {COMPLETIONS: FAULTS[name], CHATS: FAULTS[name]}
    change(rpc, "# one\n")
    began = time.monotonic()
    assert await rpc.inline(URI, 2, 9) == []
    with pytest.raises(RpcError) as caught:
        await explain(rpc, 1)
    assert time.monotonic() - began < 2 * (PATIENCE_S + 1.5)
    assert "\n" not in str(caught.value)
    assert str(remote.port) in str(caught.value)
    # The documents go on changing meanwhile, and the server says what it always says.
    change(rpc, "# two\n")
    place = {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": 0}}
    actions = await rpc.request(
        "textDocument/codeAction",
        {"textDocument": {"uri": URI}, "range": place, "context": {"diagnostics": []}},
        timeout=2,
    )
    assert [action["title"] for action in actions] == ["Explain"]
    remote.usual = good
    change(rpc, "# three\n")
    (item,) = await rpc.inline(URI, 4, 9)
    assert item["insertText"] == "n a + b"
    assert "adds two numbers." in await explain(rpc, 3)
    assert remote.bodies(COMPLETIONS)[-1]["prompt"].startswith("# three\n# two\n# one\n")
    assert len(world.daemons()) == 1
    written = world.log + rpc.stderr.decode()
    assert SECRET not in written
    assert "def add" not in written


async def test_a_server_that_is_away_at_first_and_comes_later(remote: FaultServer, server: Start) -> None:
    await remote.stop()
    rpc = await begun(server)
    began = time.monotonic()
    assert await rpc.inline(URI, 1, 9, triggerKind=1) == []
    assert time.monotonic() - began < 10  # the daemon's own start included
    with pytest.raises(RpcError, match="cannot be reached"):
        await explain(rpc, 0)
    await remote.listen()
    (item,) = await rpc.inline(URI, 1, 9, triggerKind=1)
    assert item["insertText"] == "n a + b"


async def test_typing_on_past_a_server_that_hangs_is_answered_at_once(remote: FaultServer, server: Start) -> None:
    rpc = await begun(server)
    assert await rpc.inline(URI, 1, 9)
    remote.usual[COMPLETIONS] = hang
    change(rpc, "# one\n")
    key, future = rpc.begin_inline(URI, 2, 9)
    await asyncio.sleep(0.3)
    rpc.notify("$/cancelRequest", {"id": key})
    began = time.monotonic()
    response = await asyncio.wait_for(future, 5)
    assert time.monotonic() - began < 0.5
    assert response["error"]["code"] == -32800
    async with asyncio.timeout(PATIENCE_S + 2):
        while remote.open:
            await asyncio.sleep(0.02)
