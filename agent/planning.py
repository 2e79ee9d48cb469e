"""From what is asked on the command line to a memory plan, and back to text or JSON.

Finds the device whose memory counts and the settings that hold where nothing else is said; the numbers are `memory.py`'s,
the advice is `fitting.py`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

from rich.table import Table

from agent import architecture, catalog, config, fitting, machine, units, weights
from agent.architecture import Architecture
from agent.errors import InputError
from agent.fitting import Fit
from agent.memory import GIB, Device, Optimizer, Plan, Quantisation, Training, Workload

E = TypeVar("E", bound=StrEnum)

AUTO = "auto"
_MOST_RANK = 256  # as for adapters
_MOST_PAIRS = 1024  # in one pass; whoever means more has mistyped
_PREFERRED = {
    Device.CUDA: (Quantisation.BF16, Quantisation.NF4),
    Device.CPU: (Quantisation.FP32, Quantisation.BF16),
}
"""What `auto` takes, the best first: as the transformers engine chooses."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for; None where the settings or the machine decide."""

    memory: str | None = None
    context_tokens: int | None = None
    train: bool = False
    quantisation: str = AUTO
    device: str = AUTO
    rank: int = 16
    pairs: int = 1
    row_tokens: int = 512
    checkpointing: bool = True
    optimizer: str = AUTO


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory that a plan is held against."""

    bytes: int
    device: Device
    source: str


def budget(asked: Asked) -> Budget:
    """Return the memory to plan for: the one that is named, the GPU's where there is one, else the machine's.

    Raises:
        InputError: What is asked for is no device, or no amount of memory.
    """
    device = None if asked.device == AUTO else _one_of(Device, asked.device, "--device")
    if asked.memory is not None:
        return Budget(units.parse_memory(asked.memory), device or Device.CUDA, "as given")
    if device is not Device.CPU:
        card = machine.gpu()
        if card is not None:
            return Budget(card.total_bytes, Device.CUDA, f"{card.name}, {_gib(card.free_bytes)} of it free now")
        if device is Device.CUDA:
            raise InputError(
                "--device is cuda, and no NVIDIA GPU is here; give the memory of the one you mean by --memory"
            )
    return Budget(machine.ram_bytes(), Device.CPU, "this machine's RAM")


def plan_for(name: str, asked: Asked, held: Budget) -> Fit:
    """Plan for one model.

    Raises:
        UnknownModelError: There is no such model, or it is of a kind that the planner does not know.
        ModelCorruptError: What its file says of itself cannot be read.
        InputError: Something that was asked for cannot be.
    """
    subject = architecture.of(name)
    workload = workload_for(subject, asked, held)
    return fitting.fit(subject, workload, held.bytes, smaller_than(subject, workload.quantisation))


def plan_all(asked: Asked, held: Budget) -> Iterator[Fit]:
    """Plan for each model of the catalogue, with as much context as it has."""
    for name, entry in catalog.entries().items():
        within = asked
        if asked.context_tokens is not None:
            within = replace(asked, context_tokens=min(asked.context_tokens, entry.context_tokens))
        yield plan_for(name, within, held)


def workload_for(subject: Architecture, asked: Asked, held: Budget) -> Workload:
    """Return what a model is to do, with what was not said filled in from settings, device and memory.

    Raises:
        InputError: Something that was asked for cannot be.
    """
    settings = config.load().engine
    workload = Workload(
        device=held.device,
        context_tokens=_context(subject, asked, settings.context_tokens),
        caches=settings.cache_contexts,
        served_rank=asked.rank,
        training=_training(subject, asked, held.device) if asked.train else None,
    )
    choices: Sequence[Quantisation] = _PREFERRED[held.device]
    if asked.quantisation != AUTO:
        choices = (_one_of(Quantisation, asked.quantisation, "--quantisation"),)
    elif subject.format == "gguf" and not asked.train:
        choices = (Quantisation.GGUF,)
    elif settings.quantisation != AUTO:
        choices = (Quantisation(settings.quantisation),)
    if Quantisation.GGUF in choices:
        if subject.format != "gguf" or asked.train:
            what = "training takes nf4, int8, bf16 or fp32" if asked.train else f"{subject.name} is no GGUF file"
            raise InputError(f"--quantisation is gguf, but {what}; choose another")
        return replace(workload, quantisation=Quantisation.GGUF, caches=settings.completion_slots + 1, served_rank=0)
    tried = [replace(workload, quantisation=each) for each in choices]
    fitting_ones = (each for each in tried if fitting.plan_of(subject, each).total_bytes <= held.bytes)
    return next(fitting_ones, tried[-1])


def smaller_than(subject: Architecture, quantisation: Quantisation) -> list[Architecture]:
    """Return the catalogue's smaller models in the same kind of file: those with the same prompts first, the largest first."""
    wanted = "gguf" if quantisation is Quantisation.GGUF else "safetensors"
    fim = catalog.entries()[subject.name].fim if subject.name in catalog.entries() else None
    size = weights.parameters(subject.dimensions)
    found = [
        (entry.fim != fim, -weights.parameters(entry.dimensions), entry.name)
        for entry in catalog.entries().values()
        if entry.format == wanted and entry.fim != "none" and weights.parameters(entry.dimensions) < size
    ]
    return [architecture.of(name) for _, _, name in sorted(found)]


