"""Greedy budgets: what each projection of a block keeps, and that a calibrated teal changes nothing of the output."""

import functools
import threading

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import build_model, make_prompt, shared_model

from hf_sirius import Calibration, SiriusConfig, calibrate, make_sparse
from hf_sirius.model.projections import projection_shape
from hf_sirius.model.sites import find_block, find_projections
from hf_sirius.settings.calibration import CALIBRATION_NAME
from hf_sirius.sparsity import budgets


FIELDS = {"method": "teal", "threshold": 1.0, "kernel_size": 5}
BUDGETS = ["uniform", "greedy"]
WEIGHTINGS = ["magnitude", "column"]


def corpus(num_texts: int = 6, length: int = 24) -> list[dict]:
    return [{"input_ids": make_prompt(length, seed=i)} for i in range(num_texts)]


def measure(model, texts=None, **options) -> Calibration:
    options = {"method": "teal", "budget": "greedy", "progress": False, **options}
    return calibrate(model, None, corpus() if texts is None else texts, **options)


@functools.cache
def shared_calibration(family: str = "llama", weighting: str = "magnitude") -> Calibration:
    return measure(shared_model(family), weighting=weighting)


def blocks_of(model) -> dict[str | None, list]:
    blocks = {}
    for site in find_projections(model):
        blocks.setdefault(find_block(model, site), []).append(site)
    return blocks


# The output


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(
    family=st.sampled_from(["llama", "gpt2", "phi3"]),
    weighting=st.sampled_from(WEIGHTINGS),
    budget=st.sampled_from(BUDGETS),
    density=st.floats(0.05, 1.0),
    tree_width=st.sampled_from([1, 3]),
    seed=st.integers(0, 100),
)
def test_the_output_is_the_models_own(family, weighting, budget, density, tree_width, seed):
    model, prompt, options = shared_model(family), make_prompt(seed=seed), {"max_new_tokens": 14, "do_sample": False}
    fields = {"calibration": shared_calibration(family, weighting), "weighting": weighting, "budget": budget}
    expected = model.generate(prompt, **options)
    with make_sparse(model, **FIELDS, density=density, tree_width=tree_width, **fields) as twin:
        assert torch.equal(model.generate(prompt, assistant_model=twin, **options), expected)
        assert twin.stats.num_drafted > 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_prompt_is_not_observed(budget):
    """So two prompts have the very same cutoffs."""
    model = shared_model()
    fields = {"calibration": shared_calibration(), "budget": budget}
    with make_sparse(model, **FIELDS, density=0.4, **fields) as twin, twin.new_call() as call:
        assert not call.draft.method.needs_prefill()
        call.draft.select()
        assert call.draft.method.cutoffs.values == shared_calibration().thresholds(0.4, budget)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_an_offloaded_model_drafts_as_a_loaded_one(weighting):
    model = build_model("gpt2", dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False}
    calibration = measure(model, weighting=weighting)
    fields = {**FIELDS, "draft_dtype": "bfloat16", "weighting": weighting, "calibration": calibration}
    with make_sparse(model, **fields) as twin:
        alone = twin.generate(make_prompt(), **options)
    cpu_offload(model)
    with make_sparse(model, **fields) as twin:
        assert torch.equal(twin.generate(make_prompt(), **options), alone)


# The densities


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_cutoffs_keep_the_asked_share_of_the_corpus(weighting, budget, density):
    model, calibration = shared_model(), shared_calibration(weighting=weighting)
    densities = calibration.densities(density, budget).tolist()
    seen = {site.idx: [] for site in find_projections(model)}
    with (
        make_sparse(
            model, **FIELDS, density=density, weighting=weighting, calibration=calibration, budget=budget
        ) as twin,
        twin.new_call() as call,
    ):
        hooks = [
            site.module.register_forward_pre_hook(
                lambda _, args, idx=site.idx: seen[idx].append(call.draft.method.drop(idx, args[0][0]) != 0)
            )
            for site in find_projections(model)
        ]
        with torch.no_grad():
            for text in corpus():
                model(text["input_ids"])
        for hook in hooks:
            hook.remove()
    for idx, kept in seen.items():
        assert torch.cat(kept).double().mean().item() == pytest.approx(densities[idx], abs=0.03)


