"""Widening: a larger model that computes the same."""

import pytest
import torch
from tiny import build_model, make_prompt

from hf_sirius.benchmark import widen


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factors", [(1, 1), (2, 3), (3, 1)])
def test_widening_changes_no_logit(factors, tied):
    model = build_model(tie_word_embeddings=tied)
    wide = widen(model, *factors)
    # RMSNorm works in float32.
    torch.testing.assert_close(wide(make_prompt()).logits, model(make_prompt()).logits, rtol=0, atol=1e-4)
    assert wide.config.hidden_size == factors[0] * model.config.hidden_size
    assert wide.config.intermediate_size == factors[1] * model.config.intermediate_size
    assert not any(parameter.is_meta for parameter in wide.parameters())


def test_factors_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        widen(build_model(), 0, 2)
