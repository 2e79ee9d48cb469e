"""What is measured on a device: bandwidth, decoding, the first text, a training step, and memory beside the plan.

Every number is of this run. A stream is the engine's own, thread and event loop included, since that is what an editor
waits for. Knows the planner, and no table.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import torch

from agent import memory, trial_step
from agent.engines.base import Decoded, Task
from agent.gpu_check.rows import Row
from agent.gpu_check.subject import Meter, Subject, drained
from agent.memory import GIB, MIB, Optimizer, Plan, Training, Workload

_BEFORE_CANCEL_S = 0.02  # a long prompt is being read by then, and not read yet
_COPIES = 20  # of the bandwidth's copy: 20 ms on a fast card
_TIMES = 3  # that a time is taken; the middle one counts


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: torch.device, n_bytes: int) -> float:
    """Return the bytes a second that a copy within the device's memory reads and writes."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    _wait(device)
    began = time.perf_counter()
    for _ in range(_COPIES):
        target.copy_(source)
    _wait(device)
    return 2 * n_bytes * _COPIES / (time.perf_counter() - began)


async def decoding(subject: Subject) -> Sequence[Row]:
    """Measure tokens a second, and hold them against what the memory's bandwidth allows."""
    extent = subject.extent
    speed = bandwidth(subject.device, extent.copied_bytes)
    n_prompt = extent.prompts[1]
    rate = await _tokens_per_s(subject, n_prompt, recorded=None)
    launched = await _tokens_per_s(subject, n_prompt, recorded=False)
    same, difference = await _difference(subject, n_prompt)
    plan = memory.plan(subject.size, replace(subject.workload, context_tokens=n_prompt, caches=1))
    head = plan.bytes_of("head") or plan.bytes_of("embeddings")
    each = plan.bytes_of("layers") + head + plan.kv_bytes_per_token * n_prompt
    roof = speed / each
    note = f"behind {n_prompt} tokens; a copy runs at {speed / 1e9:.0f} GB/s, {each / GIB:.2f} GiB are read a token"
    figures = {
        "tokens_per_s": rate,
        "roofline_tokens_per_s": roof,
        "bandwidth_bytes_per_s": speed,
        "bytes_per_token": each,
    }
    beside = {"tokens_per_s": launched, "same_tokens": same, "logp_difference_nats": difference}
    return [
        Row("decode", f"{rate:.1f} tokens/s, {rate / roof:.0%} of {roof:.0f}", None, note, figures),
        Row(
            "decode, each step launched",
            f"{launched:.1f} tokens/s",
            None,
            f"the first {same} of {extent.decode_tokens} tokens as by recorded steps, within {difference:.1g} nats",
            beside,
        ),
    ]


async def _tokens_per_s(subject: Subject, n_prompt: int, *, recorded: bool | None) -> float:
    """Return how fast tokens come behind a prompt that was read; the middle one of a few texts."""
    engine, new_tokens = subject.engine.without_drafts(recorded=recorded), subject.extent.decode_tokens
    await drained(engine, subject.request(n_prompt, 4))
    rates = []
    for _ in range(_TIMES):
        times = []
        async with aclosing(engine.generate(subject.request(n_prompt, new_tokens))) as stream:
            async for event in stream:
                if isinstance(event, Decoded):
                    times += [time.perf_counter()] * len(event.ids)
        if len(times) > 1:
            rates.append((len(times) - 1) / (times[-1] - times[0]))
    return statistics.median(rates)


async def _difference(subject: Subject, n_prompt: int) -> tuple[int, float]:
    """Hold recorded steps against launched ones: how many tokens are the same, and the largest difference of these in nats."""
    request = subject.request(n_prompt, subject.extent.decode_tokens)
    said = []
    for recorded in (None, False):
        events = await drained(subject.engine.without_drafts(recorded=recorded), request)
        tokens = [event for event in events if isinstance(event, Decoded)]
        said.append([(one, logp) for event in tokens for one, logp in zip(event.ids, event.logps, strict=True)])
    same, largest = 0, 0.0
    for (one, logp), (other, other_logp) in zip(*said, strict=False):
        if one != other:
            break  # from here on they are two texts
        same, largest = same + 1, max(largest, abs(logp - other_logp))
    return same, largest


async def first_text(subject: Subject) -> Sequence[Row]:
    """Measure how long a prompt that nobody has read takes until its first token."""
    rows = []
    for n_prompt in subject.extent.prompts:
        times = []
        for _ in range(_TIMES):
            engine = subject.engine.without_drafts()
            began = time.perf_counter()
            async with aclosing(engine.generate(subject.request(n_prompt, 2))) as stream:
                async for event in stream:
                    if isinstance(event, Decoded):
                        break
            times.append(1000 * (time.perf_counter() - began))
        middle = statistics.median(times)
        figures = {"prompt_tokens": n_prompt, "first_text_ms": middle}
        note = f"{n_prompt / middle * 1000:.0f} prompt tokens/s"
        rows.append(Row(f"first text, {n_prompt} tokens", f"{middle:.0f} ms", None, note, figures))
    return rows


async def cancelling(subject: Subject) -> Sequence[Row]:
    """Measure how long a request that is given up while its prompt is read keeps the next one waiting."""
    engine, times = subject.engine.without_drafts(), []
    await drained(engine, subject.request(2, 1))
    for _ in range(_TIMES):
        given_up = asyncio.create_task(drained(engine, subject.request(subject.extent.prompts[-1], 8)))
        await asyncio.sleep(_BEFORE_CANCEL_S)
        began = time.perf_counter()
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        await drained(engine, subject.request(2, 1))
        times.append(1000 * (time.perf_counter() - began))
    middle = statistics.median(times)
    return [Row("first token after a cancel in prefill", f"{middle:.0f} ms", None, "", {"after_cancel_ms": middle})]


