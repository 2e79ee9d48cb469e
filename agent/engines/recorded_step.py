"""A decode step that is recorded once and played back: on a GPU one launch takes the place of a thousand.

A pass over one token is little work for a GPU and much for Python: of 32 ms a token of a 7B in four bits on an H200, less
than a tenth was computing (LOG). CUDA graphs play such a pass back without Python. A recording fixes addresses and
sizes, so the step is laid out anew: the token, its place and the mask lie in tensors of their own, keys and values are
written where the place says, and attention looks at the whole room of a cache, of which the mask hides the rest.

A recording belongs to one cache's rooms and to one adapter. It is dropped when either goes, since it would read and write
where something else lies by then. Knows no text. All of it belongs to the engine's worker thread.
"""

import inspect
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from agent.engines.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)


class Recording:
    """One token's pass over one cache, with one adapter."""

    def __init__(self, rooms: Sequence[torch.Tensor]) -> None:
        """Lay out the step's inputs.

        Args:
            rooms: The cache's tensors, (1, H, R, D) each, R the same in all.
        """
        device, size = rooms[0].device, rooms[0].shape[-2]
        self._rooms = [weakref.ref(room) for room in rooms]
        self.ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self._mask = torch.zeros(1, 1, 1, size, dtype=torch.bool, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None
        self.has_run = False
        """Libraries set themselves up with the first pass, which cannot be recorded."""

    def is_for(self, rooms: Sequence[torch.Tensor]) -> bool:
        """Tell whether these are the very tensors that it was laid out for."""
        return len(rooms) == len(self._rooms) and all(
            ref() is room for ref, room in zip(self._rooms, rooms, strict=True)
        )

    def set(self, token_id: int, place: int) -> None:
        """Say which token stands at which place."""
        self.ids.fill_(token_id)
        self.place.fill_(place)
        self._mask[..., : place + 1] = True
        self._mask[..., place + 1 :] = False

    def run(self, module: torch.nn.Module, layers: Any) -> torch.Tensor:
        """Compute the step as it comes, and return the logits (1, V)."""
        answer = module(
            input_ids=self.ids,
            position_ids=self.place.unsqueeze(0),
            attention_mask=self._mask,
            past_key_values=layers,
            use_cache=True,
        )
        self.has_run = True
        logits: torch.Tensor = answer.logits[0]
        return logits

    def record(self, module: torch.nn.Module, layers: Any, pool: Any) -> None:
        """Record the step, where that was not done yet.

        Raises:
            RuntimeError: Recording failed, or computing; nothing was computed.
        """
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # Whoever trains in another thread may go on launching meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._logits = self.run(module, layers)
            self._graph = graph

    def play(self) -> torch.Tensor:
        """Compute the step by playing back what was recorded, and return the logits (1, V)."""
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits


class RecordedSteps:
    """Reads tokens one at a time for a decode loop."""

    def __init__(self, device: torch.device) -> None:
        """Record nothing yet. On a CPU the same step is computed each time: it is there to be tested."""
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._records = device.type == "cuda"

    def step(self, module: torch.nn.Module, cache: Any, token_id: int, adapter: str | None) -> torch.Tensor:
        """Read a token into a `PrefixCache` that holds at least one, and return the logits (1, V) behind it.

        The result is overwritten by the next step.
        """
        place = len(cache)
        rooms = cache.make_room(place + 1)
        recording = cache.recordings.get(adapter)
        if recording is None or not recording.is_for(rooms):
            recording = cache.recordings[adapter] = Recording(rooms)
        recording.set(token_id, place)
        with cache.placed(recording.place):
            logits = self._logits(recording, module, cache)
        cache.reaches(place + 1)
        return logits

    def _logits(self, recording: Recording, module: torch.nn.Module, cache: Any) -> torch.Tensor:
        if not self._records or not recording.has_run:
            return recording.run(module, cache.layers)
        try:
            recording.record(module, cache.layers, self._pool)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = _line(error)
        else:
            return recording.play()
        logits = recording.run(module, cache.layers)  # which raises again what it was that the model stumbled over
        self._records = False
        log.warning("decode steps of this model cannot be recorded, so each is launched: %s", reason)
        return logits


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def can_be_recorded(module: torch.nn.Module) -> bool:
    """Tell whether a model can be given its places, and one mask that serves all of its layers.

    Where some layers look at a window only, one mask does not serve all; and only PyTorch's own attention takes a mask of
    yes and no: others add it to the scores.
    """
    config: Any = module.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    takes = inspect.signature(module.forward).parameters.keys() >= {"position_ids", "attention_mask", "past_key_values"}
    is_masked = getattr(config, "_attn_implementation", None) == "sdpa"
    return takes and is_masked and kinds == {"full_attention"} and not has_window
