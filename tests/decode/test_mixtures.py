"""Mixtures of experts, as tiny random models: every family and method, and the draft of a user who sets nothing."""

import collections
import itertools

import pytest
import torch
from mixtures import IS_OLDER, available_mixtures, tiny_mixture
from tiny import sparse_logits

from hf_sirius import calibrate, make_sparse
from hf_sirius.model.experts import find_experts, neuron_norms


METHODS = {
    "experts": {"method": "experts"},
    "cats": {"method": "cats", "selection": "topk"},
    "griffin": {"method": "griffin"},
    "teal": {"method": "teal"},
}


def make_prompt(length: int = 13, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def experts_of(model):
    return find_experts(model, set(model.get_decoder().modules()))[0]


# The others are slow: test_support.py runs them as well.
IN_SHORT = ("deepseek_v3", "gpt_oss", "longcat_flash", "mixtral", "qwen3_moe")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.slow) for name in available_mixtures()],
)
def test_every_family_is_token_identical_with_every_method(family):
    model = tiny_mixture(family)
    prompt, options = make_prompt(), {"max_new_tokens": 10, "do_sample": False}
    dense = model.generate(prompt, **options)
    with torch.no_grad():
        logits = model(dense).logits[:, -6:]
    assert len(experts_of(model)) > 0
    for fields in ({"method": "griffin", "density": 1.0}, *METHODS.values()):
        with make_sparse(model, **{"density": 0.5, **fields}, kernel_size=4, threshold=1.0) as twin:
            assert torch.equal(model.generate(prompt, **options, assistant_model=twin), dense), fields
            stats = twin.stats
            drafted = sparse_logits(twin, dense, dense)[:, -6:]
        if "density" in fields:  # a whole draft is the model
            assert stats.acceptance_rate == 1.0
            torch.testing.assert_close(drafted, logits)
        else:
            assert 0 < stats.draft_density < 1 and not torch.allclose(drafted, logits), fields


def test_at_least_20_families_are_supported():
    assert len(available_mixtures()) >= 20


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "phimoe"])
def test_the_density_within_experts_is_the_one_asked_for(family, name):
    model = tiny_mixture(family)
    prompt = make_prompt(60)
    with make_sparse(model, density=0.5, **METHODS[name]) as twin, torch.no_grad(), twin.new_call() as call:
        with call.draft.observing(None):
            model(prompt)
        call.draft.select()
        with call.draft.drafting():
            twin(prompt)
        for block in call.draft.method.experts:
            assert block.density() == pytest.approx(0.5, rel=0.1)
            assert 0 < block.num_parameters_read() < block.num_parameters_routed() <= block.site.num_parameters()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_drafts_the_same(implementation, name):
    expected = tiny_mixture("qwen3_moe", torch.float32, "eager")
    model = tiny_mixture("qwen3_moe", torch.float32, implementation)
    prompt = make_prompt()
    fields = {"density": 0.5, **METHODS[name]}
    with make_sparse(expected, **fields) as twin, make_sparse(model, **fields) as other:
        torch.testing.assert_close(
            sparse_logits(other, prompt, prompt), sparse_logits(twin, prompt, prompt), rtol=1e-2, atol=1e-2
        )
    assert model.config._experts_implementation == implementation
    options = {"max_new_tokens": 8, "do_sample": False}
    with make_sparse(model, threshold=1.0, **fields) as twin:
        dense = model.generate(prompt, **options)
        assert torch.equal(model.generate(prompt, assistant_model=twin, **options), dense)


def test_nothing_set_drafts_with_fewer_experts():
    model, prompt = tiny_mixture("mixtral"), make_prompt()
    options = {"max_new_tokens": 12, "do_sample": False}
    dense = model.generate(prompt, **options)
    with make_sparse(model, threshold=1.0, kernel_size=4) as twin:
        assert twin.sirius_config.method == "experts" and twin.sirius_config.density == 0.5
        assert torch.equal(model.generate(prompt, assistant_model=twin, **options), dense)
        assert twin.stats.num_drafted > 0 and 0 < twin.stats.draft_density < 1
    with make_sparse(tiny_mixture("mixtral", num_experts_per_tok=1)) as twin:
        assert twin.sirius_config.method == "cats"


