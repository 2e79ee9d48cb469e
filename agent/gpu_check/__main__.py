"""`python -m agent.gpu_check`: for whoever has a card. Checks what needs a GPU, measures, and prints one table.

Where there is no CUDA it says so in one line and ends well. The weights are those of the 7B where it was pulled; elsewhere
they are chance, and the table says so. `--memory` keeps PyTorch within the memory of a smaller card. With `--device cpu
--tiny` the same code runs on a CPU in seconds, which tells nothing about a GPU.
"""

import argparse
import asyncio
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from agent import catalog, machine, memory, units
from agent.errors import TabwiseError
from agent.gpu_check.rows import Job, Row, failed, left_out, run
from agent.memory import GIB, MIB

if TYPE_CHECKING:
    import torch

    from agent.gpu_check.subject import Extent, Meter, Subject

_SECONDS = 300.0  # nothing is begun after them; on a fast card all of it takes less
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")

_TABLE_WIDTH = 150  # where no terminal says how wide it is

out = Console() if sys.stdout.isatty() else Console(width=_TABLE_WIDTH)
err = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and return the process's status: 0 unless something that was checked does not hold."""
    asked = _parser().parse_args(arguments)
    if asked.device == "cpu" and not asked.tiny:
        return _complain("--device is cpu, on which a 7B in four bits takes hours; add --tiny")
    try:
        catalog.entry(asked.model)
    except TabwiseError as error:
        return _complain(f"--model: {error}")
    try:
        import torch
    except ImportError:
        out.print("torch is not installed, so nothing was checked; run: make train-deps")
        return 0
    if asked.device == "cuda" and not torch.cuda.is_available():
        out.print("no CUDA device is here, so nothing was checked")
        return 0
    try:
        cap = units.parse_memory(asked.memory) if asked.memory else 0
    except TabwiseError as error:
        return _complain(str(error))
    device = torch.device(asked.device)
    if cap and device.type == "cuda":
        _cap(device, cap)
    facts = _facts(device, cap)
    rows = asyncio.run(_check(asked, device, facts))
    out.print(_table(facts, rows))
    if asked.json:
        text = json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1)
        try:
            asked.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            return _complain(f"cannot write {asked.json}: {error.strerror}; choose another file")
    return 1 if any(row.ok is False for row in rows) else 0


def _complain(what: str) -> int:
    err.print(f"tabwise: {what}", markup=False, highlight=False, soft_wrap=True)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m agent.gpu_check", description="Check and measure a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --tiny")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model of random weights: tries the code, not the card"
    )
    parser.add_argument("--model", default="qwen2.5-coder-7b", help="of the catalogue, for transformers")
    parser.add_argument("--random-weights", action="store_true", help="also where the model was pulled")
    parser.add_argument("--memory", default="", help="keep within a smaller card's, 12GiB for example")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="begin nothing after so many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return parser


def _cap(device: "torch.device", n_bytes: int) -> None:
    """Keep PyTorch's allocator within what a card of that memory leaves to it: CUDA itself needs some."""
    import torch

    runtime = memory.CUDA_RUNTIME_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(n_bytes - runtime, runtime) / total))


def _facts(device: "torch.device", cap: int) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"device": platform.processor() or platform.machine(), "memory_cap_bytes": cap}
    if device.type == "cuda":
        card = machine.gpu()
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["memory_bytes"] = properties.total_memory
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
        facts["driver"] = card.driver if card else "unknown"
    facts["versions"] = {name: _version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    facts["date"] = time.strftime("%Y-%m-%d")
    return facts


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


async def _check(asked: argparse.Namespace, device: "torch.device", facts: dict[str, Any]) -> list[Row]:
    began = time.monotonic()
    try:
        from agent.gpu_check import subject as subjects
    except ImportError as error:
        return [failed("imports", error), left_out("everything else", "a library is missing")]
    extent = subjects.TINY if asked.tiny else subjects.FULL
    meter = subjects.Meter(device)
    loaded: list[Subject] = []

    async def load() -> Sequence[Row]:
        chance = asked.random_weights or asked.tiny or not subjects.is_here(asked.model)
        loaded.append(await subjects.load(asked.model, extent, device, chance=chance))
        facts["model"] = loaded[0].name
        return [_loaded(loaded[0], meter, time.monotonic() - began)]

    drive = partial(run, clock=time.monotonic, until=began + asked.seconds, tell=_tell, after=meter.tidy)
    rows = await drive([Job("load in four bits", load)])
    facts.setdefault("model", asked.model)
    if not loaded:
        return [*rows, left_out("everything else", "there is no model")]
    try:
        return rows + await drive(_jobs(loaded[0], extent, meter))
    finally:
        await subjects.close(loaded[0])


def _jobs(subject: "Subject", extent: "Extent", meter: "Meter") -> list[Job]:
    """Return all jobs: first what must hold, then what an editor waits for, then memory, whose last row is the fullest."""
    from agent.gpu_check import benches, checks

    serving = [
        Job(f"memory, serving {each}", partial(benches.serving_memory, subject, meter, each))
        for each in extent.contexts
    ]
    steps = [
        Job(
            f"memory, training 2 × {rows}",
            partial(benches.step_memory, subject, meter, rows, checkpointing=checkpointing),
        )
        for rows, checkpointing in extent.steps
    ]
    return [
        Job("adapters", partial(checks.adapter_swap, subject)),
        Job("twin", partial(checks.twin_training, subject)),
        Job("decode", partial(benches.decoding, subject)),
        Job("first text", partial(benches.first_text, subject)),
        Job("cancel", partial(benches.cancelling, subject)),
        Job("training step", partial(benches.training_step, subject)),
        *serving,
        *steps,
        Job("memory, all at once", partial(benches.all_memory, subject, meter)),
        Job("full memory", partial(checks.full_memory, subject)),
    ]


def _loaded(subject: "Subject", meter: "Meter", seconds: float) -> Row:
    from agent.gpu_check.checks import planned_base

    planned, held = planned_base(subject), meter.held_bytes
    text = f"planned {planned / MIB:,.0f} MiB"
    figures: dict[str, float | int | str | bool] = {"planned_bytes": planned, "seconds": seconds}
    if held is not None:
        text = f"{held / MIB:,.0f} MiB, {text} ({planned / held - 1:+.1%})"
        figures["held_bytes"] = held
    return Row("load in four bits", text, True, f"{seconds:.1f} s, {subject.name}", figures)


def _tell(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)
    sys.stderr.flush()


def _table(facts: dict[str, Any], rows: Sequence[Row]) -> Table:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    cap = f", kept within {facts['memory_cap_bytes'] / GIB:.1f} GiB" if facts["memory_cap_bytes"] else ""
    card = f"{facts['device']}"
    if "memory_bytes" in facts:
        card += f" ({facts['memory_bytes'] / MIB:.0f} MiB, driver {facts['driver']}, CUDA {facts['cuda']})"
    table = Table(
        title=f"{card}{cap}\n{facts['model']}, NF4; {versions}; {facts['date']}", box=None, title_justify="left"
    )
    for heading in ("", "result", "holds", "note"):
        table.add_column(heading, overflow="fold")
    marks = {True: "yes", False: "NO", None: ""}
    for row in rows:
        table.add_row(row.name, row.result, marks[row.ok], row.note)
    return table


if __name__ == "__main__":
    sys.exit(main())
