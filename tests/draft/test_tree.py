"""Tree drafting: the output, what each node reads, what the cache holds, and what is refused."""

import copy
import math

import pytest
import torch
from families import available_families, every_family, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt, shared_model
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from hf_sirius import make_sparse
from hf_sirius.decode.candidates import SiriusCandidateGenerator
from hf_sirius.draft.cache import wide_windows
from hf_sirius.draft.tree import Leaf, Tree, best_path
from hf_sirius.draft.tree_reading import TreeReader
from hf_sirius.model.compat import IS_5_17


# ALiBi, or windows that the attention counts by itself.
REFUSED = {"bloom", "mpt", "gpt_neo"}
FIELDS = {"method": "griffin", "density": 0.3, "threshold": 1.0, "kernel_size": 5}


class StopAt(StoppingCriteria):
    def __init__(self, modulus, min_length=21):
        self.modulus = modulus
        self.min_length = min_length

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % self.modulus == 0) & (input_ids.shape[1] >= self.min_length)


# The output


@pytest.mark.parametrize("family", every_family())
def test_output_equals_dense_greedy_in_float64(family):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, model.config.get_text_config().vocab_size, (1, 11), generator=generator)
    options = {"max_new_tokens": 24, "do_sample": False}
    dense = model.generate(prompt, **options)
    for fields in ({"method": "griffin", "tree_width": 8}, {"method": "cats", "tree_width": 3}):
        if family in REFUSED:
            with pytest.raises(ValueError, match=r"use tree_width=1"):
                make_sparse(model, **fields)
            continue
        with make_sparse(model, **fields, density=0.5, kernel_size=6, threshold=1.0) as sparse:
            assert torch.equal(model.generate(prompt, **options, assistant_model=sparse), dense), fields
            assert sparse.stats.num_nodes_verified > sparse.stats.num_drafted
    assert torch.equal(model.generate(prompt, **options), dense)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_windows_are_the_models_also_where_the_cache_keeps_everything(family):
    model, prompt = shared_model(family), make_prompt(13)
    dense = model.generate(prompt, max_new_tokens=40, do_sample=False, past_key_values=DynamicCache())
    with make_sparse(model, **FIELDS, tree_width=4) as sparse:
        options = {"max_new_tokens": 40, "do_sample": False, "past_key_values": DynamicCache()}
        assert torch.equal(model.generate(prompt, assistant_model=sparse, **options), dense)


def test_a_model_in_training_mode_is_not_refused_for_its_dropout():
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    make_sparse(model, **FIELDS, tree_width=4).detach()
    assert [module.training for module in model.modules()] == modes and True in modes


def test_at_least_45_families_take_a_tree():
    assert len(set(available_families()) - REFUSED) >= 45


