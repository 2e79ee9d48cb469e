"""The memory planner: what a model needs for serving and for training, from its sizes alone.

Takes numbers and returns numbers; reads no file, no clock and no device, and knows no engine's code. What is counted is
what PyTorch holds for the transformers library's models (or llama.cpp for a GGUF file), with LoRA on all linear layers
of the blocks. `fitting.py` looks for what to change where it does not fit.

A plan is a list of parts that are all held at the worst moment of a training step, so that its total is their sum. Two
things never happen at once, the scores' gradients and the way back through a block; the larger one is the part, both are
in the plan's `Peaks`.

Sources: what autograd keeps was read off the models with saved-tensor hooks and calibrated against measured peaks
(tests/with_torch/test_planner_measured.py); NF4 with double quantisation is QLoRA's (arXiv 2305.14314, section 3).
"""

from dataclasses import dataclass
from enum import StrEnum

from agent import weights
from agent.catalog import Dimensions

MIB, GIB = 1 << 20, 1 << 30

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Half a byte a weight; an 8-bit scale for each block of 64; a 32-bit scale for each 256 of these."""
_ADAM_8BIT_BYTES = 2 * (1 + 4 / 256)
"""Two states of a byte, and a 32-bit scale for each block of 256 of either (bitsandbytes)."""
_LLAMACPP_BATCH = {"cpu": 7, "cuda": 512}
"""Tokens that `engines/llamacpp.py` computes in one go."""


class Quantisation(StrEnum):
    """How the base's linear layers are held."""

    NF4 = "nf4"
    INT8 = "int8"
    BF16 = "bf16"
    FP32 = "fp32"
    GGUF = "gguf"
    """As they are in a GGUF file: served by llama.cpp, and not for training."""


class Optimizer(StrEnum):
    """What holds the running means of the gradients."""

    ADAM = "adam"
    ADAM_8BIT = "adam-8bit"
    ADAM_OFFLOADED = "adam-offloaded"
    """Paged: in the CPU's memory, brought to the device for the step."""