async def training_step(subject: Subject) -> Sequence[Row]:
    """Measure one step on one pair: forward, backward and the optimizer's."""
    extent = subject.extent
    policy = trial_step.policy_of(await subject.engine.twin(), extent.rank, checkpointing=True)
    optimizer = trial_step.optimizer_for(policy)
    times = []
    for _ in range(1 + _TIMES):
        rows = subject.row_pair(extent.row_tokens)
        _wait(subject.device)
        began = time.perf_counter()
        trial_step.backward(policy, rows, extent.scored_tokens)
        optimizer.step()
        optimizer.zero_grad()
        _wait(subject.device)
        times.append(time.perf_counter() - began)
    middle = statistics.median(times[1:])  # the first one makes the optimizer's states
    note = f"rank {extent.rank}, checkpointed, {extent.scored_tokens} tokens of each row scored"
    figures = {"step_s": middle, "row_tokens": extent.row_tokens}
    return [Row(f"training step, 2 × {extent.row_tokens}", f"{1000 * middle:.0f} ms", None, note, figures)]


async def serving_memory(subject: Subject, meter: Meter, n_context: int) -> Sequence[Row]:
    """Measure the peak of reading a prompt of some length, beside the plan."""
    workload = replace(subject.workload, context_tokens=n_context, caches=1)
    meter.begin()
    engine = subject.engine.without_drafts()
    await drained(engine, subject.request(n_context - 1, 1))
    return [_beside(f"memory, serving {n_context} tokens", memory.plan(subject.size, workload), meter)]


async def step_memory(subject: Subject, meter: Meter, row_tokens: int, *, checkpointing: bool) -> Sequence[Row]:
    """Measure the peak of the second training step, beside the plan."""
    workload = _training(subject, subject.workload, row_tokens, checkpointing=checkpointing)
    meter.begin()
    await _train(subject, workload)
    plan = memory.plan(subject.size, workload)
    # Nothing is served meanwhile.
    without = replace(plan, parts=tuple(part for part in plan.parts if part.name != "serving step"))
    name = f"memory, training 2 × {row_tokens}{'' if checkpointing else ', not checkpointed'}"
    return [_beside(name, without, meter)]


async def all_memory(subject: Subject, meter: Meter) -> Sequence[Row]:
    """Measure the peak of everything at once: full caches for both tasks, and a prompt that is read in the midst of a step."""
    extent = subject.extent
    serving = replace(subject.workload, context_tokens=extent.context_tokens, caches=2)
    workload = _training(subject, serving, extent.row_tokens, checkpointing=True)
    meter.begin()
    engine = subject.engine.without_drafts()
    for task in Task:
        await drained(engine, subject.request(extent.context_tokens - 1, 1, task=task))
    request = subject.request(extent.context_tokens - 1, 1)
    loop = engine._loop  # a step is under way in this thread, so that the stream cannot be awaited

    def serve() -> None:
        for _ in loop.stream(request):
            pass

    await _train(subject, workload, serve)
    plan = memory.plan(subject.size, workload)
    rows = [_beside("memory, all at once", plan, meter)]
    blocks, peak = meter.blocks_bytes, meter.peak_bytes
    if blocks is not None and peak is not None:
        planned = plan.bytes_of("fragments")
        note = f"the allocator has {blocks / MIB:.0f} MiB of the device at its peak; assumed were {planned / MIB:.0f}"
        rows.append(
            Row("holes in its blocks", f"{(blocks - peak) / MIB:.0f} MiB", None, note, {"bytes": blocks - peak})
        )
    context = meter.context_bytes
    if context is not None:
        note = f"CUDA's context and kernels, and others' use of the device; assumed were {plan.bytes_of('runtime') / MIB:.0f}"
        rows.append(Row("beside the allocator", f"{context / MIB:.0f} MiB", None, note, {"bytes": context}))
    return rows


def _training(subject: Subject, workload: Workload, row_tokens: int, *, checkpointing: bool) -> Workload:
    on_gpu = subject.device.type == "cuda"
    training = Training(
        row_tokens=row_tokens,
        scored_tokens=subject.extent.scored_tokens,
        rank=subject.extent.rank,
        checkpointing=checkpointing,
        optimizer=Optimizer.ADAM_8BIT if on_gpu else Optimizer.ADAM,
    )
    return replace(workload, training=training)


async def _train(subject: Subject, workload: Workload, between: Callable[[], None] | None = None) -> None:
    """Do two steps of two pairs each: with the second, all that a step can hold is held."""
    training = workload.training
    assert training is not None
    policy = trial_step.policy_of(await subject.engine.twin(), training.rank, checkpointing=training.checkpointing)
    optimizer = trial_step.optimizer_for(policy)
    for _ in range(2):
        for _ in range(2):
            trial_step.backward(policy, subject.row_pair(training.row_tokens), training.scored_tokens, between)
        optimizer.step()
        optimizer.zero_grad()


def _beside(name: str, plan: Plan, meter: Meter) -> Row:
    planned, peak = plan.tensor_bytes, meter.peak_bytes
    text = f"planned {planned / MIB:,.0f} MiB"
    if peak is None:
        return Row(name, text, None, "on a CPU no peak is counted", {"planned_bytes": planned})
    figures = {"planned_bytes": planned, "peak_bytes": peak}
    return Row(name, f"{peak / MIB:,.0f} MiB, {text} ({planned / peak - 1:+.1%})", None, "", figures)