@given(
    family=st.sampled_from(["llama", "gpt2", "mistral", "gemma2", "gemma3_text"]),
    method=st.sampled_from([{"method": "griffin"}, {"method": "griffin", "reselect_every": 2}, {"method": "cats"}]),
    tree_width=st.integers(1, 8),
    kernel_size=st.integers(2, 9),
    prompt_length=st.integers(2, 24),
    max_new_tokens=st.integers(1, 24),
    num_padding=st.integers(0, 4),
    branch_cutoff=st.sampled_from([0.0, 0.05, 0.95]),
    density=st.sampled_from([0.1, 0.5, 0.9]),
    draft_confidence=st.sampled_from([0.0, 0.03]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "eos_token_id": st.integers(3, 30),
            "repetition_penalty": st.sampled_from([1.3]),
            "no_repeat_ngram_size": st.just(2),
            "stopping_criteria": st.builds(lambda modulus: StoppingCriteriaList([StopAt(modulus)]), st.integers(2, 9)),
        },
    ),
)
@settings(max_examples=120, deadline=None)
def test_any_tree_gives_the_dense_output(
    family, method, tree_width, kernel_size, prompt_length, max_new_tokens, num_padding, branch_cutoff, density,
    draft_confidence, options,
):  # fmt: skip
    model = shared_model(family)
    prompt = make_prompt(prompt_length)
    attention_mask = torch.ones_like(prompt)
    attention_mask[:, : min(num_padding, prompt_length - 1)] = 0
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "attention_mask": attention_mask, **options}
    dense = model.generate(prompt, **options)
    fields = {"kernel_size": kernel_size, "branch_cutoff": branch_cutoff, "draft_confidence": draft_confidence}
    with make_sparse(model, **method, density=density, threshold=1.0, tree_width=tree_width, **fields) as sparse:
        assert torch.equal(model.generate(prompt, **options, assistant_model=sparse), dense)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_returned_values_are_those_of_the_output(family):
    model = shared_model(family)
    options = {
        "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
        "output_logits": True, "output_hidden_states": True,
    }  # fmt: skip
    dense = model.generate(make_prompt(), **options)
    with make_sparse(model, **FIELDS, tree_width=4) as sparse:
        output = model.generate(make_prompt(), assistant_model=sparse, **options)
    assert torch.equal(output.sequences, dense.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(output, name), getattr(dense, name), atol=1e-5, rtol=1e-5)
    for step, expected in zip(output.hidden_states, dense.hidden_states, strict=True):
        torch.testing.assert_close(step[-1], expected[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tree_width", [1, 4])
def test_likelihoods_are_the_dense_models(tree_width):
    model, prompt, temperature = shared_model(), make_prompt(), 1.7
    fields = {**FIELDS, "threshold": 0.02, "temperature": temperature, "tree_width": tree_width}

    def expected(verified_ids: list[int], token_id: int) -> float:
        scores = model(torch.tensor([verified_ids])).logits[0, -1].float()
        return (scores / temperature).softmax(dim=-1)[token_id].item()

    with make_sparse(model, **fields) as sparse, torch.no_grad():
        output = model.generate(prompt, assistant_model=sparse, max_new_tokens=30, do_sample=False)
        stats = sparse.stats
        verified_ids = prompt[0].tolist()
        assert stats.first_likelihood == pytest.approx(expected(verified_ids, stats.first_id), rel=1e-3)
        verified_ids.append(stats.first_id)
        num_unknown = 0
        for cycle in stats.cycles:
            drafts = [(cycle.drafted_ids, cycle.likelihoods)]
            if cycle.branches is not None:
                assert drafts[0] == tuple(
                    getattr(cycle.branches, name)[cycle.branches.winner] for name in ("leaf_ids", "leaf_likelihoods")
                )
                drafts = zip(cycle.branches.leaf_ids, cycle.branches.leaf_likelihoods, strict=True)
            for ids, likelihoods in drafts:
                for i, (token_id, likelihood) in enumerate(zip(ids, likelihoods, strict=True)):
                    num_unknown += likelihood is None
                    if likelihood is not None:
                        assert likelihood == pytest.approx(expected(verified_ids + list(ids[:i]), token_id), rel=1e-3)
            assert None not in cycle.likelihoods[: cycle.num_accepted]
            verified_ids += cycle.drafted_ids[: cycle.num_accepted]
            assert cycle.bonus_likelihood == pytest.approx(expected(verified_ids, cycle.bonus_id), rel=1e-3)
            verified_ids.append(cycle.bonus_id)
    assert verified_ids == output[0].tolist()
    assert stats.num_rolled_back > 0 and (num_unknown > 0) == (tree_width > 1)


def test_attentions_are_those_of_the_path():
    model = build_model()
    model.set_attn_implementation("eager")
    options = {
        "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True
    }  # fmt: skip
    dense = model.generate(make_prompt(), **options)
    with make_sparse(model, **FIELDS, tree_width=4) as sparse:
        output = model.generate(make_prompt(), assistant_model=sparse, **options)
    assert torch.equal(output.sequences, dense.sequences)
    for step, expected in zip(output.attentions[1:], dense.attentions[1:], strict=True):
        torch.testing.assert_close(step[-1], expected[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.03])
def test_below_threshold_one_the_longest_acceptable_path_is_kept(threshold):
    model, fields = build_model(dtype=torch.float32), {**FIELDS, "threshold": threshold}
    with make_sparse(model, **fields, tree_width=6) as sparse:
        output = model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=40, do_sample=False)
        cycles = sparse.stats.cycles
    with torch.no_grad():
        logits = model(output).logits[0].float()
    likelihoods = (logits / sparse.sirius_config.temperature).softmax(dim=-1)
    assert any(cycle.num_accepted for cycle in cycles)
    place = make_prompt().shape[1] + 1
    for cycle in cycles:
        # What was kept was acceptable, and no other continuation that follows the kept path goes on acceptably.
        kept = output[0, place : place + cycle.num_accepted].tolist()
        assert kept == list(cycle.drafted_ids[: cycle.num_accepted])
        for i, token_id in enumerate(kept):
            scores = likelihoods[place + i - 1]
            assert scores[token_id] >= threshold or token_id == scores.argmax()
        n = len(kept)
        nexts = {ids[n] for ids in cycle.branches.leaf_ids if list(ids[:n]) == kept and len(ids) > n}
        scores = likelihoods[place + len(kept) - 1]
        assert not any(scores[token_id] >= threshold for token_id in nexts)
        place += len(kept) + 1


def test_branches_win():
    """Else none of this would be tested: tokens are kept that a single continuation does not have."""
    model = build_model()
    with make_sparse(model, **FIELDS, tree_width=8) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=60, do_sample=False)
        stats = sparse.stats
    assert stats.aal_gain > 0 and any(cycle.branches.winner for cycle in stats.cycles)
    for cycle in stats.cycles:
        branches = cycle.branches
        assert cycle.drafted_ids == branches.leaf_ids[branches.winner] and len(branches.leaf_ids) <= 8
        assert branches.num_nodes_drafted >= branches.num_nodes_verified >= len(cycle.drafted_ids)
        assert branches.likeliest_advance_length <= cycle.advance_length


