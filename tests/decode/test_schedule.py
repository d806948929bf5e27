"""A list of kernel sizes: what another call chose is chosen again, without a clock."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_prompt, shared_model

from hf_sirius import SiriusConfig, make_sparse


FIELDS = {"method": "griffin", "density": 0.6}
# A text in which something is found.
PROMPT = torch.cat([make_prompt(8), make_prompt(8), make_prompt(8)], dim=1)


def written(twin, seed: int = 0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": 24, "do_sample": True, **options}
    output = twin.dense_model.generate(PROMPT, assistant_model=twin, **options)
    return output, twin.stats.kernel_sizes


@pytest.mark.parametrize("threshold", [0.1, 1.0])
@pytest.mark.parametrize("do_sample", [False, True])
def test_what_the_clock_chose_comes_again(threshold, do_sample):
    fields = {**FIELDS, "threshold": threshold}
    with make_sparse(shared_model(), **fields, kernel_size="auto") as twin:
        for seed in range(3):
            output, kernel_sizes = written(twin, seed, do_sample=do_sample)
            assert len(kernel_sizes) == twin.stats.num_cycles
            cycles = twin.stats.cycles
            with make_sparse(shared_model(), **fields, kernel_size=kernel_sizes) as again:
                assert torch.equal(written(again, seed, do_sample=do_sample)[0], output)
                assert again.stats.kernel_sizes == kernel_sizes and again.stats.reason is None
                assert [c.drafted_ids for c in again.stats.cycles] == [c.drafted_ids for c in cycles]
                assert [c.is_lookup for c in again.stats.cycles] == [c.is_lookup for c in cycles]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 7, -2, -4]), min_size=1, max_size=6))
def test_a_schedule_is_followed_and_its_last_number_stays(kernel_sizes):
    with make_sparse(shared_model(), **FIELDS, threshold=1.0, kernel_size=kernel_sizes) as twin:
        assert twin.sirius_config.kernel_size == twin.stats.kernel_size == tuple(kernel_sizes)
        output, noted = written(twin, do_sample=False)
        assert torch.equal(output, shared_model().generate(PROMPT, max_new_tokens=24, do_sample=False))
        left = 23
        for i, (cycle, size) in enumerate(zip(twin.stats.cycles, noted, strict=True)):
            wanted = kernel_sizes[min(i, len(kernel_sizes) - 1)]
            assert 1 <= abs(size) <= min(abs(wanted), left) and (size > 0 or wanted < 0)
            if size > 0:  # of what is looked up less may be found, and where nothing is, it is drafted
                assert size == min(abs(wanted), left) and cycle.num_steps == size - 1
            left -= cycle.advance_length


def test_what_is_looked_up_is_told_by_a_negative_number():
    with make_sparse(shared_model(), **FIELDS, threshold=1.0, kernel_size=[-4]) as twin:
        _, kernel_sizes = written(twin, do_sample=False)
        assert min(kernel_sizes) < 0 and twin.stats.num_lookups == sum(size < 0 for size in kernel_sizes)
        _, kernel_sizes = written(twin, do_sample=False, prompt_lookup_num_tokens=0)
        assert min(kernel_sizes) > 0


@pytest.mark.parametrize(
    "sizes, error, words",
    [
        ([], ValueError, r"got \[\]: stats.kernel_sizes has those"),
        ([4, 0], ValueError, r"got \[4, 0\]: 1 stands for a cycle without a draft, and not 0"),
        ([-1], ValueError, "and not -1"),
        ([4, 2.5], TypeError, r"got \[4, 2.5\], where 2.5 is none"),
        ([True], TypeError, "where True is none"),
    ],
)
def test_wrong_numbers_are_told(sizes, error, words):
    with pytest.raises(error, match=words):
        SiriusConfig(kernel_size=sizes)


def test_a_schedule_is_saved_with_the_config(tmp_path):
    config = SiriusConfig(kernel_size=[4, 1, -3])
    config.save_pretrained(tmp_path)
    assert SiriusConfig.from_pretrained(tmp_path) == config
    with pytest.raises(TypeError, match="density must be a number"):
        SiriusConfig(density=[0.5])
