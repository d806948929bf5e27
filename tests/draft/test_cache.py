"""Room in the KV-cache: the same states as in stock layers, without a copy for every token."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_sirius import make_sparse
from hf_sirius.draft.cache import RoomyLayer, roomy


HEADS, HEAD_DIM = 2, 3


def states(length, dtype=torch.float32):
    return torch.randn(1, HEADS, length, HEAD_DIM).to(dtype)


STEPS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 80)),
    st.tuples(st.just("crop"), st.integers(0, 80)),
    st.tuples(st.just("transposed"), st.integers(1, 5)),
    st.tuples(st.just("reorder"), st.just(0)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("swap"), st.just(0)),
)


@given(steps=st.lists(STEPS, max_size=25), seed=st.integers(0, 2**20))
@settings(max_examples=200, deadline=None)
def test_the_states_are_those_of_a_stock_layer(steps, seed):
    torch.manual_seed(seed)
    caches = [DynamicCache(), DynamicCache()]
    first = states(4)
    for cache in caches:
        cache.update(first, -first, 0)
    with roomy(caches[0]):
        for name, size in steps:
            if name in ("update", "transposed"):
                new = states(size) if name == "update" else torch.randn(1, size, HEADS, HEAD_DIM).transpose(1, 2)
                returned = [cache.update(new, -new, 0) for cache in caches]
                assert all(map(torch.equal, *returned))
            else:
                for i, cache in enumerate(caches):
                    if name == "crop":
                        cache.crop(-min(size, cache.get_seq_length()))
                    elif name == "reorder":
                        cache.reorder_cache(torch.tensor([0]))
                    elif name == "swap":
                        layer = cache.layers[0]
                        layer.keys, layer.values = layer.values, layer.keys
                    elif name == "reset":
                        cache.reset()
                    elif i == 1:
                        caches[1] = copy.deepcopy(cache)
            assert caches[0].get_seq_length() == caches[1].get_seq_length()
        assert type(caches[0].layers[0]) is RoomyLayer
    assert type(caches[0].layers[0]) is DynamicLayer
    assert vars(caches[0].layers[0]).keys() == vars(caches[1].layers[0]).keys()
    new = states(2)
    assert all(map(torch.equal, *[cache.update(new, -new, 0) for cache in caches]))


def test_states_are_not_copied_for_every_token():
    cache = DynamicCache()
    cache.update(states(10), states(10), 0)
    with roomy(cache):
        addresses = set()
        for _ in range(300):
            cache.update(states(1), states(1), 0)
            addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) < 10


def test_nothing_is_written_over_what_the_user_holds():
    """A cropped tensor has room behind it, too: the user's."""
    cache, whole = DynamicCache(), states(10)
    cache.update(whole, whole, 0)
    kept = cache.layers[0].keys
    cache.crop(-4)
    expected = kept.clone()
    with roomy(cache):
        cache.update(states(3), states(3), 0)
    assert torch.equal(kept, expected)


def test_a_cache_of_another_dtype_is_joined_as_stock_does():
    cache = DynamicCache()
    cache.update(states(4, torch.bfloat16), states(4, torch.bfloat16), 0)
    with roomy(cache):
        keys, _ = cache.update(states(2), states(2), 0)
        assert keys.dtype == torch.float32
        assert cache.update(states(1), states(1), 0)[0].shape == (1, HEADS, 7, HEAD_DIM)


@pytest.mark.parametrize("at_end", ["normal", "error"])
def test_layers_are_roomy_for_a_call(at_end):
    model, seen, cache = build_model(), [], DynamicCache()

    class Note(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.extend(type(layer) for layer in cache.layers)
            if at_end == "error" and len(seen) > 20:
                raise RuntimeError("in the middle")
            return scores

    with make_sparse(model, method="griffin") as sparse:
        try:
            model.generate(
                make_prompt(),
                assistant_model=sparse,
                max_new_tokens=12,
                past_key_values=cache,
                logits_processor=[Note()],
            )
        except RuntimeError:
            assert at_end == "error"
    assert RoomyLayer in seen
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}


def test_other_layers_are_left_alone():
    config = build_model().config
    config.sliding_window, config.layer_types = 4, ["sliding_attention", "full_attention"]
    cache = DynamicCache(config=config)
    with roomy(cache):
        assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, RoomyLayer]
