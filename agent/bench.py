"""Benchmarks of the engine and of explanations, on the real starter model.

`engine` loads a model of its own in this process; `explain` asks the daemon. The language server's are in `lsp/bench.py`.
"""

import asyncio
import statistics
import time
import uuid
from contextlib import aclosing
from typing import Any

from agent import catalog, config, paths
from agent.client import DaemonClient
from agent.engines.base import Decoded, Engine, GenerationRequest, Prefilled, Task
from agent.errors import DaemonError
from agent.types import Completion, CompletionRequest, Document, Explanation, ExplanationRequest

_RUNS = 5
_PROMPT_TOKENS = 512
_DECODE_TOKENS = 64

_FUNCTION = '''\
def schedule(tasks, workers, deadline=None, strict=False):
    """Assign tasks to workers so that each worker's load stays small.

    Tasks are taken longest first; each goes to the worker with the least work.
    """
    if workers < 1:
        raise ValueError("at least one worker is needed")
    loads = [0.0] * workers
    assigned = {index: [] for index in range(workers)}
    late = []
    order = sorted(tasks, key=lambda task: task["hours"], reverse=True)
    for task in order:
        hours = task["hours"]
        if hours < 0:
            raise ValueError(f"negative hours in {task['name']}")
        best = 0
        for index in range(1, workers):
            if loads[index] < loads[best]:
                best = index
        finish = loads[best] + hours
        if deadline is not None and finish > deadline:
            if strict:
                raise RuntimeError(f"{task['name']} cannot be done in time")
            late.append(task["name"])
            continue
        loads[best] = finish
        assigned[best].append(task["name"])
    total = sum(loads)
    longest = max(loads)
    balance = total / (longest * workers) if longest else 1.0
    report = {
        "assigned": assigned,
        "loads": loads,
        "late": late,
        "balance": round(balance, 3),
    }
    if late:
        report["note"] = f"{len(late)} tasks miss the deadline"
    return report
'''
"""A function of 40 lines with four parameters."""


async def engine() -> dict[str, Any]:
    """Measure prefill, decode, and how long a cancelled request holds the engine."""
    from agent.engines.llamacpp import LlamaCppEngine  # 100 MB of native code that the other benchmark does without

    settings = config.load()
    model = catalog.find(settings.model.name)
    began = time.perf_counter()
    subject = await LlamaCppEngine.load(model.path, settings.engine, paths.runtime_dir())
    load_s = time.perf_counter() - began
    try:
        text = _FUNCTION * 3
        ids = tuple(token.id for token in await subject.tokenize(text))[:_PROMPT_TOKENS]
        prefill, decode = await _speed(subject, ids)
        return {
            "model": settings.model.name,
            "load_s": round(load_s, 2),
            "prefill_tokens_per_s": round(prefill, 1),
            "decode_tokens_per_s": round(decode, 1),
            "cancel_in_prefill_ms": await _cancelled(subject, ids, in_decode=False),
            "cancel_in_decode_ms": await _cancelled(subject, ids, in_decode=True),
            "batch_tokens": settings.engine.batch_tokens,
            "runs": _RUNS,
        }
    finally:
        await subject.close()


async def _speed(subject: Engine, ids: tuple[int, ...]) -> tuple[float, float]:
    prefill, decode = [], []
    for number in range(_RUNS):
        # Another first token each time, so that nothing is in the cache.
        request = GenerationRequest((1000 + number, *ids), _DECODE_TOKENS)
        began = time.perf_counter()
        first, count = 0.0, 0
        async with aclosing(subject.generate(request)) as stream:
            async for event in stream:
                if isinstance(event, Decoded):
                    first = first or time.perf_counter()
                    count += len(event.ids)
        prefill.append(len(request.prompt_ids) / (first - began))
        decode.append((count - 1) / (time.perf_counter() - first))
    return statistics.median(prefill), statistics.median(decode)


async def _cancelled(subject: Engine, ids: tuple[int, ...], *, in_decode: bool) -> float:
    """Return the median time until a request in the other slot gets its first token, after the first was cancelled."""
    times = []
    for number in range(_RUNS):
        request = GenerationRequest((2000 + number + _RUNS * in_decode, *ids), 500)
        async with aclosing(subject.generate(request)) as stream:
            async for event in stream:
                if isinstance(event, Decoded) or (isinstance(event, Prefilled) and not in_decode and event.done_tokens):
                    break
        began = time.perf_counter()
        async with aclosing(subject.generate(GenerationRequest(ids[:2], 1, task=Task.EXPLANATION))) as stream:
            times += [(time.perf_counter() - began) * 1000 async for event in stream if isinstance(event, Decoded)]
    return round(statistics.median(times), 1)


async def explain(languages: tuple[str, ...] = ("English", "German")) -> dict[str, Any]:
    """Measure the first text of an explanation of 40 lines, and whether a completion asked for meanwhile comes first."""
    async with DaemonClient() as client:
        await client.ensure_daemon()
        async with aclosing(client.warm()) as states:
            async for _ in states:
                pass
        found = {language: await _first_text_ms(client, language) for language in languages}
        return {"lines": _FUNCTION.count("\n"), "first_text_ms": found, **await _overtaken(client)}


async def _first_text_ms(client: DaemonClient, language: str) -> dict[str, float]:
    times = []
    for number in range(_RUNS):
        # A comment that differs, so that nothing behind the instructions is in the cache.
        code = f"# {number} {uuid.uuid4().hex[:4]}\n{_FUNCTION}"
        began = time.perf_counter()
        request = ExplanationRequest(uuid.uuid4().hex, "plan.py", "python", code, language, max_tokens=16)
        async with aclosing(client.explain(request)) as stream:
            async for _ in stream:
                times.append((time.perf_counter() - began) * 1000)
                break
    return {"median": round(statistics.median(times)), "worst": round(max(times))}


async def _overtaken(client: DaemonClient) -> dict[str, Any]:
    """Ask for a completion in the middle of an explanation."""
    ends: dict[str, float] = {}
    decoding = asyncio.Event()

    async def long() -> None:
        request = ExplanationRequest(uuid.uuid4().hex, "plan.py", "python", _FUNCTION, "English", max_tokens=160)
        async with aclosing(client.explain(request)) as stream:
            async for part in stream:
                decoding.set()
                if isinstance(part, Explanation):
                    ends["explanation"] = time.perf_counter()

    async def short() -> float:
        await decoding.wait()
        request = CompletionRequest(
            uuid.uuid4().hex, Document("file:///b.py", 0, "b.py", "python"), "import os\n\nhere = os.getc", "\n"
        )
        began = time.perf_counter()
        async with aclosing(client.complete(request)) as stream:
            async for part in stream:
                if isinstance(part, Completion):
                    ends["completion"] = time.perf_counter()
        return (time.perf_counter() - began) * 1000

    _, took = await asyncio.gather(long(), short())
    if len(ends) != 2:
        raise DaemonError("an answer was missing; see tabwise status")
    return {"completion_meanwhile_ms": round(took), "completion_first": ends["completion"] < ends["explanation"]}
