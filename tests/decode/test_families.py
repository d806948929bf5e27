"""Every supported family, as a tiny random model: at threshold=1.0 the output is the dense model's, token for token."""

import pytest
import torch
from families import available_families, every_family, tiny_model

from hf_sirius import make_sparse
from hf_sirius.model.sites import find_mlps


@pytest.mark.parametrize("family", every_family())
def test_output_equals_dense_greedy_in_float64(family):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, model.config.get_text_config().vocab_size, (1, 11), generator=generator)
    options = {"max_new_tokens": 24, "do_sample": False}
    dense = model.generate(prompt, **options)
    cast = {"method": "griffin", "draft_dtype": "bfloat16", "draft_scope": "all"}
    for fields in ({"method": "cats"}, {"method": "griffin"}, cast):
        with make_sparse(model, **fields, density=0.5, kernel_size=6, threshold=1.0) as sparse:
            assert len(sparse._twin.sites) == len(find_mlps(model)) > 0
            assert torch.equal(model.generate(prompt, **options, assistant_model=sparse), dense), fields
            assert sparse.stats.num_drafted > 0
            assert 0 < sparse.stats.draft_density < 1
    assert torch.equal(model.generate(prompt, **options), dense)


def test_at_least_45_families_are_supported():
    assert len(available_families()) >= 45