@pytest.mark.parametrize(
    "fields",
    [
        {"tree_width": 3},
        {"method": "griffin", "tree_width": 3},
        {"method": "cats", "tree_width": 2},
        {"method": "griffin", "reselect_every": 1},
        {"draft_dtype": "bfloat16", "draft_memory": "1MiB"},
        {"method": "griffin", "draft_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_other_kinds_of_drafts_are_token_identical(fields):
    model, prompt = tiny_mixture("deepseek_v3"), make_prompt()
    options = {"max_new_tokens": 12, "do_sample": False}
    dense = model.generate(prompt, **options)
    with make_sparse(model, threshold=1.0, kernel_size=4, **{"method": "experts", **fields}) as twin:
        assert torch.equal(model.generate(prompt, assistant_model=twin, **options), dense)
        assert 0 < twin.stats.draft_density < 1


def test_padding_takes_no_part():
    model, prompt = tiny_mixture("qwen3_moe"), make_prompt()
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], dim=1)
    mask = (padded != 0).long()
    statistics = []
    with make_sparse(model, method="griffin") as twin:
        for input_ids, attention_mask in ((prompt, None), (padded, mask)):
            with torch.no_grad(), twin.new_call() as call:
                with call.draft.observing(attention_mask):
                    model(input_ids, attention_mask=attention_mask)
                statistics.append([block._statistics for block in call.draft.method.experts])
    for without, with_padding in zip(*statistics, strict=True):
        torch.testing.assert_close(with_padding, without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_sampling_keeps_the_dense_distribution(family):
    model = tiny_mixture(
        family, torch.float32, "batched_mm", vocab_size=4, num_hidden_layers=1, hidden_size=16, intermediate_size=8
    )
    model.lm_head.weight.data.mul_(0.5)  # so that no token is nearly certain
    prompt, num_new, num_samples = torch.tensor([[1, 3, 3, 1, 2]]), 3, 300
    continuations = torch.tensor(list(itertools.product(range(4), repeat=num_new)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(continuations), -1), continuations], dim=1)).logits[:, 4:-1]
    steps = logits.double().softmax(-1).gather(-1, continuations.unsqueeze(-1)).squeeze(-1)
    expected = num_samples * steps.prod(dim=1)
    torch.manual_seed(0)
    with make_sparse(model, method="experts", density=0.25, kernel_size=num_new, threshold=1.0) as twin:
        counts = collections.Counter(
            tuple(
                model.generate(prompt, assistant_model=twin, max_new_tokens=num_new, do_sample=True, top_k=0)[
                    0, 5:
                ].tolist()
            )
            for _ in range(num_samples)
        )
        assert twin.stats.total.acceptance_rate < 1
    seen = torch.tensor([counts[tuple(row)] for row in continuations.tolist()], dtype=torch.float64)
    assert seen.sum() == num_samples
    is_common = expected >= 5
    cells = [(seen[is_common], expected[is_common]), (seen[~is_common].sum()[None], expected[~is_common].sum()[None])]
    statistic = sum(((s - e) ** 2 / e.clamp_min(1e-3)).sum() for s, e in cells)
    degrees = torch.tensor(float(is_common.sum()), dtype=torch.float64)
    assert torch.special.gammaincc(degrees / 2, statistic / 2) > 1e-3


def test_what_cannot_be_done_is_said():
    one = tiny_mixture("mixtral", num_experts_per_tok=1)
    with pytest.raises(ValueError, match="gives each token a single expert: use method='griffin'"):
        make_sparse(one, method="experts")
    from tiny import build_model

    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts that a token is given"):
        make_sparse(build_model(), method="experts")
    with pytest.raises(ValueError, match="all MLPs of MixtralForCausalLM are experts"):
        calibrate(one, None, [make_prompt()[0].tolist()], method="cats")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("fields", [{}, {"method": "griffin"}, {"density": 1.0}], ids=str)
