"""Keys and values that are kept: the same numbers as the library's, wherever they come from."""

import random
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")

import torch
from transformers import MambaConfig, Qwen2Config
from transformers.cache_utils import DynamicLayer

from agent.engines import kv_cache
from agent.engines.base import GenerationRequest, Task
from agent.engines.kv_cache import PrefixCache, RoomyLayer, Shelf, n_cached_layers
from agent.errors import UnknownModelError


def states(count: int, seed: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, count, 4, generator=generator), torch.randn(1, 2, count, 6, generator=generator)


def test_a_roomy_layer_is_the_librarys_but_for_its_room() -> None:
    rng = random.Random(1)
    ours, theirs = RoomyLayer(), DynamicLayer()
    for number in range(200):
        if rng.random() < 0.3 and ours.get_seq_length():
            count = rng.randint(0, ours.get_seq_length() // rng.choice((1, 9)))
            ours.crop(-count)
            theirs.crop(-count)
        else:
            keys, values = states(rng.randint(1, 90), number)
            for one, other in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
                assert torch.equal(one, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    assert ours.get_seq_length() > 256  # it had to make room more than once


def rooms(cache: PrefixCache) -> list[Any]:
    return list(cache.layers.layers)


def fill(cache: PrefixCache, ids: list[int]) -> None:
    """Have it hold keys and values that tell their token."""
    for layer in rooms(cache):
        column = torch.tensor(ids, dtype=torch.float32).view(1, 1, -1, 1)
        layer.update(column.expand(1, 2, -1, 4), column.expand(1, 2, -1, 4))
    cache.ids += ids


def held(cache: PrefixCache) -> list[list[int]]:
    return [layer.keys[0, 0, :, 0].int().tolist() for layer in rooms(cache)]


def take(shelf: Shelf, *prompt: int, in_use: bool = False, **more: Any) -> tuple[PrefixCache, list[int]]:
    cache, tail = shelf.take(GenerationRequest(prompt, 8, **more), list(prompt))
    cache.in_use = in_use
    return cache, tail


def test_what_is_common_is_kept() -> None:
    shelf = Shelf(2, 2)
    cache, tail = take(shelf, 1, 2, 3)
    assert tail == []
    fill(cache, [1, 2, 3, 4, 5])
    again, tail = take(shelf, 1, 2, 3)
    assert again is cache
    assert (cache.ids, tail) == ([1, 2, 3], [4, 5])
    assert held(cache) == [[1, 2, 3]] * 2
    other, tail = take(shelf, 1, 2, 9)
    assert (other.ids, tail) == ([1, 2], [])
    assert shelf.held([1, 2, 9, 9], None) == 2


def test_another_place_gives_what_it_has() -> None:
    shelf = Shelf(2, 3)
    first, _ = take(shelf, *range(1, 11))
    fill(first, list(range(1, 11)))
    # Shares a tenth: too little to take the slot, but not to be copied.
    second, _ = take(shelf, 1, 2, *range(50, 68))
    assert second is not first
    assert held(second) == [[1, 2]] * 2
    assert held(first) == [list(range(1, 11))] * 2
    fill(second, [50])
    assert held(first)[0] == list(range(1, 11))
    explanation, _ = take(shelf, 1, 2, 3, task=Task.EXPLANATION)
    assert explanation not in (first, second)
    assert held(explanation)[0] == [1, 2, 3]


def test_a_cache_in_use_stays_with_its_stream() -> None:
    shelf = Shelf(2, 2)
    first, _ = take(shelf, 1, 2, 3, in_use=True)
    second, _ = take(shelf, 1, 2, 3)
    assert second is not first
    assert take(shelf, 1, 2, 3)[0] is second


def test_each_adapter_computes_for_itself() -> None:
    shelf = Shelf(2, 2)
    bare, _ = take(shelf, 1, 2, 3, 4)
    fill(bare, [1, 2, 3, 4])
    with_a, _ = take(shelf, 1, 2, 3, 4, adapter="a")
    assert with_a is not bare
    assert with_a.ids == []
    fill(with_a, [1, 2, 3])
    assert shelf.held([1, 2, 3, 4], "a") == 3
    assert shelf.held([1, 2, 3, 4], None) == 4
    assert shelf.held([1, 2, 3, 4], "b") == 0
    shelf.forget(lambda name: name == "a")
    assert (with_a.ids, with_a.nbytes) == ([], 0)
    assert bare.ids == [1, 2, 3, 4]


def test_uncached_means_uncached() -> None:
    shelf = Shelf(2, 2)
    cache, _ = take(shelf, 1, 2, 3)
    fill(cache, [1, 2, 3])
    again, tail = take(shelf, 1, 2, 3, cached=False)
    assert again is cache
    assert (again.ids, tail) == ([], [])


def test_giving_up_frees_all_but_one() -> None:
    shelf = Shelf(2, 3)
    kept, _ = take(shelf, *range(1, 9))
    other, _ = take(shelf, *range(11, 19))
    for cache, ids in ((kept, [1, 2]), (other, [5, 6])):
        fill(cache, ids)
    before = shelf.nbytes
    assert shelf.give_up_others(kept) == before - kept.nbytes > 0
    assert (kept.ids, other.ids) == ([1, 2], [])
    assert shelf.give_up_others(kept) == 0
    assert shelf.give_up_others() == before // 2


def test_a_copy_for_which_there_is_no_room_is_read_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(2, 2)
    first, _ = take(shelf, *range(1, 11))
    fill(first, list(range(1, 11)))

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(kv_cache.PrefixCache, "copy", full)
    second, tail = take(shelf, 1, 2, *range(50, 68))
    assert (second.ids, tail) == ([], [])


def test_layers_that_cannot_be_taken_back_are_refused() -> None:
    assert n_cached_layers(Qwen2Config(num_hidden_layers=3), "qwen") == 3
    with pytest.raises(UnknownModelError, match="mamba keeps states that cannot be taken back"):
        n_cached_layers(MambaConfig(num_hidden_layers=2), "mamba")
