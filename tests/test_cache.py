"""The growing cache against transformers' own, operation by operation."""

from __future__ import annotations

import copy
import random

import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_dovetail.cache import GrowingCache, GrowingLayer, can_branch, num_cache_layers

LAYERS = 2


def states(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of `count` positions for every layer; recognisable, and different in each layer."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(1, 2, count, 4, generator=generator) for _ in range(2)) for _ in range(LAYERS)]


def append(cache: DynamicCache, new: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [cache.update(keys, values, layer) for layer, (keys, values) in enumerate(new)]


def rows(new: list[tuple[Tensor, Tensor]], path: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [(keys[:, :, path], values[:, :, path]) for keys, values in new]


def assert_equal(cache: DynamicCache, expected: DynamicCache) -> None:
    for found, wanted in zip(tiny.cache_states(cache), tiny.cache_states(expected), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("capacity", [0, 30, 500])
@pytest.mark.parametrize("seed", range(4))
def test_rounds_of_update_and_keep_leave_what_a_dynamic_cache_would_hold(seed: int, capacity: int) -> None:
    """Guards keep (off by one, overlapping moves) and growth beyond the buffer, over several hundred positions."""
    rng = random.Random(seed)
    cache, plain = GrowingCache(LAYERS, capacity), DynamicCache()
    prompt = states(rng.randrange(1, 40), seed)
    append(cache, prompt), append(plain, prompt)
    moved = 0
    for step in range(60):
        start, new = cache.length, states(rng.randrange(1, 17), 1000 * seed + step)
        count = new[0][0].shape[2]
        returned = append(cache, new)
        assert returned[0][0].shape[2] == start + count
        assert torch.equal(returned[1][1][:, :, start:], new[1][1])
        cache.check_integrity(start + count)
        path = [0, *sorted(rng.sample(range(1, count), rng.randrange(count)))]
        moved += path != list(range(len(path)))
        cache.keep(start, tuple(path))
        append(plain, rows(new, path))
        cache.check_integrity(start + len(path))
        assert_equal(cache, plain)
    assert moved > 10
    assert cache.length > 128


def test_truncate_forgets_the_end_and_is_written_over() -> None:
    cache, plain = GrowingCache(LAYERS), DynamicCache()
    first, second = states(10, 1), states(3, 2)
    append(cache, first)
    cache.truncate(4)
    cache.check_integrity(4)
    append(cache, second)
    append(plain, rows(first, [0, 1, 2, 3])), append(plain, second)
    assert_equal(cache, plain)
    cache.truncate(7)
    cache.check_integrity(7)


def test_growth_copies_only_when_the_buffer_is_full() -> None:
    """Guards the preallocation: no `torch.cat` of the whole cache per round."""
    cache = GrowingCache(LAYERS, capacity=100)
    append(cache, states(10, 1))
    buffer = cache.layers[0].keys.data_ptr()
    for step in range(30):
        append(cache, states(3, step))
        assert cache.layers[0].keys.data_ptr() == buffer
    append(cache, states(1, 99))
    cache.check_integrity(101)
    assert cache.layers[0].keys.data_ptr() != buffer


def test_states_change_by_its_own_operations_only() -> None:
    layer = GrowingLayer()
    layer.update(*states(3, 1)[0])
    with pytest.raises(AttributeError, match="update, keep and crop only"):
        layer.keys = torch.zeros(1, 2, 3, 4)
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(*states(2, 2)[0])
    assert torch.equal(layer.keys, states(2, 2)[0][0])


def config_of(family: str) -> object:
    return tiny.build(family).config


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("held", [0, 3, 7, 8, 20])
def test_adopt_and_export_carry_a_conversation_through(family: str, held: int) -> None:
    """Guards sliding layers, which have dropped old positions, around the window's edge (8)."""
    config = config_of(family)
    given, plain = DynamicCache(config=config), DynamicCache(config=config)
    past, new, path = states(held, 1), states(6, 2), [0, 2, 5]
    if held:
        append(given, past), append(plain, past)
    before = [None if s is None else s.clone() for s in tiny.cache_states(given)]
    cache = GrowingCache.adopt(given, LAYERS, capacity=4)
    cache.check_integrity(held)
    append(cache, new)
    cache.keep(held, path)
    assert all(b is None or torch.equal(a, b) for a, b in zip(tiny.cache_states(given), before, strict=True))
    cache.export(given)
    append(plain, rows(new, path))
    cache.check_integrity(held + 3)
    tiny.assert_same_cache(plain, given)
    assert_equal(given, plain)
    later = states(2, 3)  # and it goes on as a DynamicCache
    for found, wanted in zip(append(given, later), append(plain, later), strict=True):
        assert torch.equal(found[0], wanted[0])
    assert any(isinstance(layer, DynamicSlidingWindowLayer) for layer in given.layers) == (
        family in ("mistral", "gemma2")
    )


def test_adopting_twice_shares_no_memory() -> None:
    """Guards two answers continued from one conversation."""
    given = DynamicCache()
    append(given, states(5, 1))
    one, two = GrowingCache.adopt(given, LAYERS, 0), GrowingCache.adopt(given, LAYERS, 0)
    append(one, states(2, 2)), append(two, states(2, 3))
    assert torch.equal(one.layers[0].keys[:, :, :5], two.layers[0].keys[:, :, :5])
    assert not torch.equal(one.layers[0].keys, two.layers[0].keys)
    assert torch.equal(given.layers[0].keys, states(5, 1)[0][0])


def test_a_deep_copy_goes_its_own_way() -> None:
    """After moves on the CPU too, which go through another view of the buffers."""
    cache, others = GrowingCache(LAYERS), DynamicCache()
    append(cache, states(6, 1))
    cache.keep(2, [1, 3])
    copied = copy.deepcopy(cache)
    append(copied, states(3, 2)), copied.keep(4, [2])
    append(others, rows(states(6, 1), [0, 1, 3, 5])), append(others, rows(states(3, 2), [2]))
    assert_equal(copied, others)
    others.crop(-1)
    assert_equal(cache, others)


def test_only_plain_attention_caches_can_branch() -> None:
    config = config_of("gemma2")
    assert can_branch(DynamicCache(config=config))
    assert not can_branch(DynamicCache(config=config_of("lfm2")))
    assert not can_branch(tiny.offloaded(config))
    assert not can_branch(StaticCache(config=config, max_cache_len=8))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "lfm2"])
def test_the_number_of_layers_is_that_of_the_models_own_cache(family: str) -> None:
    config = config_of(family)
    assert num_cache_layers(config) == config.num_hidden_layers
