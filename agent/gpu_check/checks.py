"""What must hold on a GPU: adapters come and go, a twin is trained beside serving, and full memory is survived.

Each check returns its rows, or raises where what must hold does not. The same functions run on a CPU with a tiny model, and
under pytest with `-m gpu`.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from agent import adapters, memory, trial_step
from agent.adapters import BaseFacts
from agent.engines.base import Adapter, Decoded, GenerationRequest
from agent.engines.transformers import TransformersEngine
from agent.errors import MemoryFullError
from agent.gpu_check.rows import Row
from agent.gpu_check.subject import Subject, drained
from agent.memory import MIB

_SWAPS = 10
_FACTS = BaseFacts("random", "random", "none")  # what an adapter of chance is for: this model, in this process


class CheckError(Exception):
    """Something that must hold does not."""


def hold(condition: bool, what: str) -> None:
    """Raise unless `condition` holds.

    Raises:
        CheckError: It does not; `what` is the message.
    """
    if not condition:
        raise CheckError(what)


async def adapter_swap(subject: Subject) -> Sequence[Row]:
    """Attach two adapters, swap between them, detach them: each answers for itself, and the base is as it was."""
    engine = subject.engine.without_drafts()
    ids = subject.prompt(24)
    before = await subject.logits(ids)
    with tempfile.TemporaryDirectory(prefix="tabwise-") as folder:
        made = [_random_adapter(subject, Path(folder) / name, seed) for seed, name in enumerate(("one", "other"), 1)]
        began = time.perf_counter()
        await engine.attach(made)
        attach_ms = 1000 * (time.perf_counter() - began)
        names = [None, *(each.name for each in made)]
        first = [await _answer(engine, ids, name) for name in names]
        hold(len({tuple(each) for each in first}) == len(first), "two adapters, or one and none, give the same answer")
        for number in range(_SWAPS):
            which = 1 + number % 2
            hold(await _answer(engine, ids, names[which]) == first[which], f"swap {number} changed an adapter's answer")
        hold(await _answer(engine, ids, None) == first[0], "the bare model answers otherwise between adapters")
        await engine.attach([])
    hold(torch.equal(await subject.logits(ids), before), "after the adapters went, the base's logits are others")
    note = f"rank {subject.extent.rank}, two attached in {attach_ms:.0f} ms; the base's logits bit-identical afterwards"
    return [
        Row("adapters: attach, swap, detach", f"{_SWAPS} swaps", True, note, {"attach_ms": attach_ms, "swaps": _SWAPS})
    ]


async def _answer(engine: TransformersEngine, ids: tuple[int, ...], adapter: str | None) -> list[float]:
    events = await drained(engine, GenerationRequest(ids, 4, cached=False, adapter=adapter))
    return [logp for event in events if isinstance(event, Decoded) for logp in event.logps]


def _random_adapter(subject: Subject, folder: Path, seed: int) -> Adapter:
    folder.mkdir()
    random, rank, size = torch.Generator().manual_seed(seed), subject.extent.rank, subject.size
    q_width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
    shapes = {
        "self_attn.q_proj": (size.hidden, q_width),
        "self_attn.v_proj": (size.hidden, kv_width),
        "self_attn.o_proj": (q_width, size.hidden),
        "mlp.gate_proj": (size.hidden, size.mlp),
        "mlp.down_proj": (size.mlp, size.hidden),
    }
    tensors = {}
    for layer in range(size.layers):
        for module, (n_in, n_out) in shapes.items():
            path = f"base_model.model.model.layers.{layer}.{module}"
            for half, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
                tensors[f"{path}.lora_{half}.weight"] = 0.02 * torch.randn(shape, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    adapters.write_manifest(folder, _FACTS)
    return adapters.inspect(folder, _FACTS)


async def twin_training(subject: Subject) -> Sequence[Row]:
    """Train a step on the twin: serving logits are bit for bit the same before, in the middle of a step, and after."""
    ids = subject.prompt(48)
    before = await subject.logits(ids)
    policy = trial_step.policy_of(await subject.engine.twin(), subject.extent.rank, checkpointing=True)
    optimizer = trial_step.optimizer_for(policy)
    rows, scored = subject.row_pair(subject.extent.row_tokens), subject.extent.scored_tokens
    halves = [each for name, each in policy.named_parameters() if "lora_B" in name]
    serving: Any = await subject.engine.with_model(lambda module: module)
    seen: list[torch.Tensor] = []

    def look() -> None:
        with torch.no_grad():
            seen.append(serving(torch.tensor([ids], device=subject.device), use_cache=False).logits[0])

    losses = []
    for _ in range(2):
        losses.append(trial_step.backward(policy, rows, scored, look))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(await subject.logits(ids))
    hold(all(torch.equal(each, before) for each in seen), "serving logits changed while the twin was trained")
    hold(any(bool(each.any()) for each in halves), "the step changed no weight of the adapter")
    hold(abs(losses[0] - 0.6931) < 0.01, f"the loss of an untrained pair is {losses[0]:.4f}, not ln 2")
    policy.eval()
    with torch.no_grad():
        moved = policy(torch.tensor([ids], device=subject.device), use_cache=False).logits[0]
    hold(not torch.equal(moved, before), "the trained twin says what the base says")
    note = "before, between forward and backward, and after two steps"
    return [Row("twin: serving logits while it trains", "bit-identical", True, note, {"first_loss": losses[0]})]


async def full_memory(subject: Subject) -> Sequence[Row]:
    """Ask for a long text when memory is nearly full: an answer or one clear error, and the next request is served."""
    engine = subject.engine.without_drafts()
    short = subject.request(24, 2)
    wanted = [event.ids for event in await drained(engine, short) if isinstance(event, Decoded)]
    n_long = subject.extent.context_tokens - 8
    told, shrunk, chunk = "served with smaller pieces", engine.context_tokens, engine.chunk_tokens
    with _pressure(subject, await engine.with_model(lambda module: module)):
        try:
            await drained(engine, subject.request(n_long, 1))
        except MemoryFullError as error:
            told, shrunk = "refused in one line", engine.context_tokens
            hold("\n" not in str(error), "the error has several lines")
            hold(shrunk < n_long, "the context did not shrink")
        else:
            hold(subject.device.type == "cuda", "a pass that was too large went through")
            # Served in pieces as large as ever, it found memory enough, and nothing was checked.
            hold(engine.chunk_tokens < chunk, f"memory never ran short: {n_long} tokens were read {chunk} at a time")
    again = [event.ids for event in await drained(engine, short) if isinstance(event, Decoded)]
    hold(again == wanted, "after it, the same request has another answer")
    how = "memory nearly full" if subject.device.type == "cuda" else "simulated on a CPU"
    note = f"{how}: {n_long} tokens {told}; then served as before, context {shrunk}"
    return [Row("full memory", "survived", True, note, {"context_tokens_after": shrunk})]


@contextmanager
def _pressure(subject: Subject, module: Any) -> Iterator[None]:
    """Leave hardly any memory: on a GPU by taking it, on a CPU by a model that says so for more than a few tokens."""
    if subject.device.type == "cuda":
        # What the largest matrix takes when it is unpacked, and a little: enough for short texts only.
        room = 2 * subject.size.hidden * subject.size.mlp + 96 * MIB
        torch.cuda.empty_cache()
        ballast = []
        piece = 256 * MIB
        while piece >= 8 * MIB:
            try:
                ballast.append(torch.empty(piece, dtype=torch.uint8, device=subject.device))
            except torch.OutOfMemoryError:
                piece //= 2
        hold(bool(ballast), "the memory was full before")
        _give_back(ballast, room)
        try:
            yield
        finally:
            ballast.clear()
            torch.cuda.empty_cache()
        return

    def refuse(_module: Any, _arguments: Any, named: Any) -> None:
        if named["past_key_values"].get_seq_length() + named["input_ids"].shape[1] > 64:
            raise torch.OutOfMemoryError("simulated")

    handle = module.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _give_back(ballast: list[torch.Tensor], room: int) -> None:
    given = 0
    while ballast and given < room:
        given += ballast.pop(0).nbytes
    torch.cuda.empty_cache()


def planned_base(subject: Subject) -> int:
    """Return what the planner says that the loaded model takes."""
    return memory.plan(subject.size, subject.workload).base_bytes
