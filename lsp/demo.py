"""`make demo`: the real language server, over standard input and output, at real places of real code.

Plays the editor: opens files, takes a line or a body out, asks for a completion there, and shows it beside what the
author wrote; then asks for an explanation. Shows what it sees and judges nothing.
"""

import asyncio
import bisect
import fnmatch
import re
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lsprotocol import types
from pygls.lsp.client import LanguageClient
from rich.console import Console
from rich.markdown import Markdown
from rich.syntax import Syntax

from agent import subject
from agent.errors import TabwiseError
from agent.version import __version__
from lsp.features.explain import COMMAND

out = Console(highlight=False)

_START_S = 120  # to load the model; two seconds on a warm disk
_EXPLAIN_TOKENS = 200  # keeps the demonstration under half a minute on two cores
_ANSWER_S = 120  # for one answer on a slow machine


@dataclass(frozen=True, slots=True)
class _Place:
    """Where to complete: behind `before`, with the text up to `until` taken out."""

    title: str
    file: Path
    before: str
    until: str


def _source(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__)


def _places() -> list[_Place]:
    here = Path(__file__).parent.parent / "agent"
    return [
        _Place("an argument", _source(bisect), "        lo = bisect_right(a, key(x), ", ")"),
        _Place("the end of a line", here / "racing.py", "    async with aclosing", "\n"),
        _Place(
            "a body of our own", here / "paths.py", '    """Return the directory of log files."""\n    ', "\n\n\ndef "
        ),
        _Place("the middle of a word", _source(textwrap), "        chunks = self._split", "\n"),
    ]


def main() -> int:
    """Run the demonstration; with the name of a file, also draw what was shown into it, as SVG."""
    out.record = len(sys.argv) > 1
    started = time.perf_counter()
    try:
        asyncio.run(_demo())
    except (TabwiseError, TimeoutError) as error:
        Console(stderr=True).print(f"demo: {str(error) or 'no answer in time; see tabwise doctor'}", style="red")
        return 1
    if out.record:
        drawn = out.export_svg(title="make demo")
        # The font would be fetched from somebody's server by whoever looks at the picture; any monospaced one will do.
        Path(sys.argv[1]).write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")
    _next_steps(time.perf_counter() - started)
    return 0


async def _demo() -> None:
    out.print(f"[bold]Tabwise {__version__}[/bold]: the language server, asked over standard input and output\n")
    client = LanguageClient("tabwise-demo", __version__)
    ready = asyncio.Event()
    trouble: list[str] = []

    @client.feature(types.WINDOW_SHOW_MESSAGE)
    def show(params: types.ShowMessageParams) -> None:
        trouble.append(params.message)
        ready.set()

    @client.feature(types.WINDOW_WORK_DONE_PROGRESS_CREATE)
    async def create(params: types.WorkDoneProgressCreateParams) -> None:
        del params

    @client.feature(types.PROGRESS)
    def progress(params: types.ProgressParams) -> None:
        del params

    began = time.perf_counter()
    await client.start_io(sys.executable, "-m", "lsp.server", "--log-level", "error")
    await client.initialize_async(
        types.InitializeParams(
            capabilities=_capabilities(),
            process_id=None,
            root_uri=None,
            initialization_options={"explain": {"max_tokens": _EXPLAIN_TOKENS}},
        )
    )
    out.print(f"  server ready in {1000 * (time.perf_counter() - began):.0f} ms")
    client.initialized(types.InitializedParams())
    try:
        for place in _places():
            await asyncio.wait_for(_complete(client, place), _START_S + _ANSWER_S)
            if trouble:
                raise TabwiseError(trouble[0])
        await asyncio.wait_for(_explain(client, _source(fnmatch), "fnmatchcase"), _ANSWER_S)
    finally:
        await client.shutdown_async(None)
        client.exit(None)
        await client.stop()


def _capabilities() -> types.ClientCapabilities:
    return types.ClientCapabilities(
        text_document=types.TextDocumentClientCapabilities(
            inline_completion=types.InlineCompletionClientCapabilities()
        ),
        window=types.WindowClientCapabilities(work_done_progress=True),
    )


async def _complete(client: LanguageClient, place: _Place) -> None:
    text = place.file.read_text(encoding="utf-8")
    if place.before not in text:
        out.print(f"\n[dim]{place.file.name} of this Python has no such place, skipped: {place.before.strip()}[/dim]")
        return
    cut = text.index(place.before) + len(place.before)
    end = text.index(place.until, cut)
    before, was, behind = text[:cut], text[cut:end], text[end:]
    uri = place.file.as_uri()
    item = types.TextDocumentItem(uri, "python", 0, before + behind)
    client.text_document_did_open(types.DidOpenTextDocumentParams(item))
    line = before.count("\n")
    position = types.Position(line, cut - (before.rfind("\n") + 1))
    asked = types.InlineCompletionParams(
        context=types.InlineCompletionContext(types.InlineCompletionTriggerKind.Invoked),
        text_document=types.TextDocumentIdentifier(uri),
        position=position,
    )
    began = time.perf_counter()
    answer = await client.text_document_inline_completion_async(asked)
    cold = time.perf_counter() - began
    began = time.perf_counter()
    await client.text_document_inline_completion_async(asked)
    warm = time.perf_counter() - began
    client.text_document_did_close(types.DidCloseTextDocumentParams(types.TextDocumentIdentifier(uri)))
    items = answer.items if isinstance(answer, types.InlineCompletionList) else answer or []
    written = str(items[0].insert_text) if items else ""
    shown = before[: before.rfind("\n")].count("\n")
    lead = "\n".join(before.split("\n")[-3:])
    out.print(f"\n[bold]{place.title}[/bold]  {place.file.name}:{shown + 2}  {cold:.2f} s cold, {warm:.2f} s again")
    out.print(Syntax(lead + "█" + written, "python", background_color="default", word_wrap=True))
    if was.strip():
        out.print(f"[dim]the author wrote: {' '.join(was.split())[:100]}[/dim]")


async def _explain(client: LanguageClient, file: Path, name: str) -> None:
    text = await asyncio.to_thread(file.read_text, encoding="utf-8")
    uri = file.as_uri()
    client.text_document_did_open(types.DidOpenTextDocumentParams(types.TextDocumentItem(uri, "python", 0, text)))
    lines = text.split("\n")
    line = next(number for number, content in enumerate(lines) if content.startswith(f"def {name}("))
    first, after = subject.enclosing(lines, line)
    place: dict[str, Any] = {"uri": uri, "position": {"line": line, "character": 4}}
    began = time.perf_counter()
    markdown = await client.workspace_execute_command_async(types.ExecuteCommandParams(COMMAND, [place]))
    seconds = time.perf_counter() - began
    out.print(f"\n[bold]explain {name}[/bold]  {file.name}:{first + 1}-{after}  {seconds:.1f} s")
    out.print(Markdown(str(markdown)))


def _next_steps(seconds: float) -> None:
    out.print(f"\nDone in {seconds:.0f} s. To use it in an editor, see extension/README.md; in short:")
    out.print(
        f"  Neovim 0.12  cmd = {{'{Path(sys.executable).parent / 'tabwise-lsp'}'}}, then vim.lsp.inline_completion.enable()"
    )
    out.print("  any other    an LSP client that runs tabwise-lsp, or a tool that speaks OpenAI's API (tabwise status)")
    out.print("  by hand      tabwise complete FILE:LINE:COL, tabwise explain FILE:START-END, tabwise doctor")


if __name__ == "__main__":
    sys.exit(main())
