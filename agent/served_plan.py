"""The memory plan of the configured model, as the engine that serves it will hold it.

Takes from the settings what they say, and else decides as the engines do: how weights are held is `engines/quantisation.py`'s
choice among what is free, and the context is no longer than the model's own. What is asked on the command line is
`planning.py`'s; the numbers are `memory.py`'s. Looks at no device: what is free is told.
"""

from agent import architecture, fitting
from agent.architecture import Architecture
from agent.config import EngineSettings
from agent.engines import quantisation
from agent.errors import MemoryFullError
from agent.memory import Device, Plan, Quantisation, Workload


def in_transformers(name: str, settings: EngineSettings, device: Device, free_bytes: int) -> Plan:
    """Return what a model takes in the transformers engine, a GGUF file too: that is unpacked for it.

    Args:
        name: Of the catalogue, or a path.
        settings: How it is run.
        device: What it is run on.
        free_bytes: Memory that can be had there now.

    Raises:
        UnknownModelError: There is no such model, or it is of a kind that the planner does not know.
        ModelCorruptError: What its file says of itself cannot be read.
    """
    subject = architecture.of(name)

    def plan(held: quantisation.Quantisation) -> Plan:
        workload = Workload(
            Quantisation(held.value),
            device,
            context_tokens=_context(subject, settings),
            caches=settings.cache_contexts,
            prefill_tokens=settings.batch_tokens or quantisation.CHUNK_TOKENS[device],
        )
        return fitting.plan_of(subject, workload)

    def needs(held: quantisation.Quantisation) -> int:
        return plan(held).base_bytes + quantisation.HEADROOM_BYTES[device]

    try:
        return plan(quantisation.choose(settings.quantisation, quantisation.Device(device, free_bytes), needs))
    except MemoryFullError:
        return plan(
            quantisation.PREFERRED[device][-1]
        )  # the least that it takes, so that one can say how much is missing


def in_llamacpp(name: str, settings: EngineSettings) -> Plan:
    """Return what a GGUF file takes in llama.cpp, whose usual build is for CPUs.

    Raises:
        UnknownModelError: There is no such model, or it is of a kind that the planner does not know.
        ModelCorruptError: What its file says of itself cannot be read.
    """
    subject = architecture.of(name)
    workload = Workload(
        Quantisation.GGUF,
        Device.CPU,
        context_tokens=_context(subject, settings),
        caches=settings.completion_slots + 1,
        served_rank=0,
    )
    return fitting.plan_of(subject, workload)


def needed_bytes(plan: Plan) -> int:
    """Return what must be free for a plan: what the system takes is taken already."""
    return plan.total_bytes - plan.bytes_of("system")


def _context(subject: Architecture, settings: EngineSettings) -> int:
    return min(settings.context_tokens, subject.context_tokens or settings.context_tokens)
