"""Benchmark of filling in the middle: HumanEval-Infilling through the whole pipeline, or through plain prompts.

Each task is a program with a piece missing. What was written for the piece is put in its place, and the program and its
tests are run by `sandbox`. Knows the form of the data and what an editor would ask; not how completions come about.
Data and metric: Bavarian et al., Efficient Training of Language Models to Fill in the Middle, arXiv 2207.14255.
"""

import asyncio
import gzip
import json
import tempfile
import uuid
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from agent import catalog, completer, config, fim, sandbox
from agent.completer import Completed, Layout
from agent.config import CompletionSettings
from agent.engines.base import Decoded, GenerationRequest
from agent.errors import EngineError, InputError
from agent.loaded import LoadedModel, prepare
from agent.sandbox import Verdict
from agent.types import CompletionRequest, Document, Trigger

_GZIP = b"\x1f\x8b"
_DOCUMENT = Document("file:///solution.py", 0, "solution.py", "python")


@dataclass(frozen=True, slots=True)
class Task:
    """A program with a piece missing."""

    task_id: str
    entry_point: str
    """Name of the function that is tested."""
    prompt: str
    """The program above the missing piece."""
    suffix: str
    canonical_solution: str
    """The missing piece."""
    test: str

    @property
    def is_line(self) -> bool:
        """Whether exactly one whole line is missing, with its indentation and its end."""
        return self.task_id.startswith("SingleLine")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written for a task, and how good it is."""

    task: Task
    text: str
    """The text as it was inserted."""
    exact: bool
    begins_with_truth: bool
    verdict: Verdict


def read_tasks(file: Path, limit: int | None = None) -> list[Task]:
    """Read tasks, one JSON object a line, compressed by gzip or not.

    Args:
        file: Data of HumanEval-Infilling.
        limit: Most tasks to take, evenly spread over the file; None for all of them.

    Raises:
        InputError: The file cannot be read, is damaged, or holds something else.
    """
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if raw.startswith(_GZIP) else raw).decode()
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{file} is a damaged gzip file; fetch it again") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text; give a .jsonl or .jsonl.gz file of tasks") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; give a .jsonl or .jsonl.gz file of tasks") from None
    # Not splitlines(), which takes U+2028 in a task's text for an end of line.
    tasks = [_task(line, f"{file}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not tasks:
        raise InputError(f"{file} holds no tasks; give a .jsonl or .jsonl.gz file of tasks")
    count = len(tasks) if limit is None else min(limit, len(tasks))
    return [tasks[index * len(tasks) // count] for index in range(count)]


def _task(line: str, place: str) -> Task:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{place} is not JSON; each line must hold one task") from None
    names = [field.name for field in fields(Task)]
    if not isinstance(found, dict) or (wrong := [name for name in names if not isinstance(found.get(name), str)]):
        missing = ", ".join(wrong) if isinstance(found, dict) else "an object"
        raise InputError(f"{place} is no task of HumanEval-Infilling: it lacks {missing}")
    return Task(**{name: found[name] for name in names})


async def run(
    file: Path,
    *,
    limit: int | None,
    raw: bool,
    advance: Callable[[int, int], None],
    layout: Layout = Layout.HEALED,
    live_lines: int = 0,
) -> dict[str, Any]:
    """Load the configured model in this process and measure it.

    Args:
        file: Tasks.
        limit: Most tasks to take; None for all.
        raw: Whether to leave out the pipeline and ask with plain prompts.
        layout: How the pipeline lays prompts out.
        live_lines: Lines above the cursor's that stand behind the anchor.
        advance: Is told how many tasks are done, and of how many: once before the first and after each.

    Raises:
        InputError: The file is of no use, or this system cannot limit generated code.
        ModelError: The model cannot be loaded.
        EngineError: The engine broke or refused.
    """
    from agent.engines.llamacpp import LlamaCppEngine  # 100 MB of native code that reading the data does without

    tasks = read_tasks(file, limit)
    if sandbox.run("pass\n") is not Verdict.PASSED:
        raise InputError("an empty program does not pass here: its process cannot start or hold the limits")
    settings = config.load()
    model = catalog.find(settings.model.name)
    done: list[Outcome] = []
    # A directory of our own: a daemon that starts meanwhile clears the usual one of engines' sockets.
    with tempfile.TemporaryDirectory(prefix="tabwise-") as folder:
        engine = await LlamaCppEngine.load(model.path, settings.engine, Path(folder))
        try:
            loaded = await prepare(model, engine)
            advance(0, len(tasks))
            found = outcomes(loaded, tasks, settings.completion, raw=raw, layout=layout, live_lines=live_lines)
            async with aclosing(found) as stream:
                async for outcome in stream:
                    done.append(outcome)
                    advance(len(done), len(tasks))
        finally:
            await engine.close()
    told = {"raw": True} if raw else {"raw": False, "layout": layout.value, "live_lines": live_lines}
    return figures(done) | {"model": settings.model.name} | told


def figures(done: Sequence[Outcome]) -> dict[str, Any]:
    """Sum up outcomes: shares of tasks, from 0 to 1.

    `pass_at_1` counts programs that pass their tests. `exact_match` counts texts that equal the missing piece exactly;
    of single lines, the end is compared without blanks. `begins_with_truth` counts texts that begin with the missing
    piece, wherever they end. `empty` counts tasks for which nothing was written.
    """

    def share(good: Callable[[Outcome], bool]) -> float:
        return round(sum(map(good, done)) / len(done), 4) if done else 0.0

    return {
        "n": len(done),
        "pass_at_1": share(lambda one: one.verdict is Verdict.PASSED),
        "exact_match": share(lambda one: one.exact),
        "begins_with_truth": share(lambda one: one.begins_with_truth),
        "empty": share(lambda one: not one.text.strip()),
        "timed_out": share(lambda one: one.verdict is Verdict.TIMED_OUT),
    }


async def outcomes(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    settings: CompletionSettings,
    *,
    raw: bool,
    layout: Layout = Layout.HEALED,
    live_lines: int = 0,
) -> AsyncGenerator[Outcome, None]:
    """Fill in each task and run its program.

    Tasks come in the order in which their prompts share most: the engine keeps what it computed for the one before.

    Raises:
        InputError: This system cannot limit generated code.
        EngineError: The engine broke or refused.
    """
    ask = _plain if raw else partial(_complete, layout=layout, live_lines=live_lines)
    for task in sorted(tasks, key=lambda one: one.prompt):
        text, rest = await ask(loaded, task, settings)
        truth, said = task.canonical_solution, text
        if task.is_line:
            truth, said = truth.rstrip(), said.rstrip()
        body = text + rest
        program = f"{task.prompt}{body}\n{task.test}\ncheck({task.entry_point})\n"
        verdict = await asyncio.to_thread(sandbox.run, program)
        # Of a span the whole document counts, since closers may have been replaced by their equals.
        exact = said == truth if task.is_line else body == truth + task.suffix
        yield Outcome(task, text, exact, said.startswith(truth), verdict)


async def _complete(
    loaded: LoadedModel,
    task: Task,
    settings: CompletionSettings,
    layout: Layout = Layout.HEALED,
    live_lines: int = 0,
) -> tuple[str, str]:
    """Ask as an editor would by key; return the text, and what stands behind it in the end.

    Where a whole line is missing, an editor shows an empty one, with the cursor in its first column. That one line is
    wanted there is told to the pipeline, since plain prompts are told, too; elsewhere it decides by itself.
    """
    suffix = "\n" + task.suffix if task.is_line else task.suffix
    request = CompletionRequest(
        id=uuid.uuid4().hex,
        document=_DOCUMENT,
        prefix=task.prompt,
        suffix=suffix,
        trigger=Trigger.MANUAL,
        anchor=_anchor(task.prompt, live_lines),
        multiline=False if task.is_line else None,
    )
    async with aclosing(completer.complete(loaded, request, settings, layout=layout)) as stream:
        async for part in stream:
            if isinstance(part, Completed):
                return part.completion.text, suffix[part.completion.replaced_chars :]
    raise EngineError("the completer ended without a completion; report this as a bug")


def _anchor(prefix: str, live_lines: int) -> int:
    lines = prefix.split("\n")
    return len("\n".join([*lines[: len(lines) - 1 - live_lines], ""])) if live_lines < len(lines) - 1 else 0


async def _plain(loaded: LoadedModel, task: Task, settings: CompletionSettings) -> tuple[str, str]:
    """Ask with the whole prefix, the suffix and nothing else; a line ends at its end, a span wherever the model ends."""
    # No live text: the ordinary layout.
    prompt_ids = await loaded.ids(fim.render(loaded.fim, head=task.prompt, live="", suffix=task.suffix))
    allowed = settings.line_tokens if task.is_line else settings.block_tokens
    text = ""
    async with aclosing(loaded.engine.generate(GenerationRequest(prompt_ids, allowed))) as stream:
        async for event in stream:
            if isinstance(event, Decoded):
                if event.ids[-1] in loaded.stop_ids:
                    break
                text += event.text
                if task.is_line and "\n" in text:
                    break
    return (text.partition("\n")[0], "\n" + task.suffix) if task.is_line else (text, task.suffix)
