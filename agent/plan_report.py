"""A memory plan as text or as JSON.

Knows plans and no models: what is asked and what holds is `planning.py`'s.
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from agent.fitting import Fit
from agent.memory import GIB, Plan
from agent.planning import Budget, Refusal


def as_dict(found: Fit | Refusal, held: Budget) -> dict[str, Any]:
    """Return a plan for JSON, or why there is none."""
    memory = {"memory_bytes": held.bytes, "memory_source": held.source, "device": held.device.value}
    if isinstance(found, Refusal):
        return {"model": found.model, **memory, "fits": None, "error": found.reason}
    return {
        "model": found.model,
        **memory,
        "fits": found.fits,
        "error": None,
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


def overview(fits: Sequence[Fit | Refusal]) -> Table:
    """Return one line for each model."""
    drawn = Table(box=None)
    for heading in ("model", "weights", "held as", "base", "total"):
        drawn.add_column(heading, justify="right" if heading in ("weights", "base", "total") else "left", no_wrap=True)
    drawn.add_column("fits", overflow="fold")
    for each in fits:
        if isinstance(each, Refusal):
            drawn.add_row(each.model, "", "", "", "", each.reason)
            continue
        counted, held = f"{each.plan.parameters / 1e9:.2f} G", each.plan.workload.quantisation.value
        answer = "yes" if each.fits else f"with {', '.join(each.changes)}" if each.changed else "no"
        drawn.add_row(each.model, counted, held, _gib(each.plan.base_bytes), _gib(each.plan.total_bytes), answer)
    return drawn


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):,.0f} MiB"