@given(
    seed=st.integers(0, 10**6),
    threshold=st.sampled_from([0.1, 1.0]),
    tree_width=st.integers(2, 8),
    kernel_size=st.integers(2, 6),
    stop=st.integers(2, 9),
    confidence=st.sampled_from([0.0, 0.5]),
    is_tied=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_tree_has_the_draft_without_branches(seed, threshold, tree_width, kernel_size, stop, confidence, is_tied):
    """So that no cycle advances less for its branches, and `aal_gain` is the gain.

    With cats, where the leaves of a level share their neurons, the likeliest tokens are others.
    """
    model = shared_model()
    fields = {"method": "griffin", "density": 0.2, "threshold": threshold, "kernel_size": kernel_size}
    fields |= {"draft_confidence": confidence}
    options = {"do_sample": False, "max_new_tokens": 12}
    options["stopping_criteria"] = StoppingCriteriaList([StopAt(stop, min_length=13)])
    if is_tied:
        options["logits_processor"] = [lambda input_ids, scores: (scores / 2).round()]
    with make_sparse(model, **fields, tree_width=tree_width) as tree:
        model.generate(make_prompt(seed=seed), assistant_model=tree, **options)
    for cycle in tree.stats.cycles[:1]:  # the only one whose neurons another call chooses as well
        with make_sparse(model, **fields) as single:
            model.generate(make_prompt(seed=seed), assistant_model=single, **options)
        plain = single.stats.cycles[0]
        assert plain.drafted_ids in [ids[: len(plain.drafted_ids)] for ids in cycle.branches.leaf_ids]
        assert cycle.branches.likeliest_advance_length == plain.advance_length <= cycle.advance_length


def test_doubt_ends_a_tree_without_branches_where_it_ends_a_draft():
    model, lengths = build_model(), {}
    fields = {**FIELDS, "draft_confidence": 0.3, "temperature": 0.1}
    for width in (1, 2):
        with make_sparse(model, **fields, tree_width=width, branch_cutoff=0.0) as sparse:
            model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=40, do_sample=False)
            lengths[width] = [len(cycle.drafted_ids) for cycle in sparse.stats.cycles]
    assert lengths[1] == lengths[2] and len(set(lengths[1])) > 1


def test_a_certain_token_does_not_branch():
    model = build_model()

    def only_one(input_ids, scores):
        return torch.full_like(scores, -math.inf).index_fill(-1, scores.argmax(dim=-1), 0.0)

    with make_sparse(model, **FIELDS, tree_width=4, branch_cutoff=1.0) as sparse:
        model.generate(
            make_prompt(), assistant_model=sparse, max_new_tokens=20, do_sample=False, logits_processor=[only_one]
        )
        assert all(len(cycle.branches.leaf_ids) == 1 for cycle in sparse.stats.cycles)