def test_an_offloaded_mixture_drafts_with_what_is_resident(family, fields, tmp_path):
    from accelerate import disk_offload

    prompt, options = make_prompt(), {"max_new_tokens": 12, "do_sample": False}
    expected = tiny_mixture(family).generate(prompt, **options)
    model = disk_offload(tiny_mixture(family), str(tmp_path))
    with make_sparse(model, threshold=1.0, kernel_size=4, **fields) as twin:
        assert torch.equal(model.generate(prompt, assistant_model=twin, **options), expected)
        assert twin.stats.num_drafted > 0 and 0 < twin.stats.draft_density < 1
        with torch.no_grad(), twin.new_call() as call:
            with call.draft.observing(None):
                model(prompt)
            call.draft.select()
            for block in experts_of(model):
                held = call.draft.held[block.module]
                share = sum(p.numel() for p in held.parameters()) / block.num_parameters()
                assert share == 1.0 if "density" in fields else 0.4 < share < 0.65
    assert all(p.is_meta for block in experts_of(model) for p in block.module.parameters())


def test_draft_memory_counts_gathered_experts():
    model = tiny_mixture("mixtral")
    experts = experts_of(model)
    needed = int(sum(block.gathered_bytes(0.5) for block in experts))
    assert needed == sum(block.num_parameters() for block in experts) * 8 // 2
    with pytest.raises(ValueError, match=f"need {needed} bytes"):
        make_sparse(model, method="griffin", draft_memory=needed - 1)
    with make_sparse(model, method="griffin", draft_memory=needed) as twin, torch.no_grad(), twin.new_call() as call:
        with call.draft.observing(None):
            model(make_prompt())
        call.draft.select()
        held = [call.draft.held[block.module] for block in experts]
        assert sum(module.gate_up_proj.nbytes + module.down_proj.nbytes for module in held) == needed


@pytest.mark.skipif(IS_OLDER, reason="needs a newer transformers")
def test_router_logits_of_the_dense_model_are_recorded_once():
    model, prompt = tiny_mixture("mixtral"), make_prompt()
    model.config.output_router_logits = True
    options = {"max_new_tokens": 8, "do_sample": False}
    dense = model.generate(prompt, **options)
    with make_sparse(model, threshold=1.0, kernel_size=4) as twin:
        assert torch.equal(model.generate(prompt, assistant_model=twin, **options), dense)
        with torch.no_grad():
            assert len(model(prompt).router_logits) == len(twin(prompt).router_logits) == 2


def test_a_prompt_that_an_expert_did_not_see_leaves_it_its_largest_weights():
    model = tiny_mixture("mixtral", num_experts_per_tok=1)
    with make_sparse(model, method="griffin", density=0.5) as twin, torch.no_grad(), twin.new_call() as call:
        with call.draft.observing(None):
            model(make_prompt(2))
        call.draft.select()
        for block in call.draft.method.experts:
            unseen = ~block._statistics.any(dim=1)
            assert unseen.sum() >= 4  # two tokens reach two experts at most
            norms = neuron_norms(block.site, block.site.module)
            for expert in unseen.nonzero().flatten():
                kept = block.neuron_indices[expert]
                assert norms[expert, kept].min() >= norms[expert].median()


def test_masking_is_told():
    model, prompt = tiny_mixture("mixtral"), make_prompt()
    for fields, is_masking in (({"method": "cats"}, True), ({"method": "experts"}, False)):
        with make_sparse(model, kernel_size=4, threshold=1.0, **fields) as twin:
            model.generate(prompt, assistant_model=twin, max_new_tokens=8)
            assert twin.stats.is_masking == is_masking
