"""Many calls leave the process as a few did."""

import collections
import gc

import psutil
import pytest
import torch
from tiny import build_model, make_prompt

from hf_sirius import make_sparse
from hf_sirius.decode.costs import costs_of


NUM_CALLS = 1000
# More than the allocator's own noise, and less than what a tiny number of tensors, kept by each call, would take.
MOST_BYTES = 24 * 2**20


def count_objects() -> collections.Counter:
    gc.collect()
    return collections.Counter(type(value).__qualname__ for value in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_thousand_generations_leave_memory_and_costs_where_they_were(is_made_anew):
    model = build_model(dtype=torch.float32)
    fields = {"method": "griffin", "density": 0.5, "threshold": 1.0, "kernel_size": "auto"}
    kept = make_sparse(model, **fields)

    def call(number: int) -> None:
        twin = make_sparse(model, **fields) if is_made_anew else kept
        model.generate(
            make_prompt(1 + number % 20, number % 7), max_new_tokens=8, do_sample=False, assistant_model=twin
        )

    for number in range(100):
        call(number)
    before, bytes_before = count_objects(), psutil.Process().memory_info().rss
    for number in range(NUM_CALLS):
        call(number)
    grown = {name: num for name, num in (count_objects() - before).items() if num >= NUM_CALLS // 10}
    assert not grown, "objects that calls leave behind"
    assert psutil.Process().memory_info().rss - bytes_before < MOST_BYTES
    costs, _ = costs_of(model, kept.sirius_config)
    assert 0 < len(costs._of_tokens) <= 32 and max(len(of_n._latest) for of_n in costs._of_tokens.values()) <= 33