@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_processors_are_asked_about_drafted_prefixes_alone(threshold):
    """A constraint that knows the allowed sequences alone fails for any other."""
    model, prompt = build_model(), make_prompt()
    sequences = [(4, 5, 6, 7, 8, 9, 10, 11), (4, 5, 12, 13, 14, 15, 16, 17), (18, 19, 20, 21, 22, 23, 24, 25)]

    def allowed(_, ids):
        new = tuple(ids[prompt.shape[1] :].tolist())
        nexts = sorted({s[len(new)] for s in sequences if s[: len(new)] == new and len(s) > len(new)})
        assert nexts, f"{new} is no beginning of any sequence"
        return nexts

    options = {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **options)
    for width in (1, 3, 8):
        with make_sparse(model, **{**FIELDS, "threshold": threshold}, tree_width=width) as sparse:
            output = model.generate(prompt, assistant_model=sparse, **options)
        assert threshold < 1.0 or torch.equal(output, expected)


@pytest.mark.parametrize("tree_width", [1, 3])
@pytest.mark.parametrize("last", [2, 4])
def test_a_constraint_that_comes_to_its_end(tree_width, last):
    """It allows no token any more: whatever comes then, the call goes on as the dense one does."""
    model, prompt = build_model(), make_prompt()

    def none_behind(input_ids, scores):
        is_over = input_ids.shape[1] >= prompt.shape[1] + last
        return torch.full_like(scores, -math.inf) if is_over else scores

    options = {"max_new_tokens": 10, "do_sample": False, "logits_processor": [none_behind]}
    expected = model.generate(prompt, **options)
    with make_sparse(model, **FIELDS, tree_width=tree_width) as sparse:
        assert torch.equal(model.generate(prompt, assistant_model=sparse, **options), expected)


def test_layers_that_share_states_take_a_tree():
    model = tiny_model("gemma4_text", num_kv_shared_layers=1)
    expected = model.generate(make_prompt(), max_new_tokens=16, do_sample=False)
    with make_sparse(model, **FIELDS, tree_width=3) as sparse:
        output = model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=16, do_sample=False)
    assert torch.equal(output, expected) and max(len(c.branches.leaf_ids) for c in sparse.stats.cycles) > 1


def test_nodes_are_offered_by_the_processed_logits():
    model, suppressed = build_model(), list(range(4, 40))
    with make_sparse(model, **FIELDS, tree_width=8) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=30, suppress_tokens=suppressed)
        drafted = {token_id for c in sparse.stats.cycles for ids in c.branches.leaf_ids for token_id in ids}
    assert drafted and not drafted & set(suppressed)


def test_a_width_of_one_drafts_as_before():
    model = build_model()
    with make_sparse(model, **FIELDS, tree_width=1) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=12)
        assert all(cycle.branches is None for cycle in sparse.stats.cycles)
        assert sparse.stats.num_nodes_drafted == sparse.stats.num_drafted and not sparse.stats.aal_gain


# What a node reads, and what the cache holds