def as_dict(found: Fit, held: Budget) -> dict[str, Any]:
    """Return a plan for JSON."""
    return {
        "model": found.model,
        "memory_bytes": held.bytes,
        "memory_source": held.source,
        "device": held.device.value,
        "fits": found.fits,
        "free_bytes": held.bytes - found.plan.total_bytes,
        **_plan_dict(found.plan),
        "changes": list(found.changes),
        "changed": _plan_dict(found.changed) if found.changed else None,
    }


def _plan_dict(plan: Plan) -> dict[str, Any]:
    workload, training, peaks = plan.workload, plan.workload.training, plan.peaks
    fields: dict[str, Any] = {
        "parameters": plan.parameters,
        "quantisation": workload.quantisation.value,
        "context_tokens": workload.context_tokens,
        "base_bytes": plan.base_bytes,
        "base_gib": round(plan.base_bytes / GIB, 2),
        "total_bytes": plan.total_bytes,
        "total_gib": round(plan.total_bytes / GIB, 2),
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "parts": [{"name": part.name, "bytes": part.bytes, "note": part.note} for part in plan.parts],
        "training": None,
    }
    if training and peaks:
        fields["training"] = {
            "pairs": training.pairs,
            "row_tokens": training.row_tokens,
            "scored_tokens": training.scored_tokens,
            "rank": training.rank,
            "checkpointing": training.checkpointing,
            "optimizer": training.optimizer.value,
            "activations_bytes_with_checkpointing": peaks.kept_with_checkpointing,
            "activations_bytes_without_checkpointing": peaks.kept_without_checkpointing,
            "one_block_bytes": peaks.one_block,
            "logits_bytes": peaks.logits,
        }
    return fields


def table(found: Fit) -> Table:
    """Return a plan's parts as lines."""
    drawn = Table(box=None, show_header=False)
    drawn.add_column()
    drawn.add_column(justify="right")
    drawn.add_column(overflow="fold")
    for part in found.plan.parts:
        drawn.add_row(part.name, _mib(part.bytes), part.note)
    peaks, training = found.plan.peaks, found.plan.workload.training
    drawn.add_row("total", _mib(found.plan.total_bytes), f"base {_gib(found.plan.base_bytes)}")
    if peaks and training:
        other = peaks.kept_without_checkpointing if training.checkpointing else peaks.kept_with_checkpointing
        drawn.add_row(
            "", "", f"activations {'without' if training.checkpointing else 'with'} checkpointing: {_mib(other)}"
        )
    return drawn


def verdict(found: Fit, held: Budget) -> str:
    """Return in one line whether a plan fits, and what would make it fit."""
    of = f"{_gib(held.bytes)} ({held.source})"
    total = _gib(found.plan.total_bytes)
    if found.fits:
        return f"fits: {total} of {of}"
    if found.changed is None:
        return f"does not fit: {total} of {of}, and no change that is known makes it fit"
    return f"does not fit: {total} of {of}; it would with {', '.join(found.changes)}: {_gib(found.changed.total_bytes)}"


def overview(fits: Sequence[Fit]) -> Table:
    """Return one line for each model."""
    drawn = Table(box=None)
    for heading in ("model", "weights", "held as", "base", "total"):
        drawn.add_column(heading, justify="right" if heading in ("weights", "base", "total") else "left", no_wrap=True)
    drawn.add_column("fits", overflow="fold")
    for each in fits:
        counted, held = f"{each.plan.parameters / 1e9:.2f} G", each.plan.workload.quantisation.value
        answer = "yes" if each.fits else f"with {', '.join(each.changes)}" if each.changed else "no"
        drawn.add_row(each.model, counted, held, _gib(each.plan.base_bytes), _gib(each.plan.total_bytes), answer)
    return drawn


def _context(subject: Architecture, asked: Asked, usual: int) -> int:
    most = subject.context_tokens
    if asked.context_tokens is None:
        return min(usual, most) if most else usual
    if asked.context_tokens < 1 or (most and asked.context_tokens > most):
        has = f"{subject.name} has {most}" if most else "1 is the least"
        raise InputError(f"--context is {asked.context_tokens}, but {has}; give another")
    return asked.context_tokens


def _training(subject: Architecture, asked: Asked, device: Device) -> Training:
    most = subject.context_tokens or asked.row_tokens
    for what, value, largest in (
        ("--rank", asked.rank, _MOST_RANK),
        ("--pairs", asked.pairs, _MOST_PAIRS),
        ("--row-tokens", asked.row_tokens, most),
    ):
        if not 1 <= value <= largest:
            raise InputError(f"{what} is {value}, it must be from 1 to {largest}; give another")
    optimizer = Optimizer.ADAM_8BIT if device is Device.CUDA else Optimizer.ADAM
    if asked.optimizer != AUTO:
        optimizer = _one_of(Optimizer, asked.optimizer, "--optimizer")
    return Training(
        pairs=asked.pairs,
        row_tokens=asked.row_tokens,
        rank=asked.rank,
        checkpointing=asked.checkpointing,
        optimizer=optimizer,
    )


def _one_of(kind: type[E], value: str, option: str) -> E:
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"{option} is {value!r:.40}; give one of {', '.join([AUTO, *kind])}") from None


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):,.0f} MiB"
