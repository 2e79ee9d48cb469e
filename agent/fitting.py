"""What to change where a plan does not fit: the first combination that does, in a stated order.

Pure: plans in, plans out. What costs nothing but time comes first, then what costs quality, then another model. Changes are
piled up until the plan fits; then those that turn out not to be needed are taken back, the costliest first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent import memory
from agent.architecture import Architecture
from agent.memory import Device, Optimizer, Plan, Quantisation, Training, Workload

_DEFAULT_NEEDS = 2048  # tokens: prompts and answers at the default settings need fewer, 1,850 at most
_SHORTER_CONTEXT = 1024
_SHORTER_ROWS = (384, 256, 128)  # tokens of a training row; with fewer, prompts say little
_LOWER_RANKS = (8, 4)
_FEWER_CACHES = (
    3,
    2,
)  # llama.cpp keeps one for explanations, the rest for places in the code (engine.completion_slots)
_LEAST_CACHES = (1,)  # transformers: of a text that is written, and of no other (engine.cache_contexts)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that may be changed."""

    text: str
    apply: Callable[[Workload], Workload]


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan held against a memory, and what makes it fit."""

    model: str
    plan: Plan
    memory_bytes: int
    changes: tuple[str, ...] = ()
    """What to change, where the plan does not fit; empty if nothing helps."""
    changed: Plan | None = None
    """The plan with these changes."""

    @property
    def fits(self) -> bool:
        """Whether the plan fits as it is."""
        return self.plan.total_bytes <= self.memory_bytes


def fit(subject: Architecture, workload: Workload, memory_bytes: int, others: Sequence[Architecture] = ()) -> Fit:
    """Hold a plan against a memory, and find the first combination of changes that fits.

    Args:
        subject: The model.
        workload: What it is to do.
        memory_bytes: Of the device.
        others: Smaller models, in the order in which they are to be tried.
    """
    found = plan_of(subject, workload)
    held = Fit(subject.name, found, memory_bytes)
    if held.fits:
        return held
    changes = tuple(changes_for(workload))
    chosen = _first(subject, workload, memory_bytes, changes)
    if chosen is not None:
        return replace(
            held, changes=tuple(each.text for each in chosen), changed=plan_of(subject, _all(workload, chosen))
        )
    for other in others:
        capped = replace(workload, context_tokens=min(workload.context_tokens, other.context_tokens))
        chosen = () if _fits(other, capped, memory_bytes) else _first(other, capped, memory_bytes, changes)
        if chosen is not None:
            texts = (f"{other.name} in place of {subject.name}", *(each.text for each in chosen))
            return replace(held, changes=texts, changed=plan_of(other, _all(capped, chosen)))
    return held


def plan_of(subject: Architecture, workload: Workload) -> Plan:
    """Return the plan of a model."""
    return memory.plan(subject.dimensions, workload, file_bytes=subject.file_bytes)


def changes_for(workload: Workload) -> Iterator[Change]:
    """Yield what may be changed, in the order in which it is tried."""
    if workload.training:
        yield from _at_the_cost_of_time(workload.training, workload.device)
    yield from _caches(workload)
    yield from _quantisations(workload)
    yield from _context(workload, _DEFAULT_NEEDS)
    if workload.training:
        yield from _less_training(workload.training)
    yield from _context(workload, _SHORTER_CONTEXT)


def _at_the_cost_of_time(training: Training, device: Device) -> Iterator[Change]:
    if not training.checkpointing:
        yield _training("gradient checkpointing", checkpointing=True)
    if training.pairs > 1:
        yield _training(f"one pair at a time, gradients of {training.pairs} accumulated", pairs=1)
    if training.optimizer is Optimizer.ADAM:
        yield _training("an 8-bit optimizer", optimizer=Optimizer.ADAM_8BIT)
    if device is Device.CUDA and training.optimizer is not Optimizer.ADAM_OFFLOADED:
        yield _training("the optimizer's state in the CPU's memory", optimizer=Optimizer.ADAM_OFFLOADED)


def _less_training(training: Training) -> Iterator[Change]:
    for tokens in _SHORTER_ROWS:
        if tokens < training.row_tokens:
            yield _training(f"training rows of {tokens} tokens", row_tokens=tokens)
    for rank in _LOWER_RANKS:
        if rank < training.rank:
            yield _training(f"rank {rank}", rank=rank)


def _caches(workload: Workload) -> Iterator[Change]:
    for count in _FEWER_CACHES if workload.quantisation is Quantisation.GGUF else _LEAST_CACHES:
        if count < workload.caches:
            text = f"{count} key-value cache{'s' if count > 1 else ''} (what does not fit into it is read anew)"
            yield Change(text, _with(caches=count))


def _context(workload: Workload, tokens: int) -> Iterator[Change]:
    if tokens < workload.context_tokens:
        yield Change(f"a context of {tokens} tokens", _with(context_tokens=tokens))


def _quantisations(workload: Workload) -> Iterator[Change]:
    if workload.device is Device.CUDA and workload.quantisation is not Quantisation.NF4:
        yield Change("the base in nf4", _with(quantisation=Quantisation.NF4))
    if workload.device is Device.CPU and workload.quantisation is Quantisation.FP32:
        # Seven times slower than 32 bits without the instructions that few CPUs have (measured with the 0.5B on AVX2).
        yield Change("the base in bf16, which is slow on most CPUs", _with(quantisation=Quantisation.BF16))


def _with(**changes: Any) -> Callable[[Workload], Workload]:
    return lambda at: replace(at, **changes)


def _training(text: str, **changes: Any) -> Change:
    def apply(at: Workload) -> Workload:
        assert at.training is not None
        return replace(at, training=replace(at.training, **changes))

    return Change(text, apply)


def _first(
    subject: Architecture, workload: Workload, memory_bytes: int, changes: Sequence[Change]
) -> tuple[Change, ...] | None:
    for count in range(1, len(changes) + 1):
        if _fits(subject, _all(workload, changes[:count]), memory_bytes):
            return _needed(subject, workload, memory_bytes, changes[:count])
    return None


def _needed(
    subject: Architecture, workload: Workload, memory_bytes: int, changes: Sequence[Change]
) -> tuple[Change, ...]:
    kept = list(changes)
    for change in reversed(changes):
        rest = [each for each in kept if each is not change]
        if _fits(subject, _all(workload, rest), memory_bytes):
            kept = rest
    return tuple(kept)


def _all(workload: Workload, changes: Sequence[Change]) -> Workload:
    for change in changes:
        workload = change.apply(workload)
    return workload


def _fits(subject: Architecture, workload: Workload, memory_bytes: int) -> bool:
    return plan_of(subject, workload).total_bytes <= memory_bytes