@given(
    family=st.sampled_from(["llama", "opt", "mistral", "gemma2", "gemma3_text"]),
    num_context=st.integers(1, 20),
    parents=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    split=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_a_node_has_the_logits_of_its_own_path(family, num_context, parents, split):
    model, context = shared_model(family), make_prompt(num_context)
    tree = Tree(7)
    for i, parent in enumerate(parents):
        tree.add(parent % (i + 1), 3 + i, -float(i))
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    first = min(split, len(tree) - 1)  # read in two forwards
    with torch.no_grad():
        model(context, past_key_values=cache, use_cache=True)
        cache.crop(0)
        reader = TreeReader(model, cache, torch.tensor([[num_context]]), None)
        head = Tree(7)
        for node in range(1, first):
            head.add(tree.parents[node], tree.token_ids[node], 0.0)
        with wide_windows(cache, len(tree)):
            logits = []
            for part, start in ((head, 0), (tree, first)):
                if IS_5_17 and start and any(layer.is_sliding for layer in cache.layers):
                    return  # needs `stepwise_windows`
                logits.append(model(**reader.inputs(part, start, {"past_key_values": cache, "use_cache": True})).logits)
        logits = torch.cat(logits, dim=1)[0]
        for node in range(len(tree)):
            path = torch.tensor([[7, *tree.path_ids(node)]])
            expected = model(torch.cat([context, path], dim=-1)).logits[0, -1]
            # Norms compute in float32, also of a model in float64.
            torch.testing.assert_close(logits[node], expected, atol=1e-5, rtol=1e-5)


@given(
    family=st.sampled_from(["llama", "mistral", "gemma3_text", "gpt2"]),
    method=st.sampled_from(["griffin", "cats"]),
    tree_width=st.integers(1, 8),
    kernel_size=st.integers(2, 9),
    threshold=st.sampled_from([1.0, 0.05]),
)
@settings(max_examples=40, deadline=None)
def test_after_each_cycle_the_cache_is_as_a_fresh_prefill_leaves_it(family, method, tree_width, kernel_size, threshold):
    model, num_compared = shared_model(family), 0
    update = SiriusCandidateGenerator.update_candidate_strategy

    def compare(generator, input_ids, scores, num_matches):
        nonlocal num_compared
        update(generator, input_ids, scores, num_matches)
        with torch.no_grad():
            logits = model(input_ids[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True).logits[0, -1]
            torch.testing.assert_close(logits, model(input_ids).logits[0, -1], atol=1e-6, rtol=1e-6)
        num_compared += 1

    cache = DynamicCache(config=model.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiriusCandidateGenerator, "update_candidate_strategy", compare)
        with make_sparse(
            model, method=method, density=0.4, threshold=threshold, kernel_size=kernel_size, tree_width=tree_width
        ) as sparse:
            model.generate(
                make_prompt(9), assistant_model=sparse, max_new_tokens=18, do_sample=False, past_key_values=cache
            )
    assert num_compared == sparse.stats.num_cycles + 1


def test_the_cache_is_not_copied_for_each_leaf():
    """A cycle's states are those of the context and one for each node."""
    model, cache, lengths = build_model(), DynamicCache(), []
    with make_sparse(model, **FIELDS, tree_width=8) as sparse:
        handle = model.model.layers[0].register_forward_hook(lambda *_: lengths.append(cache.layers[0].keys.shape))
        model.generate(make_prompt(400), assistant_model=sparse, max_new_tokens=20, past_key_values=cache)
        handle.remove()
    assert max(shape[0] for shape in lengths) == 1
    assert max(shape[2] for shape in lengths) <= 420 + 8 * (FIELDS["kernel_size"] - 1)


def test_one_forward_a_level_and_one_to_verify():
    model, num_read = build_model(), {"dense": [], "draft": []}
    with make_sparse(model, **FIELDS, tree_width=4) as sparse:
        for name, module in (("dense", model), ("draft", sparse)):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: num_read[name].append(kwargs["input_ids"].shape), with_kwargs=True
            )
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=20)
        stats = sparse.stats
    assert len(num_read["dense"]) == stats.num_cycles + 1
    assert len(num_read["draft"]) <= stats.num_cycles * (FIELDS["kernel_size"] - 1)
    assert all(shape[0] == 1 for shapes in num_read.values() for shape in shapes)


def test_leaves_of_a_level_share_their_neurons():
    from hf_sirius.settings.methods import method_class

    model = build_model(dtype=torch.float32)
    with make_sparse(model, method="cats", selection="topk", density=0.25, tree_width=4) as sparse:
        method = method_class("cats")(sparse.sirius_config, sparse._twin.sites)
    activations = torch.randn(1, 4, sparse._twin.sites[0].num_neurons)
    kept = method.drop(0, activations) != 0
    expected = activations.abs().sum(dim=1).topk(round(0.25 * kept.shape[-1])).indices[0]
    assert (kept == kept[:, :1]).all() and set(kept[0, 0].nonzero().flatten().tolist()) == set(expected.tolist())


# The tree by itself


def test_best_path_is_the_longest_and_then_the_likeliest():
    tree = Tree(0)
    a, b = tree.add(0, 1, -1.0), tree.add(0, 2, -2.0)
    c, d = tree.add(a, 3, -4.0), tree.add(b, 4, -3.0)
    assert best_path(tree, {}) == [] and best_path(tree, {0: [b]}) == [b]
    assert best_path(tree, {0: [a, b]}) == [a]
    assert best_path(tree, {0: [a, b], a: [c]}) == [a, c]
    assert best_path(tree, {0: [a, b], a: [c], b: [d]}) == [b, d]
    assert tree.likeliest_length({0: [a, b]}) == 0  # nothing was called likeliest
    tree.likeliest = c
    assert tree.likeliest_length({0: [b]}) == 0 and tree.likeliest_length({0: [a, b], a: [c]}) == 2
    assert tree.likeliest_length({0: [a, b], b: [d]}) == 1


