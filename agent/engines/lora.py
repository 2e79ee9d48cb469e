"""LoRA adapters in a transformers model: attached, chosen and detached through PEFT, while the base stays as it is.

PEFT puts a layer of its own around each matrix that an adapter changes; nothing is merged into the base, whatever it is
quantised to, and the base's tensors are never copied. Without an adapter such a layer returns what the base's returns, bit
for bit; once no adapter is attached the layers are taken out again. Adapters compute in float32, as they were trained.

Knows no requests, no threads and no caches: whoever owns the model calls it between two forward passes, and drops the
key-value caches of adapters that go.

Invariant: attaching is all or nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel

from agent import adapters
from agent.adapters import Lora
from agent.engines.base import Adapter
from agent.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn


class AdapterSwitch:
    """The adapters of one model."""

    def __init__(self, model: "nn.Module") -> None:
        """Take charge of the adapters of `model`, which has none yet.

        Args:
            model: Causal language model of transformers', in any precision that PEFT knows. It is used as before; while
                adapters are attached, its matrices are wrapped in place.
        """
        self._model = model
        self._tuner: LoraModel | None = None
        self._keys: dict[str, str] = {}
        self._made = 0
        self._selected: str | None = None
        self._layers: list[LoraLayer] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The attached adapters."""
        return tuple(self._keys)

    def attach(self, wanted: Sequence[Adapter]) -> None:
        """Have these adapters attached and no others; the one that is selected stays so if it is among them.

        Raises:
            AdapterError: One of them is damaged or does not fit the model; everything is as it was before.
        """
        # All are read and held against the model before anything is changed.
        new = [(each, _fitting(each, self._model)) for each in wanted if each.name not in self._keys]
        before, selected = dict(self._keys), self._selected
        try:
            for adapter, lora in new:
                self._add(adapter.name, lora)
        except BaseException:
            self._keep(before)
            self.select(selected)
            raise
        names = {each.name for each in wanted}
        self._keep({name: key for name, key in self._keys.items() if name in names})
        self.select(selected if selected in names else None)

    def select(self, name: str | None) -> None:
        """Have the next forward pass use an attached adapter, or none.

        Raises:
            AdapterError: No adapter of that name is attached.
        """
        if name is not None and name not in self._keys:
            raise AdapterError(f"the adapter {name!r} is not attached; attached are: {', '.join(self._keys) or 'none'}")
        # PEFT's own switch turns gradients on; with no active adapter a layer adds nothing to what the base returns.
        active = [] if name is None else [self._keys[name]]
        for layer in self._layers:
            layer.set_adapter(active, inference_mode=True)
        if self._tuner is not None:
            self._tuner.active_adapter = active
        self._selected = name

    def _add(self, name: str, lora: Lora) -> None:
        # A key of our own: PEFT's may hold no dot, and some names mean something to it.
        self._made += 1
        key = self._keys[name] = f"tabwise{self._made}"
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # used as a factor, and our adapters' may be no whole number
            target_modules=list(lora.modules),
            use_rslora=lora.is_rank_stabilised,
            inference_mode=True,
        )
        # Without memory of their own at first: what PEFT would fill in at random is overwritten anyway.
        if self._tuner is None:
            self._tuner = LoraModel(self._model, config, key, low_cpu_mem_usage=True)
        else:
            self._tuner.peft_config[key] = config
            self._tuner.inject_adapter(self._model, key, low_cpu_mem_usage=True)
        for path, halves in lora.modules.items():
            layer = self._model.get_submodule(path)
            assert isinstance(layer, LoraLayer)
            device = next(layer.get_base_layer().parameters()).device
            for half, matrix in ((layer.lora_A[key], halves.down), (layer.lora_B[key], halves.up)):
                half.weight = torch.nn.Parameter(torch.tensor(matrix, device=device), requires_grad=False)
            layer.eval()  # new parts of a module are in training mode
        self._layers = _layers(self._model)

    def _keep(self, keys: dict[str, str]) -> None:
        """Take out every adapter but these; with none left, the layers around the base's matrices as well."""
        gone = set(self._keys.values()) - set(keys.values())
        self._keys = dict(keys)
        if not keys:
            _unwrap(self._model)
            self._tuner, self._layers = None, []
            return
        assert self._tuner is not None
        for key in gone:
            self._tuner.peft_config.pop(key, None)
        for path, layer in _named_layers(self._model):
            layer.set_adapter([], inference_mode=True)  # or PEFT would choose another one, and warn of it
            for key in gone:
                layer.delete_adapter(key)
            if not layer.lora_A:
                _put(self._model, path, layer.get_base_layer())
        self._layers = _layers(self._model)


def _fitting(adapter: Adapter, model: "nn.Module") -> Lora:
    lora = adapters.load(adapter)
    for path, halves in lora.modules.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise AdapterError(
                f"the adapter {adapter.folder} is refused: the model has no {path}; choose the model it was made for"
            ) from None
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        wanted = (halves.up.shape[0], halves.down.shape[1])
        has = (getattr(base, "out_features", None), getattr(base, "in_features", None))
        if not isinstance(base, torch.nn.Linear) or has != wanted:
            raise AdapterError(
                f"the adapter {adapter.folder} is refused: made for {wanted[1]} to {wanted[0]} values at {path}, the model "
                f"has {has[1]} to {has[0]}; choose the model it was made for"
            )
    return lora


def _named_layers(model: "nn.Module") -> list[tuple[str, LoraLayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]


def _layers(model: "nn.Module") -> list[LoraLayer]:
    return [layer for _, layer in _named_layers(model)]


def _unwrap(model: "nn.Module") -> None:
    """Put the base's own modules back into their places."""
    for path, layer in _named_layers(model):
        _put(model, path, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _put(model: "nn.Module", path: str, module: "nn.Module") -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
