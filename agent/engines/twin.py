"""A second module tree over the same weights: one serves while the other is trained.

Two copies of a 7B do not fit a 12 GB card, and training changes the tree it is given: layers are wrapped, forwards
patched, hooks set. So the twin has modules and parameters of its own, but not one byte of weights: its tensors are views
of the same storages, with the constants that go with quantised ones. What is trained are the small matrices that PEFT
adds to the twin; the frozen weights below are read by both and written by none.

A twin must be made before either tree is wrapped, and must not be moved or cast: both would copy. Knows bitsandbytes'
layers, no training.

Invariant: the serving tree's logits are bit for bit the same before, while and after its twin is trained.
"""

import copy
from typing import Any, TypeVar

import torch

from agent.errors import EngineError

M = TypeVar("M", bound=torch.nn.Module)


def twin_of(module: M) -> M:
    """Return another tree over the weights of `module`.

    Raises:
        EngineError: The tree was wrapped, spread over several devices, or repacked for one kind of processor.
    """
    memo: dict[int, Any] = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "_hf_hook") or hasattr(layer, "base_layer"):
            raise EngineError(f"{name or 'the model'} was wrapped already; make its twin first")
        _share_packing(layer, memo)
    for parameter in module.parameters():
        memo[id(parameter)] = _shared(parameter)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(module, memo)


def _shared(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a parameter of its own kind over the same storage, so that flags and casts of one are not the other's."""
    kind: Any = type(parameter)
    if kind.__name__ == "Params4bit":
        return copy.copy(parameter)  # bitsandbytes copies the object alone: data and constants are the same
    if kind.__name__ == "Int8Params":
        names = ("has_fp16_weights", "CB", "SCB")
        facts = {name: getattr(parameter, name) for name in names}
        other: torch.nn.Parameter = kind(parameter.data, requires_grad=False, **facts)
        return other
    return torch.nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)


def _share_packing(layer: Any, memo: dict[int, Any]) -> None:
    """Enter into `memo` what belongs to a quantised layer's weights without being a parameter."""
    kind = type(layer).__name__
    if kind == "Linear4bit":
        constants = layer.weight.quant_state
        if getattr(constants, "packing_format_for_cpu", False):
            raise EngineError("the model's weights were repacked for this processor; load it again")
        # Where the processor has AVX-512 for bfloat16, the first pass would repack one tree's weights and double them.
        layer.support_avx512bf16_for_cpu = False
        memo[id(constants)] = constants
        if layer.quant_state is not None:
            memo[id(layer.quant_state)] = layer.quant_state
    elif kind == "Linear8bitLt":
        if layer.weight.CB is not None:
            layer.init_8bit_state()  # as its first pass would do: after that, the weights are in the state
        # Each tree has a state of its own, since a pass writes into it; the tensors in it are the same.
        memo[id(layer.state)] = copy.copy(layer.state)
