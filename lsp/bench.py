"""Benchmarks of the language server: `tabwise bench start`, `tabwise bench cancel`; `overhead` is in `overhead.py`.

Each prints one JSON object; ratios are measured side by side, turn by turn, in one run. Real processes only.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcRequestCancelled
from pygls.lsp.client import LanguageClient

from agent.errors import TabwiseError

RUNS = 10

_INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"processId": None, "rootUri": None, "capabilities": {"textDocument": {"inlineCompletion": {}}}},
}
_CODE = "def answer(question):\n    return question\n\n\n" * 60
_DECODING_S = 1.5  # into a request for many tokens: prefill of this prompt is over, decoding goes on for seconds


def start() -> dict[str, Any]:
    """Measure the time from the start of the process to the answer to `initialize`, ours beside a bare server's."""
    times: dict[str, list[float]] = {"lsp.bare_server": [], "lsp.server": []}
    for _ in range(RUNS + 1):  # the first turn warms the disk's cache and is not counted
        for module, found in times.items():
            found.append(_time_initialize(module))
    bare, ours = (statistics.median(found[1:]) for found in times.values())
    return {"initialize_ms": round(ours, 1), "bare_ms": round(bare, 1), "ratio": round(ours / bare, 3), "runs": RUNS}


def _time_initialize(module: str) -> float:
    body = json.dumps(_INITIALIZE).encode()
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        process.stdin.flush()
        process.stdout.readline()
        return (time.perf_counter() - began) * 1000
    finally:
        process.kill()
        process.communicate()


async def cancel() -> dict[str, Any]:
    """Measure how soon a cancelled request is answered while the engine decodes for it."""
    client = LanguageClient("tabwise-bench", "1")

    @client.feature(types.PROGRESS)
    def progress(params: types.ProgressParams) -> None:
        del params

    await client.start_io(sys.executable, "-m", "lsp.server", "--log-level", "error")
    capabilities = types.ClientCapabilities(
        text_document=types.TextDocumentClientCapabilities(inline_completion=types.InlineCompletionClientCapabilities())
    )
    await client.initialize_async(types.InitializeParams(capabilities=capabilities, process_id=None, root_uri=None))
    client.initialized(types.InitializedParams())
    uri = "file:///bench.py"
    client.text_document_did_open(types.DidOpenTextDocumentParams(types.TextDocumentItem(uri, "python", 0, _CODE)))
    explain = {"uri": uri, "range": _whole(_CODE)}
    # Warms the model, so that what is cancelled below is decoding and not loading.
    await client.workspace_execute_command_async(types.ExecuteCommandParams("tabwise.explain", [explain]))
    times = []
    for number in range(RUNS):
        request = client.protocol.send_request_async(
            types.WORKSPACE_EXECUTE_COMMAND,
            types.ExecuteCommandParams("tabwise.explain", [explain]),
            msg_id=f"b{number}",
        )
        await asyncio.sleep(_DECODING_S)
        if request.done():
            continue  # the explanation was shorter than the wait: nothing was cancelled
        began = time.perf_counter()
        client.cancel_request(types.CancelParams(f"b{number}"))
        try:
            await request
        except JsonRpcRequestCancelled:
            times.append((time.perf_counter() - began) * 1000)
    await client.shutdown_async(None)
    client.exit(None)
    await client.stop()
    if not times:
        return {"runs": 0}
    return {"cancel_ms": round(statistics.median(times), 1), "worst_ms": round(max(times), 1), "runs": len(times)}


def _whole(text: str) -> dict[str, Any]:
    return {"start": {"line": 0, "character": 0}, "end": {"line": text.count("\n"), "character": 0}}


if __name__ == "__main__":
    from lsp.overhead import overhead

    benchmarks: dict[str, Callable[[], dict[str, Any]]] = {
        "start": start,
        "cancel": lambda: asyncio.run(cancel()),
        "overhead": overhead,
    }
    try:
        sys.stdout.write(json.dumps(benchmarks[sys.argv[1]]()) + "\n")
    except TabwiseError as error:
        sys.exit(f"tabwise: {error}")
