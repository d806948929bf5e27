"""TEAL: which inputs it keeps, what it counts, and that it changes nothing of the output."""

import pytest
import shrinking
import torch
from accelerate import cpu_offload, disk_offload
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt, shared_model, sparse_logits
from transformers import AutoModelForCausalLM

from hf_sirius import SiriusConfig, make_sparse
from hf_sirius.model.sites import find_projections
from hf_sirius.weights.formats import dense_weight


FIELDS = {"method": "teal", "threshold": 1.0, "kernel_size": 5}
BIASES = {"attention_bias": True, "mlp_bias": True}


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


def masked_logits(model, tokens, cutoffs, weighting):
    """Returns the logits of the dense model whose projections see the inputs with scores of at least their cutoff, and
    what each of them saw, bool [num_tokens, in_features].
    """
    kept = {}

    def watch(site):
        def zero(_, args):
            mask = scores_of(site.module, args[0], weighting) >= cutoffs[site.idx]
            kept[site.idx] = mask.flatten(0, -2)
            return (args[0] * mask,)

        return site.module.register_forward_pre_hook(zero)

    hooks = [watch(site) for site in find_projections(model)]
    with torch.no_grad():
        logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits, kept


def drafted(model, prompt, tokens, **fields):
    """Returns the logits of a draft's forward over tokens, and its method, for which a prompt gave the cutoffs."""
    with torch.no_grad(), make_sparse(model, **FIELDS, **fields) as twin, twin.new_call() as call:
        with call.draft.observing(None):
            model(prompt)
        call.draft.select()
        with call.draft.drafting():
            logits = twin(tokens).logits
        return logits, call.draft.method


@pytest.mark.parametrize("weighting", ["magnitude", "column"])
@pytest.mark.parametrize("family, fields", [("llama", {}), ("llama", BIASES), ("phi3", {}), ("gpt2", {}), ("opt", {})])
def test_a_draft_is_a_masked_dense_forward(family, fields, weighting):
    model, tokens = build_model(family, **fields), make_prompt(7, seed=1)
    logits, method = drafted(model, make_prompt(20), tokens, density=0.4, weighting=weighting)
    expected, _ = masked_logits(model, tokens, method.cutoffs.values, weighting)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert (logits - model(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize("draft_scope", ["all", "mlp"])
def test_a_cast_projection_drops_as_well(draft_scope):
    model, tokens = build_model(), make_prompt(7, seed=1)
    casts = {"draft_dtype": "bfloat16", "draft_scope": draft_scope}
    logits = {
        (density, bool(cast)): drafted(model, make_prompt(20), tokens, density=density, **cast)[0]
        for density in (0.6, 1.0)
        for cast in ({}, casts)
    }
    errors = {key: (value - logits[key[0], False]).norm() / value.norm() for key, value in logits.items()}
    assert 0 < errors[1.0, True] < 0.05 and 0 < errors[0.6, True] < 0.2
    assert (logits[0.6, True] - logits[1.0, True]).norm() / logits[1.0, True].norm() > 0.2


@pytest.mark.parametrize(("num_tokens", "tree_width"), [(1, 1), (5, 1), (5, 3)])
def test_a_step_reads_what_any_leaf_keeps(num_tokens, tree_width):
    """And of a text that is read at once, each token is a step."""
    model, tokens = build_model("llama", **BIASES), make_prompt(num_tokens, seed=1)
    _, method = drafted(model, make_prompt(20), tokens, density=0.3, tree_width=tree_width)
    _, kept = masked_logits(model, tokens, method.cutoffs.values, "magnitude")
    dropped = 0
    for site in find_projections(model):
        steps = kept[site.idx].any(dim=0, keepdim=True) if tree_width > 1 else kept[site.idx]
        dropped += site.module.weight.shape[0] * (~steps).double().mean(dim=0).sum().item()
    embedding = model.get_input_embeddings().weight
    read = model.num_parameters() - (len(embedding) - 1) * embedding.shape[1] - dropped
    assert dropped and method.draft_density(model) == pytest.approx(read / model.num_parameters())


def test_weights_that_change_between_calls_have_other_columns():
    model, other = build_model(), build_model(seed=1)
    prompt, tokens = make_prompt(20), make_prompt(5, seed=1)

    with make_sparse(model, **FIELDS, weighting="column") as twin:
        before = sparse_logits(twin, prompt, tokens)
        model.load_state_dict(other.state_dict())
        after = sparse_logits(twin, prompt, tokens)
    with make_sparse(other, **FIELDS, weighting="column") as twin:
        assert torch.equal(after, sparse_logits(twin, prompt, tokens)) and not torch.equal(after, before)


def test_an_activation_with_parameters_is_thresholded_of_an_offloaded_model_too():
    """Drafts hold a copy of it, which is not to take the place of the method's own stand-in."""
    model = cpu_offload(tiny_model("apertus", torch.float32))
    with make_sparse(model, method="cats", draft_dtype="bfloat16", threshold=1.0, kernel_size=16) as twin:
        model.generate(make_prompt(), assistant_model=twin, max_new_tokens=12)
        assert 0 < twin.stats.draft_density < 1


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


def test_a_projection_of_embeddings_reads_all_its_inputs():
    """Two thirds of them are zeros where a token has no shape and no pronunciation, as in drafts."""
    names = [site.name for site in find_projections(shrinking.tiny_model("roc_bert", AutoModelForCausalLM))]
    assert len(names) == 2 * 6 and not any("embeddings" in name for name in names)


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
            cutoffs.append(torch.stack(call.draft.method.cutoffs.values))
    torch.testing.assert_close(*cutoffs, rtol=0.02, atol=0)


@pytest.mark.parametrize("weighting", ["magnitude", "column"])
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_offloaded_model_drafts_as_a_loaded_one(family, where, weighting, tmp_path):
    model = build_model(family, dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False}
    fields = {**FIELDS, "draft_dtype": "bfloat16", "weighting": weighting}
    expected = model.generate(make_prompt(), **options)
    with make_sparse(model, **fields) as twin:
        alone = twin.generate(make_prompt(), **options)
    cpu_offload(model) if where == "memory" else disk_offload(model, str(tmp_path))
    with make_sparse(model, **fields) as twin:
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **options), expected)
        assert torch.equal(twin.generate(make_prompt(), **options), alone)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"weighting must be one of .*'magnitude', 'column'.*got 'rows'"):
        SiriusConfig(method="teal", weighting="rows")
    with pytest.raises(ValueError, match="weighting belongs to method='teal'"):
        SiriusConfig(method="cats", weighting="column")
