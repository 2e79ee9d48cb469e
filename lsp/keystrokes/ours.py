"""Our side: the real language server and a daemon of its own, in a world of their own.

Plays the editor as VS Code does: with each key, the request in flight is cancelled, the change is told, and ghost text
is asked for. An answer is shown only if it is for exactly the text that is there, and only if it fits that text.
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
from lsprotocol import types
from pygls.exceptions import JsonRpcException, JsonRpcRequestCancelled
from pygls.lsp.client import LanguageClient

from agent import paths
from agent.client import DaemonClient
from agent.errors import DaemonError
from agent.version import __version__
from lsp.keystrokes.editor import Change, Editor, Kind
from lsp.keystrokes.figures import Work
from lsp.keystrokes.screen import Screen
from lsp.keystrokes.trace import Key

_LAST_ANSWER_S = 10.0  # for requests that are open at the end; the engine needs one, all others were cancelled
_END_S = 10.0  # for the daemon to end, as `tabwise stop` waits


@contextlib.contextmanager
def world(model: str, new_tokens: int) -> Iterator[None]:
    """Give this process, and those that it starts, directories and settings of their own; the models stay."""
    with tempfile.TemporaryDirectory(prefix="tw-") as root:  # short, for sockets' paths
        settings = Path(root, "config.toml")
        settings.write_text(
            f"[model]\nname = {json.dumps(model)}\n"
            f"[completion]\nline_tokens = {new_tokens}\nblock_tokens = {new_tokens}\n",
            encoding="utf-8",
        )
        moved = {
            "TABWISE_MODELS_DIR": str(paths.models_dir()),
            "TABWISE_CONFIG": str(settings),
            "TABWISE_DATA_DIR": str(Path(root, "data")),
            "TABWISE_RUNTIME_DIR": str(Path(root, "run")),
        }
        before = {name: os.environ.get(name) for name in moved}
        os.environ.update(moved)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


class Ours:
    """The language server in an editor."""

    def __init__(self, file: Path, language: str) -> None:
        """Prepare for a file; nothing is started yet."""
        self.screen = Screen()
        self._uri = file.absolute().as_uri()
        self._folder = file.absolute().parent.as_uri()
        self._language = language
        self._version = 0
        self._position: dict[str, int] = {"line": 0, "character": 0}
        self._before = ""  # the cursor's line before the cursor, and what is behind it, for items' ranges
        self._behind = ""
        self._text = ""
        self._flying: list[str] = []  # requests for the text as it is
        self._requests: dict[str, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked = 0
        self._unfit = 0
        self._typed = ""  # by the latest key
        self._client: Any = LanguageClient("tabwise-keystrokes", __version__)
        self._started = False
        self._daemon: DaemonClient | None = None
        self._processes: list[psutil.Process] = []
        self._cpu_s = 0.0
        self._work: dict[str, Any] = {}
        self._failure: JsonRpcException | None = None

    async def open(self, editor: Editor) -> None:
        """Start the processes, open the document and have the model loaded."""
        client = self._client
        client.feature("tabwise/refresh")(lambda params: self._refresh(params))
        client.feature(types.PROGRESS)(lambda params: None)
        client.feature(types.WINDOW_SHOW_MESSAGE)(lambda params: None)
        await client.start_io(sys.executable, "-m", "lsp.server", "--log-level", "error")
        self._started = True
        await client.initialize_async(self._initialize_params())
        client.initialized(types.InitializedParams())
        self._look(editor)
        item = types.TextDocumentItem(self._uri, self._language, self._version, editor.text)
        client.text_document_did_open(types.DidOpenTextDocumentParams(item))
        self._daemon = DaemonClient()
        await self._daemon.ensure_daemon()
        async with aclosing(self._daemon.warm()) as states:
            async for _ in states:
                pass
        status = await self._daemon.status()
        # Ours alone: other editors may have children of this process, too.
        self._processes = [psutil.Process(client._server.pid), psutil.Process(status["pid"])]
        self._work, self._cpu_s = status["work"], cpu_seconds(self._processes)

    def reopen(self, file: Path, language: str, editor: Editor) -> None:
        """Close the document and open another one, in the same language server."""
        for name in self._flying:
            self._client.cancel_request(types.CancelParams(name))
        self._flying.clear()
        self.screen.ghost = ""
        gone = types.TextDocumentIdentifier(self._uri)
        self._client.text_document_did_close(types.DidCloseTextDocumentParams(gone))
        # The version goes on: answers to what was asked before are told by it.
        self._uri, self._language, self._version = file.absolute().as_uri(), language, self._version + 1
        self._typed = ""
        self._look(editor)
        item = types.TextDocumentItem(self._uri, language, self._version, editor.text)
        self._client.text_document_did_open(types.DidOpenTextDocumentParams(item))

    def _initialize_params(self) -> types.InitializeParams:
        capabilities = types.ClientCapabilities(
            text_document=types.TextDocumentClientCapabilities(
                inline_completion=types.InlineCompletionClientCapabilities()
            ),
            experimental={"tabwise": {"refresh": True}},
        )
        return types.InitializeParams(
            capabilities=capabilities,
            process_id=os.getpid(),
            root_uri=self._folder,
            workspace_folders=[types.WorkspaceFolder(self._folder, "keystrokes")],
        )

    def press(self, key: Key, change: Change | None, editor: Editor) -> None:
        """Tell the server what an editor tells it."""
        for name in self._flying:
            if not self._requests[name].done():
                self._client.cancel_request(types.CancelParams(name))
        self._flying.clear()
        self._typed = key.text if key.kind is Kind.CHARACTER else ""
        text = self._text
        self._look(editor)
        if change is None:
            params = {"textDocument": {"uri": self._uri}, "position": self._position}
            self._client.protocol.notify("tabwise/cursor", params)
            return
        self._version += 1
        span = types.Range(_position(text, change.start), _position(text, change.end))
        self._client.text_document_did_change(
            types.DidChangeTextDocumentParams(
                types.VersionedTextDocumentIdentifier(self._version, self._uri),
                [types.TextDocumentContentChangePartial(span, change.text)],
            )
        )
        self._asked += 1
        self._ask()

    def _look(self, editor: Editor) -> None:
        self._text = editor.text
        self._before = editor.line_before
        self._behind = editor.text[editor.cursor :].split("\n", 1)[0]
        place = _position(editor.text, editor.cursor)
        self._position = {"line": place.line, "character": place.character}

    def _ask(self) -> None:
        name = f"k{len(self._requests)}"
        params = types.InlineCompletionParams(
            context=types.InlineCompletionContext(types.InlineCompletionTriggerKind.Automatic),
            text_document=types.TextDocumentIdentifier(self._uri),
            position=types.Position(**self._position),
        )
        method = types.TEXT_DOCUMENT_INLINE_COMPLETION
        self._flying.append(name)
        self._requests[name] = self._client.protocol.send_request_async(method, params, msg_id=name)
        task = asyncio.create_task(self._show(self._requests[name], self._version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _show(self, request: asyncio.Future[Any], version: int) -> None:
        try:
            answer = await request
        except JsonRpcRequestCancelled:  # by the key that came next
            return
        except JsonRpcException as error:
            self._failure = error
            return
        if version != self._version:
            return
        items = answer.items if isinstance(answer, types.InlineCompletionList) else answer or []
        ghost = self._ghost(items[0]) if items else ""
        self._unfit += ghost is None or is_stale(ghost, self.screen.found, self._typed)
        self.screen.show(ghost or "")

    def _refresh(self, params: Any) -> None:
        is_ours = params.textDocument.uri == self._uri and params.textDocument.version == self._version
        if self._started and is_ours:  # one that comes while the server ends would never be answered
            self._ask()

    def _ghost(self, item: types.InlineCompletionItem) -> str | None:
        return ghost_text(item, self._position["line"], self._before, self._behind)

    async def finish(self) -> Work:
        """Wait for the last answers, and return what was done."""
        open_requests = [request for request in self._requests.values() if not request.done()]
        if open_requests:
            await asyncio.wait(open_requests, timeout=_LAST_ANSWER_S)
        if self._failure is not None:
            raise DaemonError(f"the language server failed at a request: {self._failure}; see {paths.log_dir()}")
        assert self._daemon is not None
        work = (await self._daemon.status())["work"]
        spent = {kind: {name: work[kind][name] - self._work[kind][name] for name in work[kind]} for kind in work}
        return Work(
            cpu_s=cpu_seconds(self._processes) - self._cpu_s,
            requests=self._asked,
            prompt_tokens=spent["typing"]["prompt_tokens"],
            decoded_tokens=spent["typing"]["decoded_tokens"],
            ahead_prompt_tokens=spent["ahead"]["prompt_tokens"],
            ahead_decoded_tokens=spent["ahead"]["decoded_tokens"],
            unfit=self._unfit,
            unanswered=sum(not request.done() for request in self._requests.values()),
        )

    async def close(self) -> None:
        """End the language server and the daemon."""
        await self.end_server()
        await self.end_daemon()

    async def end_server(self) -> None:
        """End the language server alone: while one of another editor lives, it starts a daemon that is missing."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._started:
            self._started = False
            with contextlib.suppress(JsonRpcException, TimeoutError):
                await asyncio.wait_for(self._client.shutdown_async(None), _END_S)
            self._client.exit(None)
            await self._client.stop()

    async def end_daemon(self) -> None:
        """End the daemon, and kill what has not ended by then."""
        if self._daemon is not None:
            async with self._daemon as daemon:
                if await daemon.health() is not None:
                    await daemon.shutdown()
                    await daemon.wait_until_gone(_END_S)
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU time that some processes and their children have taken so far, user and system.

    Raises:
        DaemonError: One of them has ended.
    """
    try:
        family = {one for parent in processes for one in (parent, *parent.children(recursive=True))}
        times = [one.cpu_times() for one in family]
    except psutil.NoSuchProcess as gone:
        raise DaemonError(f"process {gone.pid} ended during the measurement; see: tabwise doctor") from None
    return sum(one.user + one.system + one.children_user + one.children_system for one in times)


def ghost_text(item: types.InlineCompletionItem, line: int, before: str, behind: str) -> str | None:
    """The text of an item that an editor shows at the cursor; None where the item does not fit what is there.

    Args:
        item: What the server sent.
        line: The cursor's line.
        before: That line before the cursor.
        behind: That line behind the cursor.
    """
    text = item.insert_text if isinstance(item.insert_text, str) else item.insert_text.value
    if item.range is None:
        return text
    start, end = item.range.start, item.range.end
    if (start.line, end.line) != (line, line):
        return None
    cursor = _units(before)
    replaced = before.encode("utf-16-le")[2 * start.character :].decode("utf-16-le", errors="replace")
    taken = behind.encode("utf-16-le")[: 2 * (end.character - cursor)].decode("utf-16-le", errors="replace")
    if start.character > cursor or end.character < cursor or end.character > cursor + _units(behind):
        return None
    if not text.startswith(replaced):
        return None
    ghost = text[len(replaced) :]
    if taken and ghost.endswith(taken):
        return ghost[: -len(taken)]  # it stands there already
    rest = iter(ghost)
    return ghost if all(character in rest for character in taken) else None


def is_stale(ghost: str, seen: str, typed: str) -> bool:
    """Tell whether ghost text is the one from before a key that was its beginning: its rest should stand there.

    A text of one character over and over may come again and fit.
    """
    return bool(typed) and seen.startswith(typed) and ghost == seen and len(set(seen)) > 1


def _position(text: str, offset: int) -> types.Position:
    return types.Position(text.count("\n", 0, offset), _units(text[text.rfind("\n", 0, offset) + 1 : offset]))


def _units(text: str) -> int:
    """Length in UTF-16 code units, the protocol's default."""
    return len(text.encode("utf-16-le")) // 2
