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


def test_what_lies_behind_the_last_token_is_a_number() -> None:
    # A recorded step multiplies it by nothing, and nothing times NaN is NaN.
    layer = RoomyLayer()
    for number in range(4):
        layer.update(*states(90, number))
        for room in layer.make_room(layer.get_seq_length() + 1):
            assert bool((room[:, :, layer.get_seq_length() :] == 0).all())


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
    shelf = Shelf(2, 2, 1 << 20)
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
    shelf = Shelf(2, 3, 1 << 20)
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
    shelf = Shelf(2, 2, 1 << 20)
    first, _ = take(shelf, 1, 2, 3, in_use=True)
    second, _ = take(shelf, 1, 2, 3)
    assert second is not first
    assert take(shelf, 1, 2, 3)[0] is second


def test_each_adapter_computes_for_itself() -> None:
    shelf = Shelf(2, 2, 1 << 20)
    bare, _ = take(shelf, 1, 2, 3, 4)
    fill(bare, [1, 2, 3, 4])
    with_a, _ = take(shelf, 1, 2, 3, 4, adapter="a")
    assert with_a is not bare
    assert with_a.ids == []
    fill(with_a, [1, 2, 3])
    assert shelf.held([1, 2, 3, 4], "a") == 3
    assert shelf.held([1, 2, 3, 4]) == 4
    assert shelf.held([1, 2, 3, 4], "b") == 0
    shelf.forget(lambda name: name == "a")
    assert (with_a.ids, with_a.nbytes) == ([], 0)
    assert bare.ids == [1, 2, 3, 4]


def test_uncached_means_uncached() -> None:
    shelf = Shelf(2, 2, 1 << 20)
    cache, _ = take(shelf, 1, 2, 3)
    fill(cache, [1, 2, 3])
    again, tail = take(shelf, 1, 2, 3, cached=False)
    assert again is cache
    assert (again.ids, tail) == ([], [])


def test_giving_up_frees_all_but_one() -> None:
    shelf = Shelf(2, 3, 1 << 20)
    kept, _ = take(shelf, *range(1, 9))
    other, _ = take(shelf, *range(11, 19))
    for cache, ids in ((kept, [1, 2]), (other, [5, 6])):
        fill(cache, ids)
    before = shelf.nbytes
    assert shelf.give_up_others(kept) == before - kept.nbytes > 0
    assert (kept.ids, other.ids) == ([1, 2], [])
    assert shelf.give_up_others(kept) == 0
    assert shelf.give_up_others() == before // 2


def shelf_tokens(shelf: Shelf) -> int:
    """Return the room of all caches by the bytes that `fill` puts there: 2 layers of (1, 2, T, 4) keys and values."""
    return shelf.nbytes // (2 * 2 * 2 * 4 * 4)


def read(shelf: Shelf, cache: PrefixCache, ids: list[int]) -> None:
    """Have it read tokens, as the decode loop does."""
    shelf.make_way(len(cache) + len(ids), cache)
    fill(cache, ids)


def test_all_caches_together_take_what_is_planned() -> None:
    shelf = Shelf(2, 6, 1024)  # two contexts of 512 tokens
    for place in range(12):
        prompt = list(range(1000 * place, 1000 * place + 300))
        cache, _ = take(shelf, *prompt, task=Task.EXPLANATION if place % 4 == 3 else Task.COMPLETION)
        for at in range(0, 300, 100):
            read(shelf, cache, prompt[at : at + 100])
            assert shelf_tokens(shelf) <= 1024
        assert cache.ids == prompt
    assert shelf_tokens(shelf) == 1024


def test_what_was_used_longest_ago_goes_first() -> None:
    shelf = Shelf(2, 6, 768)  # room for three short texts
    caches = []
    for place in range(3):
        cache, _ = take(shelf, *range(100 * place, 100 * place + 20))
        read(shelf, cache, list(range(100 * place, 100 * place + 20)))
        caches.append(cache)
    assert take(shelf, *range(21))[0] is caches[0]
    read(shelf, caches[0], [20])
    fourth, _ = take(shelf, *range(300, 320))
    read(shelf, fourth, list(range(300, 320)))
    assert [len(each) for each in (*caches, fourth)] == [21, 0, 20, 20]


def test_a_stream_whose_place_was_taken_is_counted_and_goes_last() -> None:
    shelf = Shelf(2, 1, 512)
    lent, _ = take(shelf, *range(20), in_use=True)
    read(shelf, lent, list(range(20)))
    second, _ = take(shelf, *range(30, 50))
    assert second is not lent
    read(shelf, second, list(range(30, 50)))
    assert shelf_tokens(shelf) == 512  # both
    explanation, _ = take(shelf, *range(60, 80), task=Task.EXPLANATION)
    read(shelf, explanation, list(range(60, 80)))
    assert [len(each) for each in (lent, second, explanation)] == [20, 0, 20]
    read(shelf, explanation, list(range(80, 380)))  # as long as all may be together
    assert [len(each) for each in (lent, second, explanation)] == [0, 0, 320]
    lent.in_use = False


def test_what_has_no_room_beside_its_source_is_read_anew() -> None:
    shelf = Shelf(2, 2, 256)
    first, _ = take(shelf, *range(20))
    read(shelf, first, list(range(20)))
    second, tail = take(shelf, *range(4), *range(50, 80))
    assert second is not first
    assert (second.ids, tail, len(first)) == ([], [], 20)
    read(shelf, second, [0, 1])
    assert (len(first), shelf_tokens(shelf)) == (0, 256)


def test_a_copy_for_which_there_is_no_room_is_read_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(2, 2, 1 << 20)
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