class Device(StrEnum):
    """Whose memory is planned."""

    CUDA = "cuda"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Training:
    """One step of preference training; the defaults are the recipe's."""

    pairs: int = 1
    """Pairs in one pass; each is two rows, chosen and rejected."""
    row_tokens: int = 512
    scored_tokens: int = 128
    """At the end of each row: the completion, whose tokens alone need scores."""
    rank: int = 16
    checkpointing: bool = True
    """Whether only the blocks' inputs are kept, and the rest is computed anew on the way back."""
    optimizer: Optimizer = Optimizer.ADAM_8BIT

    @property
    def tokens(self) -> int:
        """Tokens in one pass."""
        return 2 * self.pairs * self.row_tokens

    @property
    def scored(self) -> int:
        """Tokens in one pass that need scores."""
        return 2 * self.pairs * min(self.scored_tokens, self.row_tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the model is to do."""

    quantisation: Quantisation = Quantisation.NF4
    device: Device = Device.CUDA
    context_tokens: int = 4096
    caches: int = 2
    """Contexts' worth of keys and values: what transformers' caches may take together, or one for each slot of llama.cpp."""
    prefill_tokens: int = 512
    """Prompt tokens that are read in one go."""
    served_rank: int = 16
    """Rank of the adapter that is served; 0 for the bare model."""
    training: Training | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of a number in what is computed: bf16, unless the weights are fp32."""
        return 4 if self.quantisation is Quantisation.FP32 else 2


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes memory."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the parts of a training step were chosen from, all in bytes."""

    kept_with_checkpointing: int
    kept_without_checkpointing: int
    one_block: int
    """A block's activations, computed anew, the gradients on their way back through it, and the scores that are still held."""
    logits: int
    """Scores of the completions' tokens over the vocabulary, their log-softmax, and the gradients of both."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a workload takes, part by part."""

    workload: Workload
    parameters: int
    parts: tuple[Part, ...]
    kv_bytes_per_token: int
    peaks: Peaks | None = None

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(part.bytes for part in self.parts)

    @property
    def base_bytes(self) -> int:
        """The model itself: layers, embeddings and head."""
        return self.bytes_of("layers", "embeddings", "head")

    @property
    def tensor_bytes(self) -> int:
        """What tensors take: all but the stated allowances."""
        return self.total_bytes - self.bytes_of("runtime", "fragments", "system")

    def bytes_of(self, *names: str) -> int:
        """Return what the parts of these names take together; one that is not there takes nothing."""
        return sum(part.bytes for part in self.parts if part.name in names)


def plan(size: Dimensions, workload: Workload, *, file_bytes: int = 0) -> Plan:
    """Return what `workload` takes on the device.

    Args:
        size: Sizes of the architecture.
        workload: What the model is to do.
        file_bytes: Size of the GGUF file for a plan of llama.cpp; estimated where it is 0.
    """
    kv_bytes = 2 * size.layers * weights.kv_width(size) * workload.element_bytes
    held = [*_base(size, workload, file_bytes), *_serving(size, workload, kv_bytes)]
    peaks = None
    if workload.training:
        peaks = _peaks(size, workload, workload.training)
        held += _training(size, workload.training, peaks)
    return Plan(workload, weights.parameters(size), (*held, *_allowances(workload, held)), kv_bytes, peaks)


def _base(size: Dimensions, workload: Workload, file_bytes: int) -> list[Part]:
    if workload.quantisation is Quantisation.GGUF:
        note = "the file, embeddings and head in it" if file_bytes else "estimated from 4.85 bits a weight"
        return [Part("layers", file_bytes or weights.gguf_bytes(size), note)]
    each = {Quantisation.NF4: _NF4_BYTES, Quantisation.INT8: 1.0, Quantisation.BF16: 2.0, Quantisation.FP32: 4.0}
    linear = weights.linear_parameters(size) * each[workload.quantisation]
    if workload.quantisation is Quantisation.INT8:
        rows = weights.q_width(size) + 2 * weights.kv_width(size) + 2 * size.hidden + (size.mlp_matrices - 1) * size.mlp
        linear += 4 * size.layers * rows  # a 32-bit scale for each row
    small = weights.small_parameters(size) * workload.element_bytes
    table = size.vocabulary * size.hidden * workload.element_bytes
    return [
        Part("layers", round(linear) + small, workload.quantisation.value),
        Part("embeddings", table, f"{8 * workload.element_bytes} bits"),
        Part("head", 0 if size.tied else table, "the embeddings are used" if size.tied else ""),
    ]


def _serving(size: Dimensions, workload: Workload, kv_bytes: int) -> list[Part]:
    caches = kv_bytes * workload.context_tokens * workload.caches
    count = f"{workload.caches} × {workload.context_tokens} tokens"
    held = [Part("key-value caches", caches, count)]
    if workload.served_rank and workload.quantisation is not Quantisation.GGUF:
        served = weights.lora_parameters(size, workload.served_rank)
        held.append(Part("served adapter", 4 * served, f"rank {workload.served_rank}"))
    return [*held, Part("serving step", _prefill(size, workload), f"{_read_at_once(workload)} tokens read at once")]


def _read_at_once(workload: Workload) -> int:
    if workload.quantisation is Quantisation.GGUF:
        return _LLAMACPP_BATCH[workload.device]
    return min(workload.prefill_tokens, workload.context_tokens)


def _prefill(size: Dimensions, workload: Workload) -> int:
    """Return what reading a piece of a prompt takes beside weights and caches, at its worst moment."""
    tokens, element = _read_at_once(workload), workload.element_bytes
    if workload.quantisation is Quantisation.GGUF:
        # llama.cpp reserves scores for each token of a batch; a block's numbers are 32-bit and fit into the same buffer.
        return 4 * tokens * max(size.vocabulary, 4 * size.hidden + 3 * size.mlp)
    stream = 3 * size.hidden  # what goes past the block, what comes out of the norm, what the block gives
    mlp = tokens * element * (stream + (3 if size.mlp_matrices > 2 else 2) * size.mlp)
    # Joined with what is cached, a block's keys and values exist twice for a moment, and are then spread over all heads.
    spread = weights.q_width(size) if size.kv_heads < size.heads else 0
    attention = tokens * element * (stream + 2 * weights.q_width(size))
    attention += 2 * workload.context_tokens * element * (weights.kv_width(size) + spread)
    logits = size.vocabulary * (element + 4)
    return max(mlp, attention, logits) + _dequantised(size, workload)


def _dequantised(size: Dimensions, workload: Workload) -> int:
    """Return what the largest matrix takes while it is multiplied with: bitsandbytes unpacks it to 16 bits first."""
    if workload.quantisation not in (Quantisation.NF4, Quantisation.INT8):
        return 0
    return 2 * size.hidden * max(size.mlp, weights.q_width(size))


def _peaks(size: Dimensions, workload: Workload, training: Training) -> Peaks:
    tokens, element = training.tokens, workload.element_bytes
    block = tokens * _kept_per_token(size, workload, training.rank)
    back = tokens * element * (2 * size.hidden + 2 * size.mlp) + _dequantised(size, workload)
    scores = training.scored * size.vocabulary
    held = scores * (element + 4)  # the loss has names for them and for their 32-bit log-softmax until it returns
    return Peaks(
        kept_with_checkpointing=tokens * element * size.hidden * (size.layers + 1),
        kept_without_checkpointing=block * size.layers,
        one_block=(block if training.checkpointing else 0) + back + held,
        logits=held + scores * 8,
    )


def _kept_per_token(size: Dimensions, workload: Workload, rank: int) -> int:
    """Return the bytes that autograd keeps in one block for each token.

    The two norms keep their inputs in 32 bits. The adapters keep the inputs of their layers: q, k and v share one, gate
    and up another, unless a 16-bit base makes peft convert it for each (bitsandbytes' layers do not, under autocast).
    Attention keeps queries, its result, and keys and values spread over all heads, since rows are masked. A gated MLP
    keeps gate, its activation, up and their product; one without keeps what comes before its activation, and after.
    """
    element = workload.element_bytes
    inputs = 5 if workload.quantisation is Quantisation.BF16 else 2
    mlp = 4 if size.mlp_matrices > 2 else 2
    numbers = inputs * size.hidden + 4 * weights.q_width(size) + mlp * size.mlp + (4 + size.mlp_matrices) * rank
    return 2 * 4 * size.hidden + element * numbers


def _training(size: Dimensions, training: Training, peaks: Peaks) -> list[Part]:
    trained = weights.lora_parameters(size, training.rank)
    each = {Optimizer.ADAM: 8.0, Optimizer.ADAM_8BIT: _ADAM_8BIT_BYTES, Optimizer.ADAM_OFFLOADED: 0.0}
    kept = peaks.kept_with_checkpointing if training.checkpointing else peaks.kept_without_checkpointing
    how = "checkpointed" if training.checkpointing else "not checkpointed"
    worst = "scores and their gradients" if peaks.logits > peaks.one_block else "the way back through a block"
    return [
        Part("trained adapter", 4 * trained, f"rank {training.rank}, {trained / 1e6:.1f} M weights in 32 bits"),
        Part("gradients", 4 * trained),
        Part("optimizer", round(each[training.optimizer] * trained), training.optimizer.value),
        Part("activations", kept, f"{2 * training.pairs} × {training.row_tokens} tokens, {how}"),
        Part("training step", max(peaks.logits, peaks.one_block), worst),
    ]


CUDA_RUNTIME_BYTES = 600 * MIB
"""CUDA's context with the kernels of torch, cuBLAS and bitsandbytes, and cuBLAS's workspace (assumed)."""
_CPU_RUNTIME_BYTES = 600 * MIB
"""Python with torch, transformers and peft: 0.40 GiB (measured), and room for bitsandbytes and a trainer (assumed)."""
_LIGHT_RUNTIME_BYTES = 150 * MIB
"""Python with the daemon and llama.cpp, 55 MiB, and llama.cpp's vocabulary and buffers, 70 (measured with the starter)."""
_FRAGMENTS = 0.05
"""Of what comes and goes: holes that the allocator cannot use (assumed)."""
_SYSTEM_BYTES = 2 * GIB
"""What the system, the editor and a browser keep for themselves of a machine's RAM (assumed)."""


def _allowances(workload: Workload, held: list[Part]) -> list[Part]:
    come_and_go = sum(part.bytes for part in held if part.name not in ("layers", "embeddings", "head"))
    if workload.device is Device.CUDA:
        runtime = Part("runtime", CUDA_RUNTIME_BYTES, "CUDA context and kernels, assumed")
        return [runtime, Part("fragments", round(_FRAGMENTS * come_and_go), "holes in the allocator's blocks, assumed")]
    light = workload.quantisation is Quantisation.GGUF
    return [
        Part("runtime", _LIGHT_RUNTIME_BYTES if light else _CPU_RUNTIME_BYTES, "Python and its libraries"),
        Part("system", _SYSTEM_BYTES, "left for the system and the editor, assumed"),
    ]
