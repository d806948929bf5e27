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
MOST_BYTES = 4 * 2**20  # of the allocator's own; a call's KV-cache takes up to 7 KiB


def count_objects() -> collections.Counter:
    gc.collect()
    return collections.Counter(type(value).__qualname__ for value in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize(("kernel_size", "is_made_anew"), [(4, False), (4, True), ("auto", False)])
def test_a_thousand_generations_leave_memory_and_costs_where_they_were(kernel_size, is_made_anew):
    model = build_model(dtype=torch.float32)
    fields = {"method": "griffin", "density": 0.5, "threshold": 1.0, "kernel_size": kernel_size}
    kept = make_sparse(model, **fields)

    def call(number: int) -> None:
        twin = make_sparse(model, **fields) if is_made_anew else kept
        prompt = make_prompt(1 + number % 20, number % 7)
        model.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=twin)
        assert twin.stats.num_drafted or kernel_size == "auto"

    for number in range(100):
        call(number)
    before, bytes_before = count_objects(), psutil.Process().memory_info().rss
    for number in range(NUM_CALLS):
        call(number)
    grown = {name: num for name, num in (count_objects() - before).items() if num >= NUM_CALLS // 10}
    assert not grown, "objects that calls leave behind"
    assert psutil.Process().memory_info().rss - bytes_before < MOST_BYTES
    costs, _ = costs_of(model, kept.sirius_config)
    assert len(costs._of_tokens) <= 32
