"""Raw bytes against the real server process: whatever is sent, a request is answered and the server stays."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.conftest import StartDaemon, World, count
from tests.rpc import Rpc, RpcError, inline_params

Start = Callable[..., Awaitable[Rpc]]

PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, NOT_INITIALIZED = -32700, -32600, -32601, -32602, -32002


async def initialized(server: Start, **env: str) -> Rpc:
    rpc = await server(**env)
    await rpc.initialize()
    return rpc


async def error_code(rpc: Rpc, method: str, params: Any) -> int:
    with pytest.raises(RpcError) as caught:
        await rpc.request(method, params, timeout=10)
    code: int = caught.value.code
    return code


async def no_id_error(rpc: Rpc, body: bytes) -> int:
    before = len(rpc.errors)
    rpc.send_raw(body)
    async with asyncio.timeout(10):
        while len(rpc.errors) == before:
            await asyncio.sleep(0.01)
    code: int = rpc.errors[-1]["error"]["code"]
    return code


async def test_messages_that_would_hang_a_client_get_an_error(fake_world: World, server: Start) -> None:
    rpc = await initialized(server)
    wrong = inline_params("file:///a.py", 0, 0)
    wrong["context"]["triggerKind"] = 0
    assert await error_code(rpc, "textDocument/inlineCompletion", wrong) == INVALID_PARAMS
    assert await error_code(rpc, "textDocument/inlineCompletion", None) == INVALID_PARAMS
    assert await error_code(rpc, "textDocument/inlineCompletion", 3) == INVALID_PARAMS
    assert await error_code(rpc, "no/such", {}) == NO_METHOD
    nested = {"uri": "file:///a.py", "jsonrpc": "2.0", "id": 1, "method": "initialize"}
    assert (
        await error_code(rpc, "workspace/executeCommand", {"command": "tabwise.explain", "arguments": [nested]})
        == INVALID_PARAMS
    )
    assert await error_code(rpc, "workspace/executeCommand", {"command": "other"}) == INVALID_PARAMS
    assert (
        await error_code(rpc, "initialize", {"capabilities": {}, "processId": None, "rootUri": None}) == INVALID_REQUEST
    )


async def test_a_method_without_any_params_is_answered(fake_world: World, server: Start) -> None:
    rpc = await initialized(server)
    _, future = rpc.begin("x", None)
    assert (await asyncio.wait_for(future, 10))["error"]["code"] == NO_METHOD
    rpc.send({"jsonrpc": "2.0", "id": "plain", "method": "no/params"})
    rpc.send({"jsonrpc": "2.0", "id": "also", "method": "textDocument/inlineCompletion"})
    async with asyncio.timeout(10):
        while len(rpc.errors) < 2:
            await asyncio.sleep(0.01)
    assert {message["id"]: message["error"]["code"] for message in rpc.errors} == {
        "plain": NO_METHOD,
        "also": INVALID_PARAMS,
    }


async def test_what_is_no_message_gets_an_error_without_an_id(fake_world: World, server: Start) -> None:
    rpc = await initialized(server)
    assert await no_id_error(rpc, b"{") == PARSE_ERROR
    assert await no_id_error(rpc, b"\xff\xfe\x00") == PARSE_ERROR
    assert await no_id_error(rpc, b"[" * 100_000) == PARSE_ERROR
    for body in (
        b"[]",
        b"3",
        b"null",
        b'"x"',
        b"{}",
        b'{"jsonrpc": "1.0", "method": "x"}',
        b'{"jsonrpc": "2.0", "id": 1}',
    ):
        assert await no_id_error(rpc, body) == INVALID_REQUEST
    for bad_id in ("true", "1.5", "null", "{}", "[1]"):
        assert (
            await no_id_error(rpc, b'{"jsonrpc": "2.0", "method": "x", "id": %s}' % bad_id.encode()) == INVALID_REQUEST
        )
    rpc.open("file:///a.py", "")
    assert await rpc.request("textDocument/codeAction", code_action("file:///a.py")) != []


async def test_before_initialize_and_after_shutdown_requests_are_refused(fake_world: World, server: Start) -> None:
    rpc = await server()
    assert await error_code(rpc, "textDocument/inlineCompletion", inline_params("a", 0, 0)) == NOT_INITIALIZED
    rpc.open("file:///a.py", "")
    await rpc.initialize()
    await rpc.request("shutdown", None)
    assert await error_code(rpc, "textDocument/inlineCompletion", inline_params("a", 0, 0)) == INVALID_REQUEST
    rpc.notify("exit", None)
    assert await asyncio.wait_for(rpc.process.wait(), 10) == 0


async def test_the_end_of_the_input_ends_the_server(fake_world: World, server: Start) -> None:
    rpc = await initialized(server)
    assert rpc.process.stdin
    rpc.process.stdin.close()
    await asyncio.wait_for(rpc.process.wait(), 10)


async def test_nothing_of_a_document_is_logged(fake_daemon: StartDaemon, fake_world: World, server: Start) -> None:
    fake_world.config.write_text(fake_world.config.read_text() + '[log]\nlevel = "debug"\n')
    fake_daemon()
    rpc = await server("--log-level", "debug")
    await rpc.initialize()
    secret = "TOP-SECRET-TEXT"
    rpc.open("file:///a.py", f"# {secret} EXPLAIN\ndef add(a, b):\n    retur\n")
    assert await rpc.inline("file:///a.py", 2, 9) != []
    place = {"uri": "file:///a.py", "range": {"start": {"line": 0, "character": 0}, "end": {"line": 3, "character": 0}}}
    assert await rpc.request("workspace/executeCommand", {"command": "tabwise.explain", "arguments": [place]})
    rpc.notify(
        "textDocument/didChange",
        {"textDocument": {"uri": "file:///b.py", "version": 2}, "contentChanges": [{"text": secret}]},
    )
    rpc.notify("textDocument/didChange", {"textDocument": secret, "contentChanges": secret})
    rpc.notify("textDocument/didOpen", {"textDocument": {"uri": secret, "text": secret}})
    rpc.send({"jsonrpc": "2.0", "id": 5, "method": "textDocument/inlineCompletion", "params": {"position": secret}})
    with pytest.raises(RpcError):
        await rpc.request("workspace/executeCommand", {"command": "tabwise.explain", "arguments": [{"uri": secret}]})
    await rpc.close()
    assert b"refused a message" in rpc.stderr
    assert secret.encode() not in rpc.stderr
    assert "completion" in fake_world.log
    assert "explanation" in fake_world.log
    assert secret not in fake_world.log


async def test_random_and_broken_messages_leave_the_server_answering(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await initialized(server)
    rng = random.Random(20)
    rpc.open("file:///probe.py", "def f():\n    pass\n")
    due: dict[str, bytes] = {}
    for number in range(count(2000)):
        body, msg_id = random_message(rng, number)
        rpc.send_raw(body)
        if msg_id is not None:
            due[msg_id] = body
        if number % 50 == 0:
            assert await rpc.request("textDocument/codeAction", code_action("file:///probe.py"), timeout=30) != []
    assert await rpc.request("textDocument/codeAction", code_action("file:///probe.py"), timeout=30) != []
    # Whatever was a request has been answered, with a result or an error.
    for _ in range(200):
        unanswered = due.keys() - {message.get("id") for message in rpc.errors}
        if not unanswered:
            break
        await asyncio.sleep(0.05)
    assert [due[one] for one in unanswered] == []
    assert await rpc.close() == 0


def code_action(uri: str) -> dict[str, Any]:
    place = {"line": 0, "character": 0}
    return {"textDocument": {"uri": uri}, "range": {"start": place, "end": place}, "context": {"diagnostics": []}}


METHODS = (
    "textDocument/didOpen textDocument/didChange textDocument/didClose textDocument/codeAction notebookDocument/didOpen "
    "notebookDocument/didChange notebookDocument/didClose workspace/executeCommand workspace/didChangeConfiguration "
    "textDocument/inlineCompletion textDocument/completion initialize workspace/didChangeWorkspaceFolders $/cancelRequest $/setTrace window/workDoneProgress/cancel initialized x/y"
).split()


def random_message(rng: random.Random, number: int) -> tuple[bytes, str | None]:
    """Return a message's body, and the id under which an answer is due, if one is."""
    kind = rng.random()
    if kind < 0.15:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 60))), None
    if kind < 0.25:
        return json.dumps(random_value(rng, 3)).encode(), None
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": rng.choice(METHODS), "params": random_params(rng)}
    msg_id = None
    if rng.random() < 0.5:
        # A string id of its own, so that its answer is told apart from all others.
        msg_id = message["id"] = f"fuzz-{number}"
    if kind < 0.4:
        key = rng.choice(list(message))
        if key == "id":
            msg_id = None
        message[key] = random_value(rng, 2)
    body = json.dumps(message).encode()
    if kind < 0.5:
        return body[: rng.randrange(1, len(body))], None
    return body, msg_id


