"""TEAL: which inputs it keeps, what it counts, and that it changes nothing of the output."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt, shared_model

from hf_sirius import SiriusConfig, make_sparse
from hf_sirius.model.sites import find_projections
from hf_sirius.weights.formats import dense_weight


FIELDS = {"method": "teal", "threshold": 1.0, "kernel_size": 5}


def inputs_of(model, projection, input_ids) -> torch.Tensor:
    """Returns what a projection of the dense model takes, [num_tokens, in_features]."""
    seen = []
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids)
    hook.remove()
    return seen[0]


def scores_of(projection, inputs, weighting) -> torch.Tensor:
    return inputs.abs() * (dense_weight(projection).norm(dim=0) if weighting == "column" else 1.0)


@settings(deadline=None, max_examples=20)
@given(
    family=st.sampled_from(["llama", "gpt2", "phi3"]),
    weighting=st.sampled_from(["magnitude", "column"]),
    density=st.floats(0.05, 1.0),
    tree_width=st.sampled_from([1, 3]),
    draft_dtype=st.sampled_from([None, "bfloat16", "int8", "int4"]),
    seed=st.integers(0, 100),
)
def test_the_output_is_the_models_own(family, weighting, density, tree_width, draft_dtype, seed):
    model = shared_model(family)
    prompt, options = make_prompt(seed=seed), {"max_new_tokens": 14, "do_sample": False}
    expected = model.generate(prompt, **options)
    fields = {"density": density, "weighting": weighting, "tree_width": tree_width, "draft_dtype": draft_dtype}
    with make_sparse(model, **FIELDS, **fields) as twin:
        assert torch.equal(model.generate(prompt, assistant_model=twin, **options), expected)
        assert twin.stats.num_drafted


@pytest.mark.parametrize("weighting", ["magnitude", "column"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_keeps_the_largest_inputs_of_each_projection(family, weighting):
    model = build_model(family)
    prompt = make_prompt(40)
    with make_sparse(model, **FIELDS, density=0.4, weighting=weighting) as twin, twin.new_call() as call:
        with call.draft.observing(None):
            model(prompt)
        call.draft.select()
        for site in find_projections(model):
            inputs = inputs_of(model, site.module, prompt)
            kept = call.draft.method.drop(site.idx, inputs) != 0
            scores = scores_of(site.module, inputs, weighting)
            assert scores[kept].min() >= 0.99 * scores[~kept].max(), "bins are as fine as bfloat16"
            assert kept.double().mean().item() == pytest.approx(0.4, abs=0.03)


def test_the_columns_of_a_weight_count():
    model = build_model()
    projection = model.model.layers[0].mlp.down_proj
    projection.weight.data[:, ::2] *= 1e-4
    idx = next(site.idx for site in find_projections(model) if site.module is projection)
    kept = {}
    for weighting in ("magnitude", "column"):
        with make_sparse(model, **FIELDS, density=0.5, weighting=weighting) as twin, twin.new_call() as call:
            with call.draft.observing(None):
                model(make_prompt(40))
            call.draft.select()
            kept[weighting] = call.draft.method.drop(idx, torch.ones(1, projection.in_features).double()) != 0
    assert kept["column"][0, 1::2].all() and not kept["column"][0, ::2].any()
    assert kept["magnitude"].all() or not kept["magnitude"].any()


def test_all_projections_but_the_head_are_sparse():
    model = build_model()
    names = [site.name for site in find_projections(model)]
    assert len(names) == 2 * 7 and "lm_head" not in names and "model.layers.1.self_attn.o_proj" in names
    with make_sparse(model, **FIELDS) as twin:
        head = twin._twin.module.lm_head
        assert head is model.lm_head


def test_the_density_counts_every_projection():
    model = build_model("gpt2")  # with biases, which are read whole
    with make_sparse(model, **FIELDS, density=0.3) as twin:
        model.generate(make_prompt(40), assistant_model=twin, max_new_tokens=30)
        found = twin.stats.draft_density
    weights = sum(site.module.weight.numel() for site in find_projections(model))
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    total = sum(p.numel() for p in model.parameters())
    unread = sum(weight.numel() - weight.shape[1] for weight in embeddings)
    share = (found * total - (total - unread - weights)) / weights
    assert share == pytest.approx(0.3, abs=0.08)


def test_padding_is_not_counted():
    model = build_model()
    prompt = make_prompt(12)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(42) >= 30).long()[None]
    cutoffs = []
    for inputs, kept in ((prompt, None), (padded, mask)):
        with make_sparse(model, **FIELDS, density=0.4) as twin, twin.new_call() as call:
            positions = None if kept is None else (kept.cumsum(-1) - 1).clamp(min=0)
            with call.draft.observing(kept):
                model(inputs, attention_mask=kept, position_ids=positions)
            call.draft.select()
            cutoffs.append(torch.stack(call.draft.method._cutoffs))
    torch.testing.assert_close(*cutoffs, rtol=0.02, atol=0)


def test_an_offloaded_model_has_no_columns_to_read(tmp_path):
    from accelerate import cpu_offload

    model = build_model(dtype=torch.float32)
    expected = model.generate(make_prompt(), max_new_tokens=12)
    cpu_offload(model)
    with make_sparse(model, **FIELDS, draft_dtype="int8") as twin:
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, max_new_tokens=12), expected)
    with (
        make_sparse(model, **FIELDS, draft_dtype="int8", weighting="column") as twin,
        pytest.raises(ValueError, match="offloaded: use weighting='magnitude'"),
    ):
        model.generate(make_prompt(), assistant_model=twin, max_new_tokens=12)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"weighting must be one of .*'magnitude', 'column'.*got 'rows'"):
        SiriusConfig(method="teal", weighting="rows")
    with pytest.raises(ValueError, match="weighting belongs to method='teal'"):
        SiriusConfig(method="cats", weighting="column")