@settings(deadline=None)
@given(density=st.floats(0.01, 1.0), family=st.sampled_from(["llama", "gpt2", "phi3"]))
def test_the_parameters_of_each_block_keep_the_asked_density(density, family):
    densities = shared_calibration(family).densities(density, "greedy")
    for name, sites in blocks_of(shared_model(family)).items():
        sizes = torch.tensor([projection_shape(site.module) for site in sites]).prod(dim=1).double()
        found = densities[[site.idx for site in sites]]
        assert (found @ sizes / sizes.sum()).item() == pytest.approx(density, abs=1e-6), name
        assert found.min() >= 0.01 - 1e-7 and found.max() <= 1 + 1e-7


@settings(deadline=None)
@given(
    sizes=st.lists(st.floats(1, 1000), min_size=1, max_size=6),
    weights=st.lists(st.floats(0, 10), min_size=6, max_size=6),
)
def test_a_descent_ends_at_the_bottom_and_never_rises(sizes, weights):
    def error_of(levels):
        return sum(weight * (100 - level) ** 2 for weight, level in zip(weights, levels, strict=False))

    path = torch.tensor(budgets._descend(error_of, sizes))
    assert path[0].tolist() == [100] * len(sizes) and path[-1].tolist() == [1] * len(sizes)
    assert (path.diff(dim=0) <= 0).all() and ((path.diff(dim=0) < 0).sum(dim=1) == 1).all()
    table = budgets._at_hundredths(path.double() / 100, torch.tensor(sizes, dtype=torch.float64))
    assert (table.diff(dim=1) >= -1e-9).all()


def test_the_projection_that_costs_least_per_parameter_gives_first():
    path = budgets._descend(lambda levels: float(100 - levels[0]) * 2 + (100 - levels[1]) * 3, [10.0, 20.0])
    expected = [*range(100, 0, -budgets.STEP), 1]
    assert path[: len(expected)] == [[100, level] for level in expected]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_inputs_that_do_not_matter_are_given_up_first(weighting):
    model = build_model()
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    found = measure(model, weighting=weighting).budgets
    idle = ("q_proj", "k_proj", "v_proj", "o_proj")  # what they compute goes through zeros
    sites = [site for site in find_projections(model) if site.name.startswith("model.layers.0.")]
    # At .8 the attention, which has less than a fifth of the parameters, keeps almost nothing.
    share = sum(site.num_parameters() for site in sites if site.attribute in idle)
    share /= sum(site.num_parameters() for site in sites)
    density = round(1 - share, 2)
    for site in sites:
        value = found[site.idx, round(density * 100) - 1].item()
        assert value <= 0.05 if site.attribute in idle else value >= 0.9, site.name


def test_greedy_budgets_change_a_block_less_than_uniform_ones():
    # Not the shared one: transformers leaves hooks on a model that has recorded hidden states.
    model, calibration = build_model(), shared_calibration()
    errors = {}
    texts = [text["input_ids"] for text in corpus()]
    for budget in BUDGETS:
        method_fields = {"density": 0.5, "calibration": calibration, "budget": budget}
        with torch.no_grad(), make_sparse(model, **FIELDS, **method_fields) as twin, twin.new_call() as call:
            call.draft.select()
            with call.draft.drafting():
                sparse = [twin.model(ids, use_cache=False, output_hidden_states=True) for ids in texts]
            dense = [model.model(ids, use_cache=False, output_hidden_states=True) for ids in texts]
        pairs = zip(sparse, dense, strict=True)
        errors[budget] = sum((a.hidden_states[1] - b.hidden_states[1]).square().sum().item() for a, b in pairs)
    assert errors["greedy"] < errors["uniform"]


def test_a_projection_outside_of_blocks_has_the_uniform_density():
    model = build_model("opt", word_embed_proj_dim=16)  # which are projected to the hidden size, and back
    outside = blocks_of(model)[None]
    assert {site.attribute for site in outside} == {"project_in", "project_out"}
    expected = torch.arange(1, 101) / 100
    found = measure(model).budgets
    for site in outside:
        torch.testing.assert_close(found[site.idx], expected)
    assert not torch.allclose(found, expected.expand_as(found))