def random_params(rng: random.Random) -> Any:
    uri = rng.choice(["file:///a.py", "file:///b.py", "nb:///n#1", ""])
    place = {"line": rng.randrange(-1, 9), "character": rng.randrange(-1, 9)}
    shapes: list[Any] = [
        {"textDocument": {"uri": uri, "languageId": "python", "version": 1, "text": "a\nb\r\n𝄞"}},
        {
            "textDocument": {"uri": uri, "version": 2},
            "contentChanges": [{"range": {"start": place, "end": place}, "text": "é\n"}],
        },
        {"textDocument": {"uri": uri}, "position": place, "context": {"triggerKind": 1}},
        {"textDocument": {"uri": uri}},
        {"id": f"fuzz-{rng.randrange(2000)}"},
        {"command": "tabwise.explain", "arguments": [random_value(rng, 2)]},
        {"settings": random_value(rng, 2)},
        {
            "notebookDocument": {
                "uri": "nb:///n",
                "version": 1,
                "notebookType": "j",
                "cells": [{"kind": 2, "document": "nb:///n#1"}],
            },
            "cellTextDocuments": [],
        },
        {
            "notebookDocument": {"uri": "nb:///n", "version": 1},
            "change": {"cells": {"structure": {"array": {"start": 0, "deleteCount": 5}}}},
        },
    ]
    return rng.choice([*shapes, random_value(rng, 3)])


def random_value(rng: random.Random, depth: int) -> Any:
    leaf = [
        None,
        True,
        0,
        -1,
        2**53,
        1.5,
        "",
        "file:///a.py",
        "2.0",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ]
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(leaf)
    if rng.random() < 0.5:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    keys = ["jsonrpc", "id", "method", "params", "uri", "range", "position", "tabwise", "textDocument"]
    return {rng.choice(keys): random_value(rng, depth - 1) for _ in range(rng.randrange(4))}