def test_pruned_keeps_what_leads_to_a_leaf():
    tree = Tree(0)
    a, b = tree.add(0, 1, -1.0), tree.add(0, 2, -2.0)
    tree.add(a, 3, -4.0)
    last = tree.add(b, 4, -3.0)
    tree.leaves = [Leaf(last, -3.0, is_end=False), Leaf(0, -9.0, is_end=True)]
    pruned = tree.pruned()
    assert pruned.token_ids == [0, 2, 4] and pruned.parents == [-1, 0, 1]
    assert [leaf.node for leaf in pruned.leaves] == [2, 0]


# What is refused


def test_sampling_is_refused():
    model = build_model()
    sparse, options = make_sparse(model, **FIELDS, tree_width=2), {"max_new_tokens": 4, "do_sample": True}
    with pytest.raises(ValueError, match=r"tree_width=2 .* do_sample=True.*use tree_width=1"):
        model.generate(make_prompt(), assistant_model=sparse, **options)
    assert torch.isfinite(model(make_prompt()).logits).all()


def test_an_attention_without_a_mask_is_refused():
    model = build_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"\['sdpa', 'eager'\].*'flash_attention_2'"):
        make_sparse(model, **FIELDS, tree_width=2)


def test_a_cache_of_other_layers_is_refused():
    class OtherLayer(DynamicLayer):
        __module__ = "transformers.cache_utils"

    model, cache = build_model(), DynamicCache()
    cache.layer_class_to_replicate = OtherLayer
    sparse = make_sparse(model, **FIELDS, tree_width=2)
    with pytest.raises(ValueError, match=r"KV-cache with a OtherLayer: use tree_width=1"):
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=9, past_key_values=cache)
    assert model.generate(make_prompt(), max_new_tokens=4).shape[1] == make_prompt().shape[1] + 4


@pytest.mark.parametrize("value, error", [(0, ValueError), (17, ValueError), (2.0, TypeError), (True, TypeError)])
def test_widths_that_are_not_allowed(value, error):
    with pytest.raises(error, match=r"tree_width must be"):
        make_sparse(build_model(), tree_width=value)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tree_width", [1, 4])
@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_a_draft_that_is_interrupted_within_a_forward_is_taken_back(family, tree_width, num_steps):
    model, cache = build_model(family), DynamicCache()
    expected = model.generate(make_prompt(), max_new_tokens=30, do_sample=False, past_key_values=DynamicCache())
    steps = iter(range(1, 100))

    def interrupt(*_):
        if next(steps) == num_steps:
            raise KeyboardInterrupt

    with make_sparse(model, **FIELDS, tree_width=tree_width) as sparse:
        handle = sparse.model.layers[-1].register_forward_pre_hook(interrupt)
        options = {"max_new_tokens": 30, "do_sample": False, "past_key_values": cache}
        with pytest.raises(KeyboardInterrupt):
            model.generate(make_prompt(), assistant_model=sparse, **options)
        handle.remove()
        (length,) = {layer.get_seq_length() for layer in cache.layers}
        prompt = expected[:, : length + 1]
        options["max_new_tokens"] = expected.shape[1] - prompt.shape[1]
        assert torch.equal(model.generate(prompt, assistant_model=sparse, **options), expected)


@pytest.mark.parametrize("place", ["draft", "verification"])
def test_nothing_is_left_after_an_error(place):
    model = build_model()
    expected = model.generate(make_prompt(), max_new_tokens=12, do_sample=False)
    with make_sparse(model, **FIELDS, tree_width=4) as sparse:
        target, lengths = (sparse if place == "draft" else model), []

        def fail(*_):
            lengths.append(cache.get_seq_length())
            if len(lengths) == 3:
                raise KeyboardInterrupt

        handle, cache = target.register_forward_pre_hook(fail), DynamicCache()
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                make_prompt(), assistant_model=sparse, max_new_tokens=12, do_sample=False, past_key_values=cache
            )
        handle.remove()
        # All that was verified, and no more: the draft's first step, or the verification, found it so.
        assert cache.get_seq_length() == lengths[0 if place == "draft" else -1]
        assert not model._forward_hooks and not model._forward_pre_hooks
        output = model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=12, do_sample=False)
    assert torch.equal(output, expected)
