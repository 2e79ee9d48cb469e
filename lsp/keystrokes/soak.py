"""`tabwise bench soak`: several editors that type at once for a long time, on one daemon.

Four things must hold: memory stops growing, every request is answered, whatever is shown fits the document's version that
it is shown on, and enough is shown for that to say something. Where one does not, or memory was not measured, the exit status tells. Each editor has a language
server of its own; when a region's trace is typed, the next one begins in the same server. Plays keys as
`bench keystrokes` does; knows nothing of figures about completions.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from agent import config, source_file
from agent.client import DaemonClient
from agent.errors import InputError, TabwiseError
from lsp.keystrokes import trace
from lsp.keystrokes.editor import Editor
from lsp.keystrokes.ours import Ours, world
from lsp.keystrokes.trace import Trace

_KEYS = 200  # of a trace: a minute of typing
_SAMPLE_S = 5.0
_SETTLED = 1 / 6
"""Share of the time after which memory is taken to have settled: five minutes of thirty."""
_WINDOW = 1 / 12  # of the time, over which memory is averaged at the beginning and at the end
_NEW_TOKENS = 32
_MOST_GROWTH = 0.05
_TELLING_MINUTES = 10.0  # in less time, memory is still on its way up
_LEAST_SHOWN = 0.1
"""Share of keys with ghost text before them: where hardly any is shown, that none was stale says nothing. Four editors on two
cores had 0.27, and 0.02 while a fault made each key read its prompt anew."""


class _Typist:
    """One editor, and its share of the files."""

    def __init__(self, files: Sequence[Path], number: int) -> None:
        self.files = files
        self.number = number
        self.keys = self.asked = self.unfit = self.unanswered = self.shown = 0
        self.side: Ours | None = None

    async def type_until(self, end: float, daemons: AsyncExitStack, servers: AsyncExitStack) -> None:
        """Type trace after trace until `end` on the monotonic clock."""
        turn = 0
        while time.monotonic() < end:
            file = self.files[turn % len(self.files)]
            one = _trace(file, 1000 * self.number + turn)
            editor = Editor(one.text, one.step)
            if self.side is None:
                self.side = Ours(file, source_file.read(file).language)
                daemons.push_async_callback(self.side.end_daemon)
                servers.push_async_callback(self.side.end_server)
                await self.side.open(editor)
            else:
                self.side.reopen(file, source_file.read(file).language, editor)
            await self._type(one, editor, end)
            turn += 1
        if self.side is not None:
            work = await self.side.finish()
            self.asked, self.unfit, self.unanswered = work.requests, work.unfit, work.unanswered

    async def _type(self, one: Trace, editor: Editor, end: float) -> None:
        assert self.side is not None
        at = time.monotonic()
        for key in one.keys:
            at = max(at + key.wait_ms / 1000, time.monotonic() - 1)  # an editor that was held up does not catch up
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            if time.monotonic() > end:
                return
            step = self.side.screen.press(key)
            self.shown += bool(step.ghost)
            self.keys += 1
            self.side.press(key, editor.press(key.kind, key.text, key.to), editor)


async def soak(files: Sequence[Path], editors: int, minutes: float, progress: Progress) -> dict[str, Any]:
    """Type.

    Args:
        files: Files with the text to be typed; the editors share them out among them.
        editors: How many type at once.
        minutes: For how long.
        progress: Is told how long it will last.

    Raises:
        InputError: There are fewer files than editors, or a file has too little text.
        DaemonError: A process failed.
    """
    if len(files) < editors:
        raise InputError(f"{len(files)} files are too few for {editors} editors; give each one of its own")
    for file in files:
        _trace(file, 0)
    typists = [_Typist(files[number::editors], number) for number in range(editors)]
    samples: list[tuple[float, dict[int, int]]] = []
    with world(config.load().model.name, _NEW_TOKENS):
        # All servers end before the daemon does: one that is left would start another.
        async with AsyncExitStack() as daemons, AsyncExitStack() as servers:
            began = time.monotonic()
            end = began + minutes * 60
            typing = asyncio.gather(*(one.type_until(end, daemons, servers) for one in typists))
            task = progress.add_task(f"{editors} editors", total=minutes * 60)
            while not typing.done():
                await asyncio.wait({typing}, timeout=_SAMPLE_S)
                progress.update(task, completed=time.monotonic() - began)
                samples.append((time.monotonic() - began, await _memory()))
            await typing
    return {
        "editors": editors,
        "minutes": minutes,
        "keys": sum(one.keys for one in typists),
        "requests": sum(one.asked for one in typists),
        "shown": sum(one.shown for one in typists),
        "unanswered": sum(one.unanswered for one in typists),
        "unfit": sum(one.unfit for one in typists),
        **growth(samples, minutes * 60),
    }


def growth(samples: Sequence[tuple[float, dict[int, int]]], seconds: float) -> dict[str, Any]:
    """Return how memory grew from when it had settled to the end, in all processes together and in the worst one.

    `vanished` counts processes that were there at first and not at the end.

    Args:
        samples: Seconds since the beginning, and bytes for each process.
        seconds: How long it lasted.
    """
    settled, window = seconds * _SETTLED, seconds * _WINDOW
    early = [sizes for at, sizes in samples if settled <= at < settled + window]
    late = [sizes for at, sizes in samples if seconds - window <= at]
    pids = {pid for sizes in early for pid in sizes} & {pid for sizes in late for pid in sizes}
    if not pids:
        return {
            "memory_growth": None,
            "worst_growth": None,
            "memory_mib": None,
            "vanished": len({pid for sizes in early for pid in sizes}),
        }
    before, after = ({pid: _mean(sizes, pid) for pid in pids} for sizes in (early, late))
    total = sum(after.values())
    return {
        "memory_growth": round(total / sum(before.values()) - 1, 4),
        "worst_growth": round(max(after[pid] / before[pid] for pid in pids) - 1, 4),
        "memory_mib": round(total / (1 << 20), 1),
        "vanished": len({pid for sizes in early for pid in sizes} - pids),
    }


def holds(found: dict[str, Any]) -> bool:
    """Tell whether all that must hold does."""
    grew = found["memory_growth"] is None or found["memory_growth"] >= _MOST_GROWTH
    hid = found["shown"] < _LEAST_SHOWN * found["keys"]
    in_time = found["minutes"] >= _TELLING_MINUTES
    return not ((in_time and (grew or hid)) or found["unanswered"] or found["unfit"] or found["vanished"])


def _mean(samples: Sequence[dict[int, int]], pid: int) -> float:
    return statistics.mean(sizes[pid] for sizes in samples if pid in sizes)


async def _memory() -> dict[int, int]:
    """Bytes in memory of the language servers, which are children of ours, and of the daemon."""
    async with DaemonClient() as daemon:
        health = await daemon.health()
    found = {}
    for process in psutil.Process().children():
        try:
            # Daemons that found another one at work are children, too, for a moment.
            if "lsp.server" in process.cmdline() or (health and process.pid == health["pid"]):
                found[process.pid] = process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    if health and health["pid"] not in found:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it answered: counted as vanished
            found[health["pid"]] = psutil.Process(health["pid"]).memory_info().rss
    return found


def _trace(file: Path, seed: int) -> Trace:
    return trace.make(trace.normal(source_file.read(file).text), _KEYS, seed, file.name)


def main() -> int:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(prog="tabwise bench soak")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--editors", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    logging.getLogger("pygls").setLevel(logging.CRITICAL)  # it complains of answers to requests that it cancelled
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            found = asyncio.run(soak(options.files, options.editors, options.minutes, progress))
    except TabwiseError as error:
        sys.exit(f"tabwise: {error}")
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if holds(found) else 1


if __name__ == "__main__":
    sys.exit(main())
