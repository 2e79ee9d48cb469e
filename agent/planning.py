"""From what is asked on the command line to a memory plan.

Finds the device whose memory counts and the settings that hold where nothing else is said; the numbers are `memory.py`'s,
the advice is `fitting.py`'s, and how it is shown is `plan_report.py`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from agent import architecture, catalog, config, fitting, machine, units, weights
from agent.architecture import Architecture
from agent.errors import InputError, TabwiseError
from agent.fitting import Fit
from agent.memory import GIB, Device, Optimizer, Quantisation, Training, Workload

E = TypeVar("E", bound=StrEnum)

AUTO = "auto"
_MOST_RANK = 256  # as for adapters
_MOST_PAIRS = 1024  # in one pass; whoever means more has mistyped
_MOST_TOKENS = 1 << 24  # of a context, where the model does not say how many it has: no model has more
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
class Refusal:
    """A model for which what is asked cannot be planned."""

    model: str
    reason: str


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
            return Budget(card.total_bytes, Device.CUDA, f"{card.name}, {card.free_bytes / GIB:.1f} GiB of it free now")
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


def plan_all(asked: Asked, held: Budget) -> Iterator[Fit | Refusal]:
    """Plan for each model of the catalogue, with as much context as it has, or say why one cannot be planned for.

    Raises:
        InputError: Something was asked for that cannot be for any model.
    """
    _check(asked)
    for name, entry in catalog.entries().items():
        within = asked
        if asked.context_tokens is not None:
            within = replace(asked, context_tokens=min(asked.context_tokens, entry.context_tokens))
        try:
            yield plan_for(name, within, held)
        except TabwiseError as error:
            yield Refusal(name, str(error))


def workload_for(subject: Architecture, asked: Asked, held: Budget) -> Workload:
    """Return what a model is to do, with what was not said filled in from settings, device and memory.

    Raises:
        InputError: Something that was asked for cannot be.
    """
    _check(asked)
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
        choices = (Quantisation(asked.quantisation),)
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


def _check(asked: Asked) -> None:
    """Refuse what cannot be for any model.

    Raises:
        InputError: There is such a thing.
    """
    for what, value, least, most in (
        ("--context", asked.context_tokens, 1, _MOST_TOKENS),
        ("--rank", asked.rank, 1 if asked.train else 0, _MOST_RANK),
        ("--pairs", asked.pairs, 1, _MOST_PAIRS),
        ("--row-tokens", asked.row_tokens, 1, _MOST_TOKENS),
    ):
        if value is not None and not least <= value <= most:
            raise InputError(f"{what} is {value}, it must be from {least} to {most}; give another")
    if asked.quantisation != AUTO:
        _one_of(Quantisation, asked.quantisation, "--quantisation")
    if asked.optimizer != AUTO:
        _one_of(Optimizer, asked.optimizer, "--optimizer")


def _context(subject: Architecture, asked: Asked, usual: int) -> int:
    most = subject.context_tokens
    if asked.context_tokens is None:
        return min(usual, most) if most else usual
    if most and asked.context_tokens > most:
        raise InputError(f"--context is {asked.context_tokens}, but {subject.name} has {most}; give another")
    return asked.context_tokens


def _training(subject: Architecture, asked: Asked, device: Device) -> Training:
    most = subject.context_tokens
    if most and asked.row_tokens > most:
        raise InputError(f"--row-tokens is {asked.row_tokens}, but {subject.name} has {most}; give another")
    optimizer = Optimizer.ADAM_8BIT if device is Device.CUDA else Optimizer.ADAM
    if asked.optimizer != AUTO:
        optimizer = Optimizer(asked.optimizer)
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
