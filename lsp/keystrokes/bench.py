"""`tabwise bench keystrokes`: typing of real files in real time, on our side and on a peer's, side by side.

Both sides see the same keys at the same times. They run one after the other, never at once, and take turns in being
first from file to file. Every replay begins with fresh processes and a loaded model. What the figures mean: `figures`.
"""

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from agent import catalog, config, source_file
from agent.errors import InputError, TabwiseError
from lsp.keystrokes import trace
from lsp.keystrokes.figures import Recording, figures
from lsp.keystrokes.ours import Ours, world
from lsp.keystrokes.peer import Peer
from lsp.keystrokes.screen import Side, replay
from lsp.keystrokes.trace import Trace

_SHOWN = ("covered", "p50_ms", "p90_ms", "tokens_per_key", "cpu_s_per_key", "saved_per_1000")


def main() -> int:
    """Run the benchmark of the command line."""
    options = _options()
    # pygls's client complains of answers to requests that it has cancelled; answers that are missing are counted here.
    logging.getLogger("pygls").setLevel(logging.CRITICAL)
    try:
        found = asyncio.run(_run(options))
    except TabwiseError as error:
        Console(stderr=True, highlight=False).print(f"tabwise: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        Console(highlight=False).print(_table(found))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tabwise bench keystrokes")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--keys", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peer", choices=["llamacpp"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


async def _run(options: argparse.Namespace) -> dict[str, Any]:
    for name, value in (("--keys", options.keys), ("--new-tokens", options.new_tokens)):
        if value < 1:
            raise InputError(f"{name} is {value}; give at least 1")
    name = config.load().model.name
    model = catalog.find(name)
    if options.peer and model.format != "gguf":
        raise InputError(f"the peer needs a GGUF model, {name} is {model.format}; choose another model.name")
    traces = [_trace(file, options.keys, options.seed) for file in options.files]
    sides = ["ours", "peer"] if options.peer else ["ours"]
    recordings: dict[str, list[Recording]] = {side: [] for side in sides}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        seconds = sum(key.wait_ms for one in traces for key in one.keys) / 1000
        task = progress.add_task("", total=seconds * len(sides))
        for number, (file, one) in enumerate(zip(options.files, traces, strict=True)):
            for side in sides if number % 2 == 0 else reversed(sides):
                progress.update(task, description=f"{file.name}: {side}")
                with world(name, options.new_tokens):
                    subject: Side
                    if side == "ours":
                        subject = Ours(file, source_file.read(file).language)
                    else:
                        subject = Peer(model.path, options.new_tokens)
                    found = await replay(one, subject, lambda s: progress.advance(task, s))
                recordings[side].append(found)
    return _summary(options, recordings)


def _trace(file: Path, keys: int, seed: int) -> Trace:
    text = trace.normal(source_file.read(file).text)
    return trace.make(text, keys, seed, file.name).first(keys)


def _summary(options: argparse.Namespace, recordings: dict[str, list[Recording]]) -> dict[str, Any]:
    files = [
        {"file": str(file), **{side: figures([found[number]]) for side, found in recordings.items()}}
        for number, file in enumerate(options.files)
    ]
    pooled = {side: figures(found) for side, found in recordings.items()}
    settings = {"keys": options.keys, "seed": options.seed, "new_tokens": options.new_tokens}
    return {**pooled, **settings, "files": files}


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=None)
    for heading in ("file", "side", *_SHOWN):
        table.add_column(heading.replace("_", " "), justify="left" if heading in ("file", "side") else "right")
    rows: Sequence[dict[str, Any]] = [*found["files"], {"file": "all", **found}]
    for row in rows:
        for side in ("ours", "peer"):
            if side in row:
                values = ("–" if row[side][name] is None else str(row[side][name]) for name in _SHOWN)
                table.add_row(Path(row["file"]).name, side, *values)
    return table


if __name__ == "__main__":
    sys.exit(main())
