"""Keys and values of texts that were read, kept for what is asked next: the longest common beginning is not read again.

Each place in the code has a cache of its own, as `slots.py` chooses; explanations have one. What another place has of a
prompt's beginning is copied from there, which costs microseconds, where reading costs milliseconds a token. A cache
belongs to an adapter: another adapter's keys and values are other numbers.

Built on transformers' cache classes. Its own layers append by concatenation, which copies a whole prompt's keys with
each token; these have room at their end instead, and cropping moves no memory. Knows tokens and tensors, no text.

All of it but `held` belongs to the engine's worker thread.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from agent.engines.base import GenerationRequest, Task
from agent.engines.out_of_memory import is_out_of_memory
from agent.engines.slots import Slots, common
from agent.errors import UnknownModelError

_ROOM_TOKENS = 256
"""Room is made in multiples of this: a completion fits in the first one that is made for its prompt."""


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # the base's own way of being subclassed
    """One layer's keys and values, in tensors with room for more at their end.

    `keys` and `values` are views of them, (1, H, T, D), which is all that the base class looks at.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms: list[torch.Tensor] = []  # keys', values'

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (1, H, T, D) each, and return all keys and values."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        total = before + key_states.shape[-2]
        if not self._rooms or self._rooms[0].shape[-2] < total:
            olds = (self.keys, self.values)
            self._rooms = [
                self._roomier(new, old, before, total)
                for new, old in zip((key_states, value_states), olds, strict=True)
            ]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, before:total] = new
        self.keys, self.values = (room[:, :, :total] for room in self._rooms)
        return self.keys, self.values

    @staticmethod
    def _roomier(new: torch.Tensor, old: torch.Tensor | None, used: int, needed: int) -> torch.Tensor:
        size = -(-needed // _ROOM_TOKENS) * _ROOM_TOKENS
        room = new.new_empty((*new.shape[:2], size, new.shape[-1]))
        if used and old is not None:
            room[:, :, :used] = old
        return room

    @property
    def nbytes(self) -> int:
        """Memory that it takes, room included."""
        return sum(room.nbytes for room in self._rooms)


class PrefixCache:
    """Keys and values of the beginning of one text."""

    def __init__(self, n_layers: int) -> None:
        """Hold nothing."""
        self.ids: list[int] = []
        """The tokens whose keys and values are here; for others' eyes a list that only grows, or is replaced."""
        self.adapter: str | None = None
        self.in_use = False
        """Whether a stream is open that reads into it."""
        self._rooms: list[RoomyLayer] = []
        self._n_layers = n_layers
        self.give_up()

    def __len__(self) -> int:
        """Return how many tokens are here."""
        return len(self.ids)

    def shared(self, ids: list[int], adapter: str | None) -> int:
        """Return how many tokens at the beginning of `ids` are here, as this adapter computes them."""
        return common(self.ids, ids) if adapter == self.adapter else 0

    def keep(self, ids: list[int], adapter: str | None) -> None:
        """Keep what belongs to the beginning of `ids`, and nothing else."""
        self.crop(self.shared(ids, adapter))
        self.adapter = adapter

    def crop(self, count: int) -> None:
        """Keep the first `count` tokens."""
        if count < len(self.ids):
            self.layers.crop(count - len(self.ids))
            self.ids = self.ids[:count]

    def copy(self, other: "PrefixCache", count: int) -> None:
        """Take over the first `count` tokens of another cache, in place of everything here."""
        self.crop(0)
        for mine, others in zip(self._rooms, other._rooms, strict=True):
            if others.keys is not None and others.values is not None:
                mine.update(others.keys[:, :, :count], others.values[:, :, :count])
        self.ids, self.adapter = other.ids[:count], other.adapter

    def give_up(self) -> None:
        """Hold nothing, and free the memory; also what a pass that failed half-way has left."""
        self.ids, self.adapter = [], None
        self._rooms = [RoomyLayer() for _ in range(self._n_layers)]
        self.layers = Cache(layers=[*self._rooms])

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(layer.nbytes for layer in self._rooms)


class Shelf:
    """All caches of an engine."""

    def __init__(self, n_layers: int, completion_slots: int) -> None:
        """Make empty caches: one for each place in the code, and one for explanations."""
        self._n_layers = n_layers
        self._completions = [PrefixCache(n_layers) for _ in range(completion_slots)]
        self._explanation = PrefixCache(n_layers)
        self._slots = Slots(completion_slots)

    def another(self) -> "Shelf":
        """Return an empty shelf for the same model."""
        return Shelf(self._n_layers, len(self._completions))

    def take(self, request: GenerationRequest, prompt: list[int]) -> tuple[PrefixCache, list[int]]:
        """Return the cache for a request, holding of its prompt what can be had without computing.

        Args:
            request: What is asked.
            prompt: Its prompt.

        Returns:
            The cache, which is in use until `in_use` is cleared, and what was behind this very prompt in it: what was
            written, or drafted, when it was last asked.
        """
        if request.task is Task.COMPLETION:
            slot, _ = self._slots.choose(tuple(prompt), request.adapter, ahead=request.ahead)
            cache = self._completions[slot] = self._free(self._completions[slot])
        else:
            cache = self._explanation = self._free(self._explanation)
        tail = self._fill(cache, request, prompt)
        cache.in_use = True
        return cache, tail

    def _fill(self, cache: PrefixCache, request: GenerationRequest, prompt: list[int]) -> list[int]:
        if not request.cached:
            cache.keep([], request.adapter)
            return []
        shares = [each.shared(prompt, request.adapter) for each in self._all()]
        richest = self._all()[shares.index(max(shares))]
        tail = richest.ids[len(prompt) :] if max(shares) == len(prompt) else []
        if max(shares) > cache.shared(prompt, request.adapter):
            self._copy(cache, richest, max(shares))
        cache.keep(prompt, request.adapter)
        return tail

    def _free(self, cache: PrefixCache) -> PrefixCache:
        # Two streams in one cache would take turns at reading what the other crops. The one that was there keeps it.
        return PrefixCache(self._n_layers) if cache.in_use else cache

    def _copy(self, cache: PrefixCache, richest: PrefixCache, count: int) -> None:
        try:
            cache.copy(richest, count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            cache.give_up()  # it is read then, as far as there is room for that

    def held(self, prompt_ids: Sequence[int], adapter: str | None) -> int:
        """Return how many tokens of a completion's prompt are computed, with this adapter.

        May be called from any thread: a list of ids that grows meanwhile is looked at as it was or as it is.
        """
        ids = list(prompt_ids)
        return max(each.shared(ids, adapter) for each in self._completions)

    def forget(self, adapters: Callable[[str | None], bool]) -> None:
        """Give up the caches of those adapters for which the answer is yes."""
        for each in self._all():
            if adapters(each.adapter):
                each.give_up()

    def give_up_others(self, kept: PrefixCache | None = None) -> int:
        """Give up all caches but one, and return how many bytes that frees."""
        doomed = [each for each in self._all() if each is not kept]
        freed = sum(each.nbytes for each in doomed)
        for each in doomed:
            each.give_up()
        return freed

    @property
    def nbytes(self) -> int:
        """Memory that all of them take."""
        return sum(each.nbytes for each in self._all())

    def _all(self) -> list[PrefixCache]:
        return [*self._completions, self._explanation]


def n_cached_layers(config: PretrainedConfig, name: str) -> int:
    """Return how many layers keep keys and values.

    Layers that look at a window only get all tokens here, and the mask hides the ones outside: their keys can be
    cropped then, which a window's cannot.

    Raises:
        UnknownModelError: The model has layers whose state cannot be cropped.
    """
    layers = DynamicCache(config=config).layers
    odd = sorted({type(each).__name__ for each in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__})
    if odd:
        raise UnknownModelError(
            f"{name} keeps states that cannot be taken back ({', '.join(odd)}); run it as a GGUF file in llama.cpp"
        )
    return len(layers)
