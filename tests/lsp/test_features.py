"""The real language server and the real daemon, with a FakeEngine in it: what an editor sees."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon, World
from tests.rpc import Rpc, RpcError

Start = Callable[..., Awaitable[Rpc]]

URI = "file:///work/main.py"
BODY = "def add(a, b):\n    retur\n"


async def test_a_completion_is_inserted_at_the_cursor(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    result = await rpc.initialize()
    assert "inlineCompletionProvider" in result["capabilities"]
    assert "completionProvider" not in result["capabilities"]
    assert result["capabilities"]["positionEncoding"] == "utf-16"
    rpc.open(URI, BODY)
    (item,) = await rpc.inline(URI, 1, 9)
    assert item["insertText"] == "n a + b"
    assert item["range"] == {"start": {"line": 1, "character": 9}, "end": {"line": 1, "character": 9}}


async def test_the_text_is_the_one_after_all_changes(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "def add(a, b):\n    \n")
    change = {"range": {"start": {"line": 1, "character": 4}, "end": {"line": 1, "character": 4}}, "text": "ret"}
    rpc.notify("textDocument/didChange", {"textDocument": {"uri": URI, "version": 2}, "contentChanges": [change]})
    (item,) = await rpc.inline(URI, 1, 7)
    assert item["insertText"] == "urn a + b"


async def test_a_closer_that_the_editor_inserted_is_replaced(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "def mul()\n")
    (item,) = await rpc.inline(URI, 0, 8)
    assert item["insertText"] == "a, b):"
    assert item["range"]["end"] == {"line": 0, "character": 9}


async def test_an_entry_that_is_selected_in_the_editors_list_is_continued(
    fake_daemon: StartDaemon, server: Start
) -> None:
    fake_daemon()
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "def add(a, b):\n    re\n")
    chosen = {"range": {"start": {"line": 1, "character": 4}, "end": {"line": 1, "character": 6}}, "text": "retur"}
    (item,) = await rpc.inline(URI, 1, 6, selectedCompletionInfo=chosen)
    assert item["insertText"] == "return a + b"
    assert item["range"] == chosen["range"]


async def test_a_selected_entry_of_several_lines_is_continued_behind_its_last_one(
    fake_daemon: StartDaemon, server: Start
) -> None:
    fake_daemon()
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "de\n")
    spot = {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": 2}}
    chosen = {"range": spot, "text": "def add(a, b):\n    retur"}
    (item,) = await rpc.inline(URI, 0, 2, selectedCompletionInfo=chosen)
    assert item["insertText"] == "def add(a, b):\n    return a + b"
    assert item["range"] == spot


async def test_line_ends_are_the_documents(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "# 𝄞 é\r\ndef add(a, b):\r\n    retur\r\n")
    (item,) = await rpc.inline(URI, 2, 9)
    assert item["insertText"] == "n a + b"
    assert item["range"]["start"] == {"line": 2, "character": 9}


@pytest.mark.parametrize(("encoding", "character"), [("utf-8", 12), ("utf-16", 10), ("utf-32", 9)])
async def test_positions_count_in_the_clients_units(
    fake_daemon: StartDaemon, server: Start, encoding: str, character: int
) -> None:
    fake_daemon()
    rpc = await server()
    result = await rpc.initialize(general={"positionEncodings": [encoding]})
    assert result["capabilities"]["positionEncoding"] == encoding
    rpc.open(URI, "x = '𝄞', \n")
    items = await rpc.inline(URI, 0, character)
    assert items[0]["range"]["start"] == {"line": 0, "character": character}


async def test_clients_without_inline_completion_get_a_list(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    result = await rpc.initialize(inline=False)
    assert "completionProvider" in result["capabilities"]
    rpc.open(URI, BODY)
    place = {"textDocument": {"uri": URI}, "position": {"line": 1, "character": 9}}
    answer = await rpc.request("textDocument/completion", place)
    (item,) = answer["items"]
    assert item["textEdit"]["newText"] == "n a + b"
    assert item["label"] == "n a + b"


async def test_the_latest_request_wins_and_frees_the_engine(
    fake_daemon: StartDaemon, server: Start, fake_world: World
) -> None:
    fake_daemon(FAKE_TOKEN_S="0.3")  # the slow one takes fourteen seconds, the other one three
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "# SLOW\nx = y\n")
    _, first = rpc.begin_inline(URI, 1, 5)
    await asyncio.sleep(1.5)
    rpc.open("file:///work/b.py", BODY)
    change = {"range": {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": 6}}, "text": "# fast"}
    rpc.notify("textDocument/didChange", {"textDocument": {"uri": URI, "version": 2}, "contentChanges": [change]})
    began = time.monotonic()
    (item,) = await rpc.inline(URI, 1, 5)
    assert (await first)["result"] is None
    assert item["insertText"].strip()
    assert time.monotonic() - began < 9


async def test_a_cancelled_request_is_answered_while_the_engine_decodes(
    fake_daemon: StartDaemon, server: Start, fake_world: World
) -> None:
    fake_daemon(FAKE_TOKEN_S="0.3")
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "# SLOW\nx = y\n")
    key, future = rpc.begin_inline(URI, 1, 5)
    await asyncio.sleep(1.5)
    assert not future.done()
    rpc.notify("$/cancelRequest", {"id": key})
    response = await asyncio.wait_for(future, 5)
    assert response["error"]["code"] == -32800
    await until_idle(fake_world)


async def until_idle(world: World) -> None:
    """Wait until the daemon has no open request: the cancel has reached it."""
    for _ in range(100):
        done = await asyncio.to_thread(world.run, "status", "--json")
        if json.loads(done.stdout).get("open_requests") == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the daemon is still at work")


async def test_settings_are_asked_for_and_their_problems_told_at_once(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    rpc.settings = {
        "completion": {"languages_off": ["python"], "speed": 1, "line_tokens": 2},
        "explain": {"max_tokens": "many"},
    }
    await rpc.initialize(workspace={"configuration": True})
    shown = (await rpc.until("window/showMessage"))["params"]["message"]
    assert "completion.speed" in shown
    assert "explain.max_tokens" in shown
    assert "completion.line_tokens: holds for every editor" in shown
    rpc.open(URI, BODY)
    assert await rpc.inline(URI, 1, 9) == []
    assert await rpc.inline(URI, 1, 9, triggerKind=1) != []
    rpc.settings = {"completion": {"languages_off": []}}
    rpc.notify("workspace/didChangeConfiguration", {"settings": None})
    await asyncio.sleep(0.3)
    assert await rpc.inline(URI, 1, 9) != []


async def test_settings_may_come_with_initialize(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    await rpc.initialize(options={"tabwise": {"completion": {"automatic": False}}})
    rpc.open(URI, BODY)
    assert await rpc.inline(URI, 1, 9) == []
    assert await rpc.inline(URI, 1, 9, triggerKind=1) != []


async def test_wrong_settings_in_the_file_are_shown_and_the_defaults_hold(fake_world: World, server: Start) -> None:
    fake_world.config.write_text(fake_world.config.read_text() + "[completion]\nspeed = 1\n")
    rpc = await server()
    await rpc.initialize()
    shown = (await rpc.until("window/showMessage"))["params"]["message"]
    assert "completion.speed: unknown key" in shown


async def test_notebooks_complete_with_the_other_cells_around(
    fake_daemon: StartDaemon, server: Start, fake_world: World
) -> None:
    fake_daemon()
    rpc = await server()
    await rpc.initialize()
    cells = [("nb:///n#1", "def add(a, b):"), ("nb:///n#2", "    retur")]
    rpc.notify(
        "notebookDocument/didOpen",
        {
            "notebookDocument": {
                "uri": "nb:///n",
                "notebookType": "jupyter-notebook",
                "version": 1,
                "cells": [{"kind": 2, "document": uri} for uri, _ in cells],
            },
            "cellTextDocuments": [
                {"uri": uri, "languageId": "python", "version": 1, "text": text} for uri, text in cells
            ],
        },
    )
    (item,) = await rpc.inline("nb:///n#2", 0, 9)
    assert item["insertText"] == "n a + b"
    added = {"uri": "nb:///n#3", "languageId": "python", "version": 1, "text": "    ret"}
    rpc.notify(
        "notebookDocument/didChange",
        {
            "notebookDocument": {"uri": "nb:///n", "version": 2},
            "change": {
                "cells": {
                    "structure": {
                        "array": {"start": 1, "deleteCount": 1, "cells": [{"kind": 2, "document": "nb:///n#3"}]},
                        "didOpen": [added],
                        "didClose": [{"uri": "nb:///n#2"}],
                    },
                    "textContent": [
                        {"document": {"uri": "nb:///n#1", "version": 2}, "changes": [{"text": "def sub(a, b):"}]}
                    ],
                }
            },
        },
    )
    (item,) = await rpc.inline("nb:///n#3", 0, 7)
    assert item["insertText"] == "urn a + b"
    assert await rpc.inline("nb:///n#2", 0, 0) == []


async def test_explain_is_offered_runs_and_streams(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon(FAKE_TOKEN_S="0.01")
    rpc = await server()
    result = await rpc.initialize()
    assert result["capabilities"]["executeCommandProvider"]["commands"] == ["tabwise.explain"]
    rpc.open(URI, "import os\n\n\ndef add(a, b):\n    # EXPLAIN\n    return a + b\n")
    place = {"line": 4, "character": 6}
    asked = {"textDocument": {"uri": URI}, "range": {"start": place, "end": place}, "context": {"diagnostics": []}}
    (action,) = await rpc.request("textDocument/codeAction", asked)
    assert action["title"] == "Explain"
    (argument,) = action["command"]["arguments"]
    argument["token"] = "stream-1"
    markdown = await rpc.request(
        "workspace/executeCommand", {"command": action["command"]["command"], "arguments": [argument]}
    )
    assert markdown == "The function `add(a, b)` adds two numbers.\n\n- `a`: the first"
    told = [
        message["params"]["value"]["text"]
        for message in rpc.notifications
        if message["method"] == "$/progress" and message["params"]["token"] == "stream-1"
    ]
    assert len(told) > 2
    assert told[-1] == markdown
    assert all(later.startswith(earlier.rstrip()) for earlier, later in pairwise(told))


async def test_an_explanation_can_be_cancelled(fake_daemon: StartDaemon, server: Start, fake_world: World) -> None:
    fake_daemon(FAKE_TOKEN_S="0.05")
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "x = 'SLOW'\n")
    argument = {"uri": URI, "range": {"start": {"line": 0, "character": 0}, "end": {"line": 1, "character": 0}}}
    key, future = rpc.begin("workspace/executeCommand", {"command": "tabwise.explain", "arguments": [argument]})
    await asyncio.sleep(1.5)
    rpc.notify("$/cancelRequest", {"id": key})
    assert (await asyncio.wait_for(future, 5))["error"]["code"] == -32800
    await until_idle(fake_world)


@pytest.mark.parametrize(
    "argument",
    [
        {"uri": "file:///none.py", "position": {"line": 0, "character": 0}},
        {"uri": URI},
        {"uri": URI, "position": {"line": "a"}},
        {"uri": URI, "position": {"line": 0, "character": 0}, "language": 3},
        {"uri": URI, "range": {"start": {"line": 1, "character": 0}, "end": {"line": 1, "character": 0}}},
    ],
)
async def test_wrong_arguments_are_refused(fake_world: World, server: Start, argument: dict[str, Any]) -> None:
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, "\n\n" if "range" in argument else "x = 1\n")
    with pytest.raises(RpcError) as caught:
        await rpc.request("workspace/executeCommand", {"command": "tabwise.explain", "arguments": [argument]})
    assert caught.value.code == -32602


async def test_loading_the_model_is_shown_to_clients_that_can_show_it(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    await rpc.initialize(window={"workDoneProgress": True})
    progress = await rpc.until("$/progress")
    assert progress["params"]["value"]["kind"] == "begin"
    async with asyncio.timeout(10):
        while [m["params"]["value"]["kind"] for m in rpc.notifications if m["method"] == "$/progress"] != [
            "begin",
            "end",
        ]:
            await asyncio.sleep(0.02)
    assert rpc.requests[0]["method"] == "window/workDoneProgress/create"


async def test_without_a_model_one_message_says_what_to_do(world: World, server: Start) -> None:
    rpc = await server()
    await rpc.initialize()
    shown = (await rpc.until("window/showMessage"))["params"]["message"]
    assert "tabwise models pull starter" in shown
    rpc.open(URI, BODY)
    assert await rpc.inline(URI, 1, 9) == []
    await asyncio.sleep(0.2)
    assert len([m for m in rpc.notifications if m["method"] == "window/showMessage"]) == 1


async def test_the_server_never_loads_torch_or_an_engine(
    fake_daemon: StartDaemon, server: Start, fake_world: World
) -> None:
    # Modules that leave a mark when they are imported stand in the way of the real ones, installed or not.
    heavy = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "xllamacpp", "numpy")
    stubs, marks = fake_world.root / "stubs", fake_world.root / "marks"
    stubs.mkdir()
    marks.mkdir()
    for name in heavy:
        (stubs / f"{name}.py").write_text(f"open({str(marks / name)!r}, 'w').close()\n")
    env = fake_world.env | {"PYTHONPATH": str(stubs)}
    subprocess.run([sys.executable, "-c", "import torch"], env=env, check=True)
    assert [path.name for path in marks.iterdir()] == ["torch"]  # the trap works
    (marks / "torch").unlink()
    fake_daemon()
    rpc = await server(PYTHONPATH=str(stubs))
    await rpc.initialize()
    rpc.open(URI, BODY + "# EXPLAIN\n")
    assert await rpc.inline(URI, 1, 9) != []
    place = {"uri": URI, "position": {"line": 0, "character": 4}}
    assert await rpc.request("workspace/executeCommand", {"command": "tabwise.explain", "arguments": [place]})
    await rpc.close()
    assert list(marks.iterdir()) == []


async def test_progress_is_shown_again_when_an_unloaded_model_comes_back(
    fake_daemon: StartDaemon, server: Start, fake_world: World
) -> None:
    fake_world.config.write_text(fake_world.config.read_text() + "[engine]\nunload_after_s = 1\n")
    fake_daemon()
    rpc = await server()
    await rpc.initialize(window={"workDoneProgress": True})
    rpc.open(URI, BODY)
    assert await rpc.inline(URI, 1, 9) != []
    async with asyncio.timeout(20):
        while (
            json.loads((await asyncio.to_thread(fake_world.run, "status", "--json")).stdout)["model"]["state"]
            == "ready"
        ):
            await asyncio.sleep(0.1)
        rpc.notifications.clear()
        assert await rpc.inline(URI, 1, 9, triggerKind=1) != []  # by key, since the answer to the other is known
        while len([m for m in rpc.notifications if m["method"] == "$/progress"]) < 2:
            await asyncio.sleep(0.02)


async def test_configuration_is_laid_over_the_options_of_the_start(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    rpc.settings = {}
    await rpc.initialize(options={"completion": {"automatic": False}}, workspace={"configuration": True})
    rpc.open(URI, BODY)
    await asyncio.sleep(1)
    assert await rpc.inline(URI, 1, 9) == []
    for settings, answered in (({"completion": {"automatic": True}}, True), (None, False)):
        rpc.settings = settings
        rpc.notify("workspace/didChangeConfiguration", {"settings": None})
        await asyncio.sleep(0.5)
        assert bool(await rpc.inline(URI, 1, 9)) is answered


async def test_a_daemon_that_cannot_start_is_not_tried_with_every_keystroke(fake_world: World, server: Start) -> None:
    fake_world.config.write_text("[engine]\nthreads = -1\n")
    rpc = await server()
    await rpc.initialize()
    await rpc.until("window/showMessage")
    rpc.open(URI, BODY)
    log = fake_world.root / "data" / "logs" / "start.log"
    assert await rpc.inline(URI, 1, 9) == []
    tried = log.stat().st_mtime_ns
    for _ in range(5):
        assert await rpc.inline(URI, 1, 9) == []
    assert log.stat().st_mtime_ns == tried
    assert rpc.stderr.count(b"no completion: the daemon cannot start") >= 5


async def test_a_client_that_never_answers_is_not_waited_for(fake_daemon: StartDaemon, server: Start) -> None:
    fake_daemon()
    rpc = await server()
    rpc.mute = True
    await rpc.initialize(workspace={"configuration": True}, window={"workDoneProgress": True})
    rpc.open(URI, BODY)
    assert (await rpc.inline(URI, 1, 9))[0]["insertText"] == "n a + b"
    assert {request["method"] for request in rpc.requests} <= {
        "workspace/configuration",
        "window/workDoneProgress/create",
    }


async def test_explain_is_not_offered_to_who_wants_other_kinds(fake_world: World, server: Start) -> None:
    rpc = await server()
    await rpc.initialize()
    rpc.open(URI, BODY)
    place = {"line": 0, "character": 0}
    asked = {"textDocument": {"uri": URI}, "range": {"start": place, "end": place}}
    assert (
        await rpc.request(
            "textDocument/codeAction", asked | {"context": {"diagnostics": [], "only": ["source.fixAll"]}}
        )
        == []
    )


@pytest.mark.parametrize(
    ("ignored", "exclude", "says"),
    [("", [], "elsewhere"), ("helpers.py", [], "value = 1"), ("", ["helpers.*"], "value = 1")],
)
async def test_a_prompt_holds_what_is_imported_unless_it_is_ignored_or_excluded(
    fake_daemon: StartDaemon, server: Start, tmp_path: Path, ignored: str, exclude: list[str], says: str
) -> None:
    fake_daemon()
    folder = tmp_path / "project"
    (folder / ".git").mkdir(parents=True)
    (folder / ".gitignore").write_text(f"{ignored}\n")
    (folder / "helpers.py").write_text("def compute(ELSEWHERE):\n    return ELSEWHERE\n")
    rpc = await server()
    await rpc.initialize(root=folder.as_uri(), options={"completion": {"exclude": exclude}})
    uri = (folder / "main.py").as_uri()
    rpc.open(uri, "from helpers import compute\n\n\n")
    await rpc.inline(uri, 2, 0)
    await asyncio.sleep(2.0)  # the pause in which the long prompt is read
    for version, letter in enumerate("bcd", 2):
        at = {"line": 2, "character": version - 2}
        change = {"range": {"start": at, "end": at}, "text": letter}
        rpc.notify(
            "textDocument/didChange", {"textDocument": {"uri": uri, "version": version}, "contentChanges": [change]}
        )
    (item,) = await rpc.inline(uri, 2, 3)
    assert item["insertText"] == says
