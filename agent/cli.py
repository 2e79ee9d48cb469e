"""The command `tabwise`.

Turns arguments into calls and answers into lines of text or JSON; every error is one line on standard error and a
non-zero exit. Knows no model: what a model must answer is asked of the daemon.
"""

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from agent import catalog, config, crash_guard, doctor, paths, pull, source_file
from agent.engines.base import Task
from agent.errors import DaemonError, InputError, TabwiseError
from agent.types import Completion, CompletionRequest, Document, Explanation, ExplanationRequest, Snippet, Trigger
from agent.version import __version__

T = TypeVar("T")

app = typer.Typer(
    name="tabwise",
    help="A local coding assistant that learns from the Tab key.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
models = typer.Typer(help="The models on this machine, and those that can be had.", no_args_is_help=True)
bench = typer.Typer(help="Measure, on this machine, with the real model.", no_args_is_help=True)
adapters = typer.Typer(help="The adapters that answer, beside the bare model.", no_args_is_help=True)
app.add_typer(models, name="models")
app.add_typer(adapters, name="adapters")
app.add_typer(bench, name="bench")

out = Console()
err = Console(stderr=True)

_STOP_S = 10.0  # for the daemon to end once it was told to; it cuts open requests after two
_WINDOW_CHARS = 24_000  # before and behind the cursor: far more than any budget of tokens takes

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tabwise {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def _talk(work: Callable[[Any], Coroutine[Any, Any, T]], *, start: bool = True) -> T:
    """Run `work` with a client of the daemon, which is started first where it is needed."""
    from agent.client import DaemonClient  # aiohttp takes 0.15 s to import, and half of the commands need none

    async def run() -> T:
        async with DaemonClient() as client:
            if start:
                await client.ensure_daemon()
            return await work(client)

    return asyncio.run(run())


@app.command()
def complete(
    place: Annotated[str, typer.Argument(metavar="FILE:LINE:COL", help="Where to complete; both count from 1.")],
    context: Annotated[
        list[Path] | None, typer.Option(help="A file whose text may help; can be given several times.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Complete the code at a place of a file."""
    path, line, column = source_file.parse_place(place)
    source = source_file.read(path)
    prefix, suffix = source.split_at(line, column)
    config.load()  # so that wrong settings are told here, and not in the log of a daemon that cannot start
    start = max(0, len(prefix) - _WINDOW_CHARS)
    if start:
        start = prefix.find("\n", start) + 1 or start
    request = CompletionRequest(
        id=uuid.uuid4().hex,
        document=Document(source.path.absolute().as_uri(), 0, _shown(path), source.language),
        prefix=prefix[start:],
        suffix=suffix[:_WINDOW_CHARS],
        snippets=tuple(Snippet(_shown(file), source_file.read(file).text) for file in context or ()),
        trigger=Trigger.MANUAL,
    )

    async def ask(client: Any) -> Completion:
        async with aclosing(client.complete(request)) as stream:
            async for part in stream:
                if isinstance(part, Completion):
                    return part
        raise DaemonError("the daemon sent no completion; try again")

    completion = _talk(ask)
    if as_json:
        fields = {
            "text": completion.text,
            "source": completion.source.value,
            "stop_reason": completion.stop_reason.value,
            "timing": _timing(completion.timing),
        }
        typer.echo(json.dumps(fields, ensure_ascii=False))
    else:
        typer.echo(completion.text)


def _shown(path: Path) -> str:
    # A name that is no UTF-8 cannot travel as it is.
    return os.fsencode(path).decode("utf-8", errors="replace")


def _timing(timing: Any) -> dict[str, Any]:
    names = ("total_ms", "first_text_ms", "prefill_tokens", "cached_tokens", "decoded_tokens")
    return {name: getattr(timing, name) for name in names}


@app.command()
def explain(
    span: Annotated[str, typer.Argument(metavar="FILE[:START-END]", help="What to explain; lines count from 1.")],
    language: Annotated[str | None, typer.Option(help="Language of the answer; explain.language if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Explain a file or some of its lines."""
    path, start, end = source_file.parse_span(span)
    source = source_file.read(path)
    code = source.text if start is None else source.lines(start, end or start)
    if not code.strip():
        raise InputError(f"{span} holds no code; choose other lines")
    settings = config.load()
    request = ExplanationRequest(
        uuid.uuid4().hex, _shown(path), source.language, code, language or settings.explain.language
    )
    streaming = not as_json and not out.is_terminal

    async def ask(client: Any) -> Explanation:
        with err.status("reading the code …"):
            async with aclosing(client.explain(request)) as stream:
                async for part in stream:
                    if isinstance(part, Explanation):
                        return part
                    if streaming:
                        typer.echo(part, nl=False)
        raise DaemonError("the daemon sent no explanation; try again")

    explanation = _talk(ask)
    if as_json:
        fields = {
            "markdown": explanation.markdown,
            "stop_reason": explanation.stop_reason.value,
            "timing": _timing(explanation.timing),
        }
        typer.echo(json.dumps(fields, ensure_ascii=False))
    elif streaming:
        typer.echo()
    else:
        out.print(Markdown(explanation.markdown))


@app.command()
def serve() -> None:
    """Run the daemon here, until Ctrl+C; editors otherwise start it by themselves."""
    from agent import serve as daemon
    from agent.client import ALREADY_RUNNING  # uvicorn and starlette, which no other command needs

    typer.echo(f"the daemon runs; its log is {paths.log_dir() / 'daemon.log'}", err=True)
    if daemon.main() == ALREADY_RUNNING:
        raise DaemonError("a daemon runs already; see: tabwise status")


@app.command()
def status(as_json: Json = False) -> None:
    """Show what the daemon is doing."""

    async def ask(client: Any) -> dict[str, Any] | None:
        if await client.health() is None:
            return None
        found: dict[str, Any] = await client.status()
        return found

    found = _talk(ask, start=False)
    if as_json:
        typer.echo(json.dumps(found or {"running": False}))
    elif found is None:
        typer.echo("no daemon runs; it is started with the first request")
    else:
        model = found["model"]
        table = Table(box=None, show_header=False)
        table.add_row("daemon", f"version {found['version']}, pid {found['pid']}, up {found['uptime_s']:.0f} s")
        table.add_row(
            "model", f"{model['name']}: {model['state']}" + (f" ({model['error']})" if model["error"] else "")
        )
        for task, adapter in found["adapters"].items():
            table.add_row(task, _answering(adapter))
        table.add_row("served", ", ".join(f"{count} {what}" for what, count in found["served"].items()))
        if found["tcp_port"]:
            table.add_row("TCP", f"127.0.0.1:{found['tcp_port']}, token in {paths.runtime_dir() / 'token'}")
        out.print(table)


@app.command()
def stop() -> None:
    """End the daemon."""

    async def ask(client: Any) -> bool:
        if await client.health() is None:
            return False
        await client.shutdown()
        if not await client.wait_until_gone(_STOP_S):
            raise DaemonError(f"the daemon still answers after {_STOP_S:.0f} s; see: tabwise status")
        return True

    typer.echo("stopped" if _talk(ask, start=False) else "no daemon runs")


@app.command("doctor")
def show_doctor(as_json: Json = False) -> None:
    """Look at what is installed, what will run, and what is missing."""
    findings = doctor.examine()
    if as_json:
        typer.echo(json.dumps([{"topic": f.topic, "ok": f.ok, "text": f.text, "mend": f.mend} for f in findings]))
    else:
        table = Table(box=None, show_header=False)
        for _ in range(3):
            table.add_column(overflow="fold")  # paths are to be copied, not guessed
        marks = {True: "[green]ok[/green]", False: "[red]!![/red]", None: ""}
        for finding in findings:
            mend = f"\n→ {finding.mend}" if finding.mend else ""
            table.add_row(marks[finding.ok], finding.topic, finding.text + mend)
        out.print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Option(help="A name of `tabwise models list`, a GGUF file or a folder; all if not given.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of the device, 12GiB for example; this machine's if not given.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train an adapter beside serving.")] = False,
    quantisation: Annotated[str, typer.Option(help="`nf4`, `int8`, `bf16`, `fp32`, `gguf`, or `auto`.")] = "auto",
    device: Annotated[str, typer.Option(help="`cuda`, `cpu`, or `auto`.")] = "auto",
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    pairs: Annotated[int, typer.Option(help="Preference pairs in one pass.")] = 1,
    row_tokens: Annotated[int, typer.Option(help="Tokens of a training row; a pair has two.")] = 512,
    checkpointing: Annotated[bool, typer.Option(help="Compute activations anew on the way back.")] = True,
    optimizer: Annotated[str, typer.Option(help="`adam`, `adam-8bit`, `adam-offloaded`, or `auto`.")] = "auto",
    as_json: Json = False,
) -> None:
    """Work out what a model needs in memory, before it is pulled: for serving, and for training beside it."""
    from agent import planning

    asked = planning.Asked(
        memory, context, train, quantisation, device, rank, pairs, row_tokens, checkpointing, optimizer
    )
    held = planning.budget(asked)
    if model is None:
        fits = list(planning.plan_all(asked, held))
        if as_json:
            typer.echo(json.dumps([planning.as_dict(each, held) for each in fits]))
        else:
            out.print(planning.overview(fits))
        return
    found = planning.plan_for(model, asked, held)
    if as_json:
        typer.echo(json.dumps(planning.as_dict(found, held), ensure_ascii=False))
    else:
        out.print(planning.table(found))
        typer.echo(planning.verdict(found, held))


@models.command("list")
def list_models(as_json: Json = False) -> None:
    """Show the models that Tabwise knows."""
    known = catalog.entries().values()
    if as_json:
        rows = [
            {"name": e.name, "licence": e.licence, "format": e.format, "pulled": catalog.is_pulled(e.name)}
            for e in known
        ]
        typer.echo(json.dumps(rows))
        return
    table = Table(box=None)
    for heading in ("name", "model", "licence", "format", "context", "here"):
        table.add_column(heading)
    for entry in known:
        here = "yes" if catalog.is_pulled(entry.name) else ""
        table.add_row(entry.name, entry.title, entry.licence, entry.format, f"{entry.context_tokens}", here)
    out.print(table)


@models.command("pull")
def pull_model(name: Annotated[str, typer.Argument(help="A name of `tabwise models list`.")]) -> None:
    """Bring a model onto this machine."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        folder = pull.pull(name, _Bars(progress))
    typer.echo(folder)


class _Bars:
    """Shows a pull's stages as bars."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def start(self, what: str, total_bytes: int, done_bytes: int) -> None:
        self._task = self._progress.add_task(what, total=total_bytes or None, completed=done_bytes)

    def advance(self, n_bytes: int) -> None:
        self._progress.advance(self._task, n_bytes)


@models.command("path")
def model_path(name: Annotated[str, typer.Argument(help="A name of `tabwise models list`, or a path.")]) -> None:
    """Print where a model lies, after checking its file."""
    typer.echo(catalog.find(name).path)


@models.command("remove")
def remove_model(
    name: Annotated[str, typer.Argument(help="A name of `tabwise models list`, or the path of a GGUF file.")],
) -> None:
    """Delete a model from this machine, with what was unpacked from it; of a file of your own, only the latter."""
    catalog.remove(name)
    typer.echo(f"removed {name}")


@models.command("retry")
def retry_model(name: Annotated[str, typer.Argument(help="A model that was set aside.")]) -> None:
    """Give a model that was set aside after crashes another chance."""
    found = crash_guard.forgive(paths.data_dir() / "state", name)
    typer.echo(f"{name} will be tried again" if found else f"{name} was not set aside")


_Tasks = Annotated[list[Task] | None, typer.Option("--task", help="Completion if not given; can be given twice.")]


@adapters.command("list")
def list_adapters(as_json: Json = False) -> None:
    """Show which adapter serves which task."""
    _show_adapters(_talk(lambda client: client.adapters()), as_json)


@adapters.command("serve")
def serve_adapter(
    folder: Annotated[Path, typer.Argument(help="As PEFT saves one, with the tabwise.json of its training.")],
    task: _Tasks = None,
    as_json: Json = False,
) -> None:
    """Answer with an adapter from the next request on; the model stays loaded."""
    folders = dict.fromkeys(task or [Task.COMPLETION], str(folder.absolute()))
    _show_adapters(_talk(lambda client: client.serve_adapters(folders)), as_json)


@adapters.command("none")
def serve_no_adapter(task: _Tasks = None, as_json: Json = False) -> None:
    """Answer with the bare model from the next request on."""
    folders = dict.fromkeys(task or [Task.COMPLETION])
    _show_adapters(_talk(lambda client: client.serve_adapters(folders)), as_json)


def _show_adapters(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    for task, adapter in found.items():
        typer.echo(f"{task}: {_answering(adapter)}")


def _answering(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return "the bare model"
    return f"{adapter['name'] or 'the bare model, until it is loaded'} from {adapter['folder']}" + (
        f" ({adapter['error']})" if adapter["error"] else ""
    )


@bench.command("start")
def bench_start(as_json: Json = False) -> None:
    """The language server's start, beside a server that does nothing."""
    _show_figures(_language_server_bench("start"), as_json)


@bench.command("cancel")
def bench_cancel(as_json: Json = False) -> None:
    """The answer to a cancelled request, while the engine decodes."""
    _show_figures(_language_server_bench("cancel"), as_json)


@bench.command("engine")
def bench_engine(as_json: Json = False) -> None:
    """Prefill, decode and cancelling in the engine."""
    from agent import bench as benchmarks  # aiohttp, like the two below

    _show_figures(asyncio.run(benchmarks.engine()), as_json)


@bench.command("explain")
def bench_explain(as_json: Json = False) -> None:
    """The first text of an explanation of 40 lines, and a completion in the middle of one."""
    from agent import bench as benchmarks

    _show_figures(asyncio.run(benchmarks.explain()), as_json)


@bench.command("overhead")
def bench_overhead(as_json: Json = False) -> None:
    """What server and daemon add to a bare round trip, with an engine that takes no time; needs a checkout."""
    _show_figures(_language_server_bench("overhead"), as_json)


@bench.command("keystrokes")
def bench_keystrokes(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Files whose typing is replayed.")],
    keys: Annotated[int, typer.Option(help="Keystrokes in each file.")] = 300,
    seed: Annotated[int, typer.Option(help="Chooses the places, the rhythm and the slips.")] = 1,
    peer: Annotated[str | None, typer.Option(help="Hold it against `llamacpp`, driven as llama.vim does.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Most new tokens of a completion, for both.")] = 32,
    as_json: Json = False,
) -> None:
    """Replay typing in real time: how much of it ghost text foresaw, and how soon it was there."""
    options = [f"--keys={keys}", f"--seed={seed}", f"--new-tokens={new_tokens}"]
    options += [f"--peer={peer}"] if peer else []
    options += ["--json"] if as_json else []
    command = [sys.executable, "-m", "lsp.keystrokes.bench", *options, "--", *map(str, files)]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@bench.command("soak")
def bench_soak(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Files to type, at least one for each editor.")],
    editors: Annotated[int, typer.Option(min=1, help="Editors that type at once.")] = 4,
    minutes: Annotated[float, typer.Option(min=0.1, help="For how long.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Type in several editors at once: memory, answers that are missing, ghost text that does not fit."""
    command = [sys.executable, "-m", "lsp.keystrokes.soak", f"--editors={editors}", f"--minutes={minutes}", "--"]
    done = subprocess.run([*command, *map(str, files)], stdout=subprocess.PIPE, text=True, check=False)
    if done.stdout:
        _show_figures(json.loads(done.stdout), as_json)
    raise typer.Exit(done.returncode)


@bench.command("fim")
def bench_fim(
    data: Annotated[Path, typer.Option(help="Tasks of HumanEval-Infilling, .jsonl or .jsonl.gz.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Most tasks, evenly spread over the file.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Plain prompts, no pipeline.")] = False,
    layout: Annotated[str, typer.Option(help="Of prompts: `ordinary`, `line` or `healed`.")] = "healed",
    live_lines: Annotated[int, typer.Option(min=0, help="Lines above the cursor's behind the anchor.")] = 0,
    as_json: Json = False,
) -> None:
    """Fill in the middle of programs, and run their tests, in a subprocess with limits."""
    from agent import fim_bench
    from agent.completer import Layout

    if layout not in list(Layout):
        raise InputError(f"--layout is {layout}; give one of {', '.join(Layout)}")
    chosen = Layout(layout)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("tasks", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        figures = asyncio.run(
            fim_bench.run(data, limit=limit, raw=raw, advance=advance, layout=chosen, live_lines=live_lines)
        )
    _show_figures(figures, as_json)


@bench.command("cache")
def bench_cache(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Files in which the cursor is put.")],
    positions: Annotated[int, typer.Option(min=1, help="Places of the cursor, over all files.")] = 200,
    seed: Annotated[int, typer.Option(help="Chooses the places.")] = 1,
    as_json: Json = False,
) -> None:
    """Whether cached and speculated tokens are those that are computed anew."""
    from agent import cache_bench

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("places", total=positions)
        found = asyncio.run(cache_bench.run(files, positions, seed, lambda: progress.advance(task)))
    _show_figures(found, as_json)


@bench.command("loop")
def bench_loop(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Files in which the cursor is put.")],
    positions: Annotated[int, typer.Option(min=1, help="Places at which texts are compared, over all files.")] = 100,
    keys: Annotated[int, typer.Option(min=1, help="Steps of typing that are replayed, over all files.")] = 40,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a completion.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses the places and the steps.")] = 1,
    model: Annotated[str | None, typer.Option(help="A model's name or path; model.name if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Our decode loop in transformers beside `generate`: the same texts, and how much sooner."""
    from agent import loop_bench

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("completions", total=loop_bench.steps(positions, keys))
        found = asyncio.run(
            loop_bench.run(
                files,
                positions=positions,
                keys=keys,
                new_tokens=new_tokens,
                seed=seed,
                model_name=model,
                advance=lambda: progress.advance(task),
            )
        )
    _show_figures(found, as_json)


@bench.command("adapter")
def bench_adapter(
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter; one of random weights if not given.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Places of the cursor, in files of Python's own library.")] = 100,
    skip: Annotated[int, typer.Option(min=0, help="Places to leave out first, to measure in parts.")] = 0,
    seed: Annotated[int, typer.Option(help="Chooses the places, and the random weights.")] = 1,
    as_json: Json = False,
) -> None:
    """Whether llama.cpp serves the adapter that PEFT serves: texts and log-probabilities of both; needs the training extra."""
    options = [f"--prompts={prompts}", f"--skip={skip}", f"--seed={seed}"]
    options += [f"--adapter={adapter}"] if adapter else []
    # A process: nothing of the command line loads torch.
    command = [sys.executable, "-m", "agent.adapter_bench", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.stdout:
        _show_figures(json.loads(done.stdout), as_json)
    raise typer.Exit(done.returncode)


def _language_server_bench(name: str) -> dict[str, Any]:
    # A process: what measures the language server knows its protocol, which the agent must not. Its progress is seen.
    done = subprocess.run([sys.executable, "-m", "lsp.bench", name], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise DaemonError(f"the benchmark failed with status {done.returncode}; what it said stands above")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _show_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures))
        return
    table = Table(box=None, show_header=False)
    for name, value in figures.items():
        table.add_row(name, str(value))
    out.print(table)


def _one_line_errors(run: Callable[[], None]) -> Callable[[], None]:
    @wraps(run)
    def guarded() -> None:
        try:
            run()
        except TabwiseError as error:
            typer.secho(f"tabwise: {error}", fg="red", err=True)
            sys.exit(1)
        except OSError as error:  # a disk or a directory that nobody foresaw: still one line
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            typer.secho(f"tabwise: {what}; check the disk and its permissions", fg="red", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)

    return guarded


@_one_line_errors
def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
