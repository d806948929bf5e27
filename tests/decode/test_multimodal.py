"""Models that read images or audio: at threshold=1.0 the output equals the dense model's, trees as well."""

import collections
import itertools

import pytest
import torch
from multimodal import FAMILIES, tiny_multimodal, tiny_prompt
from test_verification import p_value

from hf_sirius import make_sparse


@pytest.mark.parametrize("family", FAMILIES)
def test_output_equals_dense_greedy_in_float64(family):
    model, options = tiny_multimodal(family), {"max_new_tokens": 20, "do_sample": False}
    prompt = tiny_prompt(family)
    dense = model.generate(**prompt, **options)
    for fields in ({"method": "griffin"}, {"method": "teal"}, {"method": "griffin", "tree_width": 3}):
        with make_sparse(model, density=0.5, kernel_size=5, threshold=1.0, **fields) as sparse:
            assert len(sparse._twin.sites) == 2, "those of the language model"
            assert torch.equal(model.generate(**prompt, **options, assistant_model=sparse), dense), fields
            assert sparse.stats.num_drafted > 0
            assert 0 < sparse.stats.draft_density < 1


@pytest.mark.parametrize("family", [pytest.param("llava", marks=pytest.mark.slow), "qwen2_audio"])
def test_sampling_at_threshold_one_keeps_the_dense_distribution(family):
    model, prompt = tiny_multimodal(family, torch.float32), tiny_prompt(family, torch.float32)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[3:] = 0  # tokens that `suppress` forbids
        head.weight.mul_(0.3)
    length, num_tokens = prompt["input_ids"].shape[1], 3
    options = {"max_new_tokens": num_tokens, "do_sample": True, "top_k": 0, "suppress_tokens": list(range(3, 64))}
    probabilities = {}
    with torch.no_grad():
        for continuation in itertools.product(range(3), repeat=num_tokens):
            input_ids = torch.cat([prompt["input_ids"], torch.tensor([continuation])], dim=1)
            whole = {**prompt, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
            steps = model(**whole).logits[0, -num_tokens - 1 : -1, :3].double().softmax(-1)
            probabilities[continuation] = steps[range(num_tokens), continuation].prod().item()
    assert sum(probabilities.values()) == pytest.approx(1)
    torch.manual_seed(0)
    counts = collections.Counter()
    with make_sparse(model, method="griffin", density=0.1, kernel_size=4, threshold=1.0) as sparse:
        for _ in range(200):
            output = model.generate(**prompt, **options, assistant_model=sparse)
            counts[tuple(output[0, length:].tolist())] += 1
        assert 0.1 < sparse.stats.total.acceptance_rate < 0.95, "the draft should be neither right nor useless"
    assert p_value(counts, probabilities) > 1e-3
