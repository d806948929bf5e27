"""Encoder-decoders, sampled: goodness of fit of the joint distribution of all new tokens."""

import collections
import itertools

import pytest
import torch
from encoder_decoders import tiny_encoder_decoder, tiny_source
from test_verification import p_value

from hf_sirius import make_sparse
from hf_sirius.model.sites import find_mlps


SMALL_VOCAB, NUM_TOKENS, NUM_SAMPLES = 4, 3, 250
# Long enough for the method to see, so that drafts come at once.
TEXT = torch.tensor([[2, 3, 1, 3, 2, 2, 1, 3, 1]])


def sampled_model(family: str):
    """A model with no certain token, whose neurons all matter: a draft with some of them samples otherwise."""
    sizes = {"d_ff": 8} if family == "t5" else {"decoder_ffn_dim": 8}
    model = tiny_encoder_decoder(family, torch.float32, vocab_size=SMALL_VOCAB, **sizes)
    with torch.no_grad():
        for site in find_mlps(model):
            site.down.weight.mul_(3)
        # T5 has a scale of its own for a head that is tied.
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(4)))
        model.lm_head.weight.mul_(1.5 if family == "t5" else 0.2)
    return model


@torch.no_grad()
def exact_probabilities(model, source) -> dict[tuple[int, ...], float]:
    """Returns the dense model's probability of every continuation of the text."""
    continuations = torch.tensor(list(itertools.product(range(SMALL_VOCAB), repeat=NUM_TOKENS)))
    text = torch.cat([TEXT.expand(len(continuations), -1), continuations], dim=1)
    source = {name: value.expand(len(continuations), -1) for name, value in source.items()}
    logits = model(**source, decoder_input_ids=text).logits[:, TEXT.shape[1] - 1 : -1]
    steps = logits.double().softmax(-1).gather(-1, continuations.unsqueeze(-1)).squeeze(-1)
    return dict(zip(map(tuple, continuations.tolist()), steps.prod(dim=-1).tolist(), strict=True))


@pytest.mark.parametrize("family", [pytest.param("bart", marks=pytest.mark.slow), "t5"])
def test_sampling_at_threshold_one_keeps_the_dense_distribution(family):
    model = sampled_model(family)
    source = {"input_ids": tiny_source(model)["input_ids"].clamp(max=SMALL_VOCAB - 1)}
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": True, "top_k": 0, "decoder_input_ids": TEXT}
    torch.manual_seed(0)
    counts = collections.Counter()
    with make_sparse(model, method="griffin", density=1 / 8, kernel_size=4, threshold=1.0) as sparse:
        for _ in range(NUM_SAMPLES):
            output = model.generate(**source, **options, assistant_model=sparse)
            counts[tuple(output[0, TEXT.shape[1] :].tolist())] += 1
        assert 0.1 < sparse.stats.total.acceptance_rate < 0.95, "the draft should be neither right nor useless"
    assert p_value(counts, exact_probabilities(model, source)) > 1e-3