def test_the_model_is_left_as_it_was_and_others_run_through_it():
    """Forwards of another thread are not masked; here one runs in the midst of a block's."""
    model, prompt, seen = build_model().train(), make_prompt(), []

    @torch.no_grad()
    def run():
        seen.append(model(prompt).logits)

    def elsewhere(*_):
        if len(seen) % 10 and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    run()
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(elsewhere)
    before = {name: (len(module._forward_pre_hooks), module.training) for name, module in model.named_modules()}
    measure(model)
    hook.remove()
    assert {name: (len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()} == before
    assert len(seen) == 10 and all(torch.equal(logits, seen[0]) for logits in seen)


# The file


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_it_comes_back_with_its_config_and_drafts_alike(tmp_path, budget, weighting):
    model = shared_model()
    calibration = shared_calibration(weighting=weighting)
    config = SiriusConfig(method="teal", weighting=weighting, budget=budget, density=0.3, calibration=calibration)
    config.save_pretrained(tmp_path)
    loaded = SiriusConfig.from_pretrained(tmp_path)
    assert loaded == config and loaded.calibration.budgets is not None
    outputs = []
    for each in (config, loaded):
        with make_sparse(model, each) as twin:
            outputs.append(twin.generate(make_prompt(), max_new_tokens=10, do_sample=False))
    assert torch.equal(*outputs)


def test_calibrations_that_differ_in_budgets_alone_differ():
    greedy, uniform = shared_calibration(), measure(shared_model(), budget="uniform")
    assert uniform.budgets is None and torch.equal(uniform.table, greedy.table)
    assert greedy != uniform and uniform != greedy


def test_a_file_of_before_is_of_cats(tmp_path):
    metadata = {"format": "hf_sirius.calibration.1", "metadata": '{"num_mlps": 2}'}
    save_file({"table": torch.zeros(2, 100), "probe": torch.zeros(2, 16)}, tmp_path / CALIBRATION_NAME, metadata)
    loaded = Calibration.from_pretrained(tmp_path)
    assert (loaded.method, loaded.weighting, loaded.budgets) == ("cats", "magnitude", None)
    assert SiriusConfig(calibration=loaded).calibration is loaded


# What is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "griffin", "budget": "uniform"}, r"'griffin' needs no calibration.*\['cats', 'teal'\]"),
        ({"method": "teel"}, "Did you mean 'teal'"),
        ({"method": "cats"}, r"budget belongs to one of \['teal'\], got method='cats'"),
        ({"method": "cats", "budget": "uniform", "weighting": "column"}, "weighting belongs to method='teal'"),
        ({"weighting": "rows"}, "weighting must be one of"),
        ({"budget": "fair"}, "budget must be one of .*'uniform', 'greedy'.*got 'fair'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        measure(shared_model(), **options)


def test_a_corpus_of_single_tokens_has_no_budgets():
    texts = [{"input_ids": [3]}, {"input_ids": [4]}]
    with pytest.raises(ValueError, match="a text of at least 2 tokens"):
        measure(shared_model(), texts)
    assert measure(shared_model(), texts, budget="uniform").budgets is None


@pytest.mark.parametrize("name", ["max_length", "max_tokens"])
def test_texts_that_are_cut_to_single_tokens_have_no_budgets(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 2, as budget='greedy' compares .*, got 1"):
        measure(shared_model(), **{name: 1})
    assert measure(shared_model(), budget="uniform", **{name: 1}).budgets is None


@pytest.mark.parametrize(
    "error, told, words",
    [
        (RuntimeError("no state"), ValueError, r"model\.layers\.1 of .*no state.*calibrate with budget='uniform'"),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, "out of memory"),
    ],
)
def test_a_block_that_does_not_run_by_itself_is_told_before_the_corpus_is_read(error, told, words):
    model = build_model()
    block, calls, texts = model.model.layers[1], [], iter(corpus())
    forward = block.forward

    def within_the_model(*args, **kwargs):
        if len(calls) == 2:  # while the text is counted, and while what the block is given is recorded
            raise error
        calls.append(1)
        return forward(*args, **kwargs)

    block.forward = within_the_model
    with pytest.raises(told, match=words):
        measure(model, texts)
    assert len(list(texts)) == len(corpus()) - 1


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: build_model(seed=1), "other weights"),
        (lambda: build_model(num_hidden_layers=3), "for 14 projections and this model has 21"),
    ],
    ids=["other weights", "other depth"],
)
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_calibration_of_another_model_is_refused(build, words, density):
    with pytest.raises(ValueError, match=words):
        make_sparse(build(), **FIELDS, density=density, calibration=shared_calibration())
