"""What the GPU check looks at: a 7B in four bits in the transformers engine, real or of random weights, or a tiny one.

Knows how it comes into memory, and how memory is counted on its device; not what is checked.
"""

import gc
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from agent import architecture, catalog
from agent.catalog import Dimensions
from agent.config import EngineSettings
from agent.engines.base import GenerationRequest
from agent.engines.decoding import DecodeLoop
from agent.engines.kv_cache import Shelf, n_cached_layers, room_for
from agent.engines.loading import LoadedTree
from agent.engines.random_model import random_tree
from agent.engines.transformers import TransformersEngine
from agent.engines.twin import twin_of
from agent.engines.worker import Worker
from agent.memory import Device, Quantisation, Workload

_CHUNK_TOKENS = {"cuda": 512, "cpu": 32}  # as the engine reads prompts
_SLOTS = 1  # each row has caches of its own; beside the place in the code there is one for explanations


@dataclass(frozen=True, slots=True)
class Extent:
    """How large the checks and benches are."""

    context_tokens: int
    prompts: tuple[int, ...]
    """Lengths for the time to first text."""
    decode_tokens: int
    contexts: tuple[int, ...]
    """Lengths for the memory of serving."""
    steps: tuple[tuple[int, bool], ...]
    """Tokens of a training row, and whether activations are computed anew."""
    row_tokens: int
    """Of the training step that is timed."""
    scored_tokens: int
    rank: int
    copied_bytes: int
    """Of the copy that shows the memory's bandwidth: far more than caches hold."""


FULL = Extent(
    context_tokens=4096,
    prompts=(64, 512, 1700, 3800),
    decode_tokens=96,
    contexts=(1024, 4096),
    steps=((256, True), (512, True), (1024, True), (256, False)),
    row_tokens=512,
    scored_tokens=128,
    rank=16,
    copied_bytes=1 << 29,
)
TINY = Extent(
    context_tokens=1024,  # a context that is too long shrinks to 512 at least
    prompts=(8, 40),
    decode_tokens=8,
    contexts=(64, 128),
    steps=((16, True), (16, False)),
    row_tokens=16,
    scored_tokens=4,
    rank=4,
    copied_bytes=1 << 24,
)
TINY_SIZES = Dimensions(2, 64, 4, 2, 16, 128, 320, False, biases="qkv")
"""Of a model that a CPU runs in no time; all widths are whole blocks of NF4."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under check."""

    name: str
    """As the table shows it: it says where the weights are chance."""
    engine: TransformersEngine
    size: Dimensions
    device: torch.device
    extent: Extent

    @property
    def workload(self) -> Workload:
        """The least that it may be planned for: no cache, no adapter, no training."""
        kind = Device.CUDA if self.device.type == "cuda" else Device.CPU
        return Workload(
            Quantisation.NF4, kind, context_tokens=1, caches=0, prefill_tokens=_CHUNK_TOKENS[kind], served_rank=0
        )

    def prompt(self, n_tokens: int) -> tuple[int, ...]:
        """Return random tokens."""
        return tuple(torch.randint(0, self.size.vocabulary, (n_tokens,)).tolist())

    def request(self, n_tokens: int, new_tokens: int, **more: Any) -> GenerationRequest:
        """Return a request with a random prompt that no cache knows."""
        return GenerationRequest(self.prompt(n_tokens), new_tokens, cached=False, **more)

    def row_pair(self, row_tokens: int) -> torch.Tensor:
        """Return a pair of random rows (2, T) on the device."""
        return torch.randint(0, self.size.vocabulary, (2, row_tokens), device=self.device)

    async def logits(self, ids: tuple[int, ...]) -> torch.Tensor:
        """Return what the serving tree says to a prompt, (T, V)."""

        def look(module: Any) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = module(torch.tensor([ids], device=self.device), use_cache=False).logits[0]
                return found

        return await self.engine.with_model(look)


def is_here(name: str) -> bool:
    """Tell whether a catalogue model's weights lie on this machine, for transformers."""
    return catalog.entry(name).format == "safetensors" and catalog.is_pulled(name)


async def load(name: str, extent: Extent, device: torch.device, *, chance: bool) -> Subject:
    """Bring the model into memory.

    Args:
        name: Of the catalogue; its sizes are taken where weights are chance.
        extent: How large the checks are.
        device: Where it shall lie.
        chance: Whether the weights are random.

    Raises:
        TabwiseError: It cannot be loaded.
    """
    if not chance:
        settings = EngineSettings(
            context_tokens=extent.context_tokens, quantisation="nf4", completion_slots=_SLOTS, threads=0
        )
        engine = await TransformersEngine.load(catalog.find(name), settings, drafts=False)
        return Subject(name, engine, architecture.of(name).dimensions, device, extent)
    size = TINY_SIZES if extent is TINY else catalog.entry(name).dimensions
    worker = Worker("engine")
    try:
        tree = await worker.finish(lambda: random_tree(name, size, extent.context_tokens, device))
        loop = _loop_of(tree, extent)
    except BaseException:
        worker.end()
        raise
    engine = TransformersEngine(worker, tree, loop, twin_of(tree.module))
    shown = "tiny, random weights" if extent is TINY else f"sizes of {name}, random weights"
    return Subject(shown, engine, size, device, extent)


def _loop_of(tree: LoadedTree, extent: Extent) -> DecodeLoop:
    module: Any = tree.module
    return DecodeLoop(
        tree.module,
        tree.vocabulary,
        Shelf(n_cached_layers(module.config, "the model"), _SLOTS, (_SLOTS + 1) * room_for(extent.context_tokens)),
        tree.device,
        context_tokens=extent.context_tokens,
        chunk_tokens=_CHUNK_TOKENS[tree.device.type],
        drafts=False,
    )


class Meter:
    """Counts the memory that tensors take on a device."""

    def __init__(self, device: torch.device) -> None:
        """Count on this device; on a CPU nothing is counted, since PyTorch keeps no account of it."""
        self._cuda = device.type == "cuda"
        self.device = device

    def begin(self) -> None:
        """Forget what is held for later, and the peak so far."""
        self.tidy()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def tidy(self) -> None:
        """Let go of what nobody holds any more."""
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @property
    def peak_bytes(self) -> int | None:
        """The most that tensors took since `begin`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self._cuda else None

    @property
    def held_bytes(self) -> int | None:
        """What tensors take now; None on a CPU."""
        return torch.cuda.memory_allocated() if self._cuda else None

    @property
    def blocks_bytes(self) -> int | None:
        """The most that the allocator had of the device since `begin`, holes included; None on a CPU."""
        return torch.cuda.max_memory_reserved() if self._cuda else None

    @property
    def context_bytes(self) -> int | None:
        """What the device has given out beside the allocator's blocks; None on a CPU. Others' use of it counts, too."""
        if not self._cuda:
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()


async def drained(engine: TransformersEngine, request: GenerationRequest) -> list[Any]:
    """Return all events of a stream."""
    return [event async for event in engine.generate(request)]


async def close(subject: Subject | None) -> None:
    """Free the model."""
    if subject is not None:
        with suppress(RuntimeError):
            await subject.engine.close()
