"""What it looks like when a device has no memory left, and what to tell about it.

Knows the names of the errors; what is given up for more room is the decode loop's business.
"""

import torch

from agent.errors import MemoryFullError

_CPU_WORDS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad allocation")
"""How PyTorch's allocator for CPUs says it, in a plain RuntimeError."""
_CUDA_WORDS = ("cuda error: out of memory", "cublas_status_alloc_failed")
"""How CUDA and its libraries say it where they allocate past PyTorch's allocator: handles, contexts, recorded graphs."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that no memory was left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in (*_CPU_WORDS, *_CUDA_WORDS))


def return_unused(device: torch.device) -> None:
    """Give what the allocator keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def full(device: torch.device, wanted: str, more: str = "") -> MemoryFullError:
    """Return the error for a device that has no memory for `wanted`; `more` is what else there is to know."""
    where = "the GPU" if device.type == "cuda" else "this machine"
    smaller = 'set engine.quantisation = "nf4"' if device.type == "cuda" else "choose a smaller model in model.name"
    return MemoryFullError(
        f"{where} has no memory left for {wanted}; {more}close other programs, lower engine.context_tokens or {smaller}"
    )
