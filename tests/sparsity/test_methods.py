"""CATS and GRIFFIN: which neurons they keep, and that the twin then computes what a masked dense model computes."""

import contextlib
import importlib.util
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import tiny_model
from tiny import METHODS, VOCAB_SIZE, build_model, make_prompt
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from hf_sirius import SiriusConfig, make_sparse
from hf_sirius.draft.draft import Draft
from hf_sirius.model.observation import observing
from hf_sirius.model.sites import find_mlps, neuron_weight
from hf_sirius.settings.methods import method_class
from hf_sirius.sparsity import cats
from hf_sirius.weights.linear import read_needed


NUM_NEURONS = 64
# Every layout of an MLP: gate and up, fused, two layers; with biases; with transposed weights.
KINDS = {
    "gated": ("llama", {}),
    "gated with biases": ("llama", {"mlp_bias": True}),
    "fused": ("phi3", {}),
    "plain": ("opt", {}),
    "Conv1D": ("gpt2", {}),
}


def build_kind(kind: str, **fields):
    """Returns a tiny model with MLPs of this kind, whose biases are not zero."""
    family, kind_fields = KINDS[kind]
    model = build_model(family, **kind_fields, **fields)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@contextlib.contextmanager
def prefilled(twin, prompt, attention_mask=None):
    """Runs a prefill as `generate` does; yields the draft, which has chosen its neurons."""
    with twin.new_call() as call:
        with call.draft.observing(attention_mask):
            twin.dense_model(prompt, attention_mask=attention_mask)
        call.draft.select()
        yield call.draft


def draft_logits(twin, prompt, tokens):
    """Returns the logits of a sparse forward over `tokens`, with the neurons that `prompt` chose."""
    with prefilled(twin, prompt) as draft, draft.drafting():
        return twin(tokens).logits


@contextlib.contextmanager
def hooked(handles):
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(model, what: str, tokens):
    """Returns, for each MLP, what a dense forward over tokens has there: float [num_tokens, num_neurons].

    "neurons": the input of down; "activations": act(gate x), worked out from the gate's output.
    """
    seen = []

    def of_gate(site):
        activation = getattr(site.owner, site.activation)
        return lambda _, args, output: seen.append(activation(output[..., :NUM_NEURONS]).reshape(-1, NUM_NEURONS))

    def of_down(_, args):
        seen.append(args[0].reshape(-1, NUM_NEURONS))

    sites = find_mlps(model)
    if what == "neurons":
        handles = (site.down.register_forward_pre_hook(of_down) for site in sites)
    else:
        handles = (site.gate.register_forward_hook(of_gate(site)) for site in sites)
    with torch.no_grad(), hooked(handles):
        model(tokens)
    return seen


def masked_logits(model, tokens, choose_mask):
    """Returns the logits of the dense model whose down projections see z * choose_mask(i, act(gate x)) in MLP i."""
    gates = {}

    def on_gate(site):
        def note(_, args, output):
            gates[site.idx] = getattr(site.owner, site.activation)(output[..., :NUM_NEURONS])

        return note

    def on_down(site):
        return lambda _, args: (args[0] * choose_mask(site.idx, gates[site.idx]),)

    sites = find_mlps(model)
    handles = [handle for site in sites for handle in (
        site.gate.register_forward_hook(on_gate(site)), site.down.register_forward_pre_hook(on_down(site)),
    )]  # fmt: skip
    with torch.no_grad(), hooked(handles):
        return model(tokens).logits


def griffin_neurons(neurons: torch.Tensor, num_kept: int) -> list[int]:
    """Returns the neurons with the largest norm over the tokens of |z_j| / ||z||, in order: GRIFFIN's formula."""
    totals = [0.0] * neurons.shape[1]
    for row in neurons.tolist():
        norm = sum(z * z for z in row) ** 0.5
        for j, z in enumerate(row):
            totals[j] += (z / norm) ** 2
    return sorted(sorted(range(len(totals)), key=lambda j: -totals[j])[:num_kept])


# What is kept


@pytest.mark.parametrize("density, num_kept", [(0.001, 1), (0.1, 6), (0.5, 32), (0.99, 63), (1.0, 64)])
def test_topk_keeps_exactly_the_largest_share_of_every_token(density, num_kept):
    sites = find_mlps(build_model())
    method = method_class("cats")(SiriusConfig(selection="topk", density=density), sites)
    activations = torch.randn(1, 5, NUM_NEURONS, generator=torch.Generator().manual_seed(0))
    dropped = method.drop(0, activations)
    for before, after in zip(activations[0], dropped[0], strict=True):
        largest = before.abs().argsort(descending=True)[:num_kept]
        expected = torch.zeros_like(before).index_copy(0, largest, before[largest])
        assert torch.equal(after, expected)
    expected = sites[0].num_parameters_read(num_kept / NUM_NEURONS, gate_in_full=True)
    assert method.num_parameters_read(sites[0]) == expected


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gated", "fused", "Conv1D"])
def test_thresholds_of_the_prompt_keep_the_asked_share_of_it(kind, dtype, density):
    model = build_kind(kind, dtype=dtype)
    twin = make_sparse(model, density=density)
    prompt = make_prompt(64)
    with prefilled(twin, prompt) as draft:
        for i, values in enumerate(watch(model, "activations", prompt)):
            asked = min(density, (values != 0).double().mean().item())  # a zero (GELU in bfloat16) is kept by nothing
            assert (draft.method.drop(i, values) != 0).double().mean().item() == pytest.approx(asked, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_neurons_that_are_zero_are_never_kept(dtype):
    model = build_kind("plain", dtype=dtype)  # ReLU
    prompt = make_prompt(32)
    zeros = [(values == 0).double().mean().item() for values in watch(model, "activations", prompt)]
    assert min(zeros) > 0.3
    twin = make_sparse(model, density=0.9)
    with prefilled(twin, prompt) as draft, draft.drafting():
        twin(prompt)
        share = draft.method.num_parameters_read(twin._twin.sites[0])
    site = twin._twin.sites[0]
    assert share <= site.num_parameters_read(1 - zeros[0] + 0.02, gate_in_full=True)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_griffin_keeps_the_neurons_of_its_formula(kind, density):
    model = build_kind(kind)
    prompt = make_prompt(20)
    with prefilled(make_sparse(model, method="griffin", density=density), prompt) as draft:
        chosen = [neuron_indices.tolist() for neuron_indices in draft.method.neuron_indices]
    assert chosen == [griffin_neurons(z, round(density * NUM_NEURONS)) for z in watch(model, "neurons", prompt)]


@pytest.mark.parametrize("name", METHODS)
def test_padding_does_not_count(name):
    twin = make_sparse(build_model(), density=0.3, **METHODS[name])
    prompt, tokens = make_prompt(12), make_prompt(6, seed=1)
    padded = torch.nn.functional.pad(prompt, (9, 0))
    with prefilled(twin, padded, attention_mask=(padded != 0).long()) as draft, draft.drafting():
        logits = twin(tokens).logits
    torch.testing.assert_close(logits, draft_logits(twin, prompt, tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cats-threshold", "griffin"])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_prefill_in_chunks_chooses_the_same_neurons(name, padding):
    twin = make_sparse(build_model(), density=0.2, **METHODS[name])
    prompt = torch.nn.functional.pad(make_prompt(12), (padding, 0))
    options = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 20, "output_logits": True}
    whole = twin.generate(prompt, return_dict_in_generate=True, **options)
    chunked = twin.generate(prompt, return_dict_in_generate=True, prefill_chunk_size=4, **options)
    # `generate` hands logits out in float32.
    torch.testing.assert_close(torch.cat(chunked.logits), torch.cat(whole.logits), rtol=0, atol=1e-6)


# What is computed


@pytest.mark.parametrize("kind", KINDS)
def test_griffin_gathers_rows_and_columns_of_the_dense_weights(kind):
    twin = make_sparse(build_kind(kind), method="griffin", density=0.25)
    with prefilled(twin, make_prompt()) as draft:
        for site in twin._twin.sites:
            kept = draft.method.neuron_indices[site.idx]
            assert kept.shape == (NUM_NEURONS // 4,)
            for part in (site.gate, site.up):
                if part is None:
                    continue
                weight, bias = draft.held[part].linear.weight, draft.held[part].linear.bias
                halves = neuron_weight(part).split(NUM_NEURONS)
                assert len(halves) == (2 if kind == "fused" else 1)
                assert torch.equal(weight, torch.cat([half[kept] for half in halves]))
                assert (bias is None) if part.bias is None else torch.equal(bias, part.bias[kept])
            weight, bias = draft.held[site.down].linear.weight, draft.held[site.down].linear.bias
            assert torch.equal(weight, neuron_weight(site.down)[:, kept])
            assert (bias is None) if site.down.bias is None else torch.equal(bias, site.down.bias)


@pytest.mark.parametrize("density", [0.25, 1.0])
@pytest.mark.parametrize("draft_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_griffin_casts_what_it_gathers(kind, draft_dtype, density):
    model, prompt, tokens = build_kind(kind), make_prompt(), make_prompt(6, seed=1)
    plain = draft_logits(make_sparse(model, method="griffin", density=density), prompt, tokens)
    twin = make_sparse(model, method="griffin", density=density, draft_dtype=draft_dtype)
    with prefilled(twin, prompt) as draft:
        gathered = [parameter for held in draft.held.values() for parameter in held.parameters()]
        assert {part.dtype for part in gathered} == {getattr(torch, draft_dtype)}
        with draft.drafting():
            logits = twin(tokens).logits
    error = (logits - plain).norm() / plain.norm()
    assert logits.dtype == plain.dtype and 0 < error < 0.05
    output = model.generate(prompt, assistant_model=make_sparse(model, twin.sirius_config, threshold=1.0))
    assert torch.equal(output, model.generate(prompt))


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_cast_as_a_whole(kind):
    model, prompt, tokens = build_kind(kind), make_prompt(), make_prompt(6, seed=1)
    fields = {"method": "griffin", "density": 0.5, "threshold": 1.0, "kernel_size": 16}
    plain = draft_logits(make_sparse(model, **fields), prompt, tokens)
    twin = make_sparse(model, **fields, draft_dtype="bfloat16", draft_scope="all")
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    with prefilled(twin, prompt) as draft:
        assert set(draft.held) == set(linear), "every projection, and the head"
        with draft.drafting():
            logits = twin(tokens).logits
    assert 0 < (logits - plain).norm() / plain.norm() < 0.1
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(twin(tokens).logits, model(tokens).logits), "dense outside of a draft"
    output = model.generate(prompt, assistant_model=twin, max_new_tokens=20)
    assert twin.stats.num_accepted > 0
    assert torch.equal(output, model.generate(prompt, max_new_tokens=20))


@pytest.mark.parametrize("draft_dtype", ["bfloat16", "float16", "int8", "nf4"])
@pytest.mark.parametrize("scope", ["mlp", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cats_draft_reads_cast_weights(kind, scope, draft_dtype):
    model, prompt, tokens = build_kind(kind), make_prompt(), make_prompt(6, seed=1)
    fields = {"method": "cats", "density": 0.5, "threshold": 1.0, "kernel_size": 16}
    plain = draft_logits(make_sparse(model, **fields), prompt, tokens)
    twin = make_sparse(model, **fields, draft_dtype=draft_dtype, draft_scope=scope)
    parts = {part for site in twin._twin.sites for part in site.parts}
    linear = {m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    with torch.no_grad(), prefilled(twin, prompt) as draft:
        assert set(draft.held) == (parts if scope == "mlp" else linear)
        with draft.drafting():
            logits = twin(tokens).logits
    assert 0 < (logits - plain).norm() / plain.norm() < (0.1 if draft_dtype.startswith(("b", "f")) else 0.6)
    assert torch.equal(twin(tokens).logits, model(tokens).logits), "dense outside of a draft"
    output = model.generate(prompt, assistant_model=twin, max_new_tokens=20)
    assert twin.stats.num_drafted > 0 and 0 < twin.stats.draft_density < 1
    assert torch.equal(output, model.generate(prompt, max_new_tokens=20))


def test_a_budget_too_small_for_the_casts_of_cats_is_told():
    with pytest.raises(ValueError, match=r"draft_memory='1KB' is too small .*need \d+ bytes"):
        make_sparse(build_model(), draft_dtype="bfloat16", draft_memory="1KB")


@pytest.mark.parametrize("every", [None, 1, 3])
def test_griffin_chooses_anew_from_all_that_was_read(monkeypatch, every):
    model, prompt = build_model(), make_prompt()
    chosen, select = [], Draft.select

    def noting(draft):
        select(draft)
        chosen.append([neuron_indices.tolist() for neuron_indices in draft.method.neuron_indices])

    monkeypatch.setattr(Draft, "select", noting)
    read = []
    with make_sparse(model, method="griffin", density=0.25, kernel_size=4, reselect_every=every) as twin:
        noting_inputs = model.register_forward_pre_hook(
            lambda _, args, inputs: read.append(inputs["input_ids"]), with_kwargs=True
        )
        model.generate(prompt, assistant_model=twin, max_new_tokens=30)
        noting_inputs.remove()
        num_cycles = twin.stats.num_cycles
    assert len(chosen) == 1 + (num_cycles // every if every else 0)
    if every != 1:
        return
    # A rolled-back token has had its say: the model read it.
    sites, cache = find_mlps(model), DynamicCache()
    statistic = [torch.zeros(NUM_NEURONS, dtype=torch.float64) for _ in sites]

    def add(site, z):
        statistic[site.idx] += (z / z.norm(dim=-1, keepdim=True)).square().sum(dim=0)

    accepted = [cycle.advance_length for cycle in twin.stats.cycles]
    with torch.no_grad():
        for input_ids, num_kept in zip(read, [prompt.shape[1], *accepted], strict=True):
            with observing(model, sites, "neurons", add):
                model(input_ids, past_key_values=cache)
            if num_kept < input_ids.shape[1]:
                cache.crop(num_kept - input_ids.shape[1])
    assert chosen[-1] == [s.topk(NUM_NEURONS // 4).indices.sort().values.tolist() for s in statistic]


def test_a_draft_ends_in_doubt():
    model = build_model()
    fields = {"method": "griffin", "density": 0.5, "kernel_size": 8, "threshold": 1.0}
    dense = model.generate(make_prompt(), max_new_tokens=40)
    num_drafted = []
    for confidence in (0.0, 0.2, 0.5, 0.999):
        with make_sparse(model, **fields, draft_confidence=confidence) as twin:
            assert torch.equal(model.generate(make_prompt(), assistant_model=twin, max_new_tokens=40), dense)
            stats = twin.stats
            num_drafted.append(stats.num_drafted / stats.num_cycles)
            doubtful = [cycle for cycle in stats.cycles if cycle.is_full and len(cycle.drafted_ids) < 7]
            assert bool(doubtful) == (confidence > 0), "a draft that ends in doubt is none that was cut"
            read = sum(len(c.drafted_ids) for c in stats.cycles if c.is_full) * stats.draft_density
            num_full = stats.num_cycles - stats.num_short_cycles
            gained = sum(c.advance_length for c in stats.cycles if c.is_full)
            assert stats.effective_density == pytest.approx((read + num_full) / gained)
    assert num_drafted == sorted(num_drafted, reverse=True) and num_drafted[0] > 6 and 0.9 < num_drafted[-1] < 2


def test_griffin_refuses_a_norm_over_all_neurons():
    model = tiny_model("bitnet")
    with pytest.raises(ValueError, match=r"mlp\.ffn_sub_norm .*method='cats'"):
        make_sparse(model, method="griffin")
    make_sparse(model, method="cats").detach()


def test_padding_of_a_looped_model_does_not_count():
    """Its MLPs run several times over the same tokens."""
    model = build_model()
    site, values, seen = find_mlps(model)[0], torch.randn(1, 4, 32, dtype=torch.float64), []
    with observing(
        model, [site], "neurons", lambda _, neurons: seen.append(len(neurons)), torch.tensor([[0, 0, 1, 1]])
    ):
        for _ in range(3):
            site.owner(values)
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_griffin_draft_is_a_masked_dense_forward(kind):
    model = build_kind(kind)
    prompt, tokens = make_prompt(20), make_prompt(7, seed=1)
    kept = [griffin_neurons(z, 16) for z in watch(model, "neurons", prompt)]
    masks = [torch.zeros(NUM_NEURONS, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True) for chosen in kept]
    expected = masked_logits(model, tokens, lambda i, _: masks[i])
    with torch.no_grad():
        logits = draft_logits(make_sparse(model, method="griffin", density=0.25), prompt, tokens)
        assert (logits - model(tokens).logits).abs().max() > 1e-3  # it does drop something
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cats_draft_is_a_masked_dense_forward(kind, selection):
    model = build_kind(kind)
    prompt, tokens = make_prompt(20), make_prompt(7, seed=1)
    twin = make_sparse(model, selection=selection, density=0.25)
    with torch.no_grad(), prefilled(twin, prompt) as draft, draft.drafting():
        logits = twin(tokens).logits
        thresholds = draft.method.cutoffs.values

    def choose_mask(i, activations):
        magnitudes = activations.abs()
        if selection == "threshold":
            return magnitudes >= thresholds[i]
        return magnitudes >= magnitudes.sort(dim=-1, descending=True).values[..., 15:16]

    torch.testing.assert_close(logits, masked_logits(model, tokens, choose_mask), rtol=0, atol=1e-12)
    with torch.no_grad():
        assert (logits - model(tokens).logits).abs().max() > 1e-3


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("draft_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("tree_width", [1, 3])
@torch.no_grad()
def test_of_up_only_kept_rows_are_read(tree_width, draft_dtype, monkeypatch):
    model, prompt, tokens = build_model("llama", dtype=torch.float32), make_prompt(), make_prompt(tree_width, seed=1)
    fields = {"density": 0.3, "selection": "topk", "tree_width": tree_width, "draft_dtype": draft_dtype}
    num_read = []

    def watched(module, inputs, is_needed):
        num_read.append(int(is_needed.sum()))
        return read_needed(module, inputs, is_needed)

    monkeypatch.setattr(cats, "read_needed", watched)
    with make_sparse(model, **fields) as twin:
        skipped = draft_logits(twin, prompt, tokens)
        assert num_read == 2 * [round(0.3 * NUM_NEURONS)]
        assert twin.stats.is_masking is False
        monkeypatch.setattr(cats, "read_needed", lambda *args: None)
        masked = draft_logits(twin, prompt, tokens)
        assert twin.stats.is_masking is True and twin.stats.total.is_masking is True
    assert (skipped - masked).norm() <= (1e-5 if draft_dtype is None else 1e-2) * masked.norm()


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
@torch.no_grad()
def test_up_before_the_activation_is_read_whole(monkeypatch):
    model, prompt = build_model("llama", dtype=torch.float32), make_prompt()
    mlp_class = type(model.model.layers[0].mlp)
    with make_sparse(model, density=0.3, selection="topk") as twin:
        right = [draft_logits(twin, prompt, make_prompt(1, seed)) for seed in range(3)]
        monkeypatch.setattr(
            mlp_class, "forward", lambda self, x: self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))
        )
        with prefilled(twin, prompt) as draft, draft.drafting():
            for seed in range(3):
                logits = twin(make_prompt(1, seed)).logits
                assert (logits - right[seed]).norm() <= 1e-5 * right[seed].norm()
        assert twin.stats.is_masking is True


@pytest.mark.parametrize("draft_dtype", [None, "bfloat16"])
@torch.no_grad()
def test_of_many_leaves_stats_say_that_all_is_read(draft_dtype):
    model = build_model("llama", dtype=torch.float32)
    fields = {"density": 0.3, "tree_width": 8, "draft_dtype": draft_dtype}
    with make_sparse(model, **fields) as twin:
        draft_logits(twin, make_prompt(), make_prompt(8, seed=1))
        assert twin.stats.is_masking is True


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("tree_width, is_masking", [(1, False), (3, False), (8, True)])
def test_stats_say_what_becomes_of_most_tokens(tree_width, is_masking):
    """The first level of a tree is a single token, for which rows are skipped in any case."""
    model = build_model("llama", dtype=torch.float32)
    fields = {"density": 0.3, "tree_width": tree_width, "branch_cutoff": 1.0, "kernel_size": 6}
    with make_sparse(model, **fields) as twin:
        model.generate(make_prompt(), assistant_model=twin, max_new_tokens=14)
        assert twin.stats.is_masking is is_masking


def test_where_no_row_is_left_out_stats_say_so():
    for kind, name, is_masking in (("fused", "cats-topk", True), ("gated", "teal", True), ("gated", "griffin", False)):
        model = build_kind(kind)
        with make_sparse(model, **METHODS[name]) as twin:
            assert twin.stats.is_masking is None
            model.generate(make_prompt(), assistant_model=twin, max_new_tokens=4)
            assert twin.stats.is_masking is is_masking and twin.stats.as_dict()["is_masking"] is is_masking


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_full_density_the_draft_is_the_dense_model(kind, name):
    model = build_kind(kind)
    tokens = make_prompt(7, seed=1)
    logits = draft_logits(make_sparse(model, density=1.0, **METHODS[name]), make_prompt(), tokens)
    assert torch.equal(logits, model(tokens).logits)


@pytest.mark.parametrize("name", METHODS)
def test_outside_of_a_draft_the_twin_is_dense(name):
    model = build_model()
    twin = make_sparse(model, density=0.1, **METHODS[name])
    tokens = make_prompt()
    expected = model(tokens).logits
    assert torch.equal(twin(tokens).logits, expected)
    twin.generate(tokens, max_new_tokens=4)
    assert torch.equal(twin(tokens).logits, expected)


# What is read


def llama_parameters(kept_gate: float, kept: float, tied: bool, embedding_rows: int) -> float:
    """Counts by hand what a step reads of the tiny Llama, given the neurons read of gate, and of up and down."""
    hidden, kv = 32, 16
    attention = 2 * hidden * hidden + 2 * hidden * kv
    layer = attention + 2 * hidden + hidden * (kept_gate + 2 * kept)
    head = VOCAB_SIZE * hidden
    return 2 * layer + hidden + head + (0 if tied else embedding_rows * hidden)


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
@pytest.mark.parametrize("name, kept_gate", [("griffin", 16), ("cats-topk", NUM_NEURONS)])
def test_draft_density_against_a_count_by_hand(name, kept_gate, tied):
    model = build_model(tie_word_embeddings=tied)
    twin = make_sparse(model, density=0.25, **METHODS[name])
    model.generate(make_prompt(), assistant_model=twin, max_new_tokens=12, do_sample=False)
    everything = llama_parameters(NUM_NEURONS, NUM_NEURONS, tied, embedding_rows=VOCAB_SIZE)
    assert everything == model.num_parameters()
    read = llama_parameters(kept_gate, 16, tied, embedding_rows=1)
    assert twin.stats.draft_density == pytest.approx(read / everything)


def test_a_vision_tower_does_not_count():
    text = build_model("gemma3_text", tie_word_embeddings=True)
    tower = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    tower |= {"image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text.config, vision_config=tower, mm_tokens_per_image=4, tie_word_embeddings=True)
    ).double()
    densities = []
    for dense in (text, model):
        with prefilled(make_sparse(dense, method="griffin", density=0.25), make_prompt()) as draft:
            densities.append(draft.method.draft_density(dense))
    assert sum(p.numel() for p in model.parameters()) > 2 * sum(p.numel() for p in text.parameters())
    assert densities[0] == pytest.approx(densities[1]) and densities[0] < 0.7


def test_of_a_table_of_positions_one_row_is_read():
    model = build_model("gpt2", tie_word_embeddings=True)
    twin = make_sparse(model, method="griffin", density=1.0)
    with prefilled(twin, make_prompt()) as draft:
        unread = 255 * 32  # of 256 positions; the embedding is the head
        assert draft.method.draft_density(model) == pytest.approx(1 - unread / model.num_parameters())


def test_draft_density_of_thresholds_is_of_the_neurons_really_kept():
    model = build_model()
    twin = make_sparse(model, density=0.3)
    tokens = make_prompt(9, seed=1)
    kept = []
    with torch.no_grad(), prefilled(twin, make_prompt(32)) as draft, draft.drafting():
        for layer in twin.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda _, args, output: kept.append((output != 0).sum().item()))
        twin(tokens)
        draft_density = draft.method.draft_density(model)
    mean = sum(kept) / len(kept) / tokens.shape[1]
    read = llama_parameters(NUM_NEURONS, mean, tied=False, embedding_rows=1)
    assert draft_density == pytest.approx(read / model.num_parameters())


def test_before_a_step_there_is_no_draft_density():
    model = build_model()
    for fields in METHODS.values():
        with make_sparse(model, **fields).new_call() as call:
            assert call.draft.method.draft_density(model) is None


# Contexts


@pytest.mark.parametrize("name", METHODS)
def test_a_draft_in_one_thread_leaves_the_twin_dense_in_another(name):
    model = build_model()
    twin = make_sparse(model, density=0.1, **METHODS[name])
    tokens = make_prompt()
    expected = model(tokens).logits
    with ThreadPoolExecutor(1) as other, prefilled(twin, tokens) as draft, draft.drafting():
        assert torch.equal(other.submit(lambda: twin(tokens).logits).result(), expected)
        assert not torch.equal(twin(tokens).logits, expected)


@pytest.mark.parametrize("name", METHODS)
def test_two_threads_draft_each_with_its_own_neurons(name):
    twin = make_sparse(build_model(), density=0.1, **METHODS[name])
    prompts, tokens = [make_prompt(20), make_prompt(30, seed=5)], make_prompt(6, seed=9)
    expected = [draft_logits(twin, prompt, tokens) for prompt in prompts]
    assert name == "cats-topk" or not torch.equal(*expected)  # top-k asks the prompt for nothing
    at_once = threading.Barrier(2, timeout=60)

    def draft(prompt):
        with twin.new_call() as call:
            with call.draft.observing(None):
                at_once.wait()  # both observe, on the same modules
                twin.dense_model(prompt)
                at_once.wait()
            call.draft.select()
            at_once.wait()
            with call.draft.drafting():
                return twin(tokens).logits

    with ThreadPoolExecutor(2) as threads:
        for logits, alone in zip(threads.map(draft, prompts), expected, strict=True):
            assert torch.equal(logits, alone)


@pytest.mark.parametrize("name", METHODS)
def test_calls_in_two_threads_give_what_they_give_one_by_one(name):
    model = build_model()
    twin = make_sparse(model, density=0.1, kernel_size=4, **METHODS[name])
    prompts = [make_prompt(8 + i, seed=i) for i in range(4)]

    def generate(prompt):
        return model.generate(prompt, assistant_model=twin, max_new_tokens=16, do_sample=False)

    one_by_one = [generate(prompt) for prompt in prompts]
    counts = twin.stats.total.as_dict()
    twin.stats.reset()
    with ThreadPoolExecutor(2) as threads:
        at_once = list(threads.map(generate, prompts))
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    assert twin.stats.total.as_dict() == pytest.approx(counts)


@pytest.mark.parametrize("method", ["cats-threshold", "cats-topk"])
@pytest.mark.parametrize("tree_width", [1, 3])
def test_a_method_that_mlps_pass_by_is_an_error(method, tree_width):
    model = build_model()
    for layer in model.model.layers:  # as patches with fused kernels do
        mlp = layer.mlp
        mlp.forward = types.MethodType(
            lambda self, x: self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)), mlp
        )
    fields = {"density": 0.1, "tree_width": tree_width, "threshold": 1.0, "kernel_size": 16}
    with make_sparse(model, **METHODS[method], **fields) as twin:
        with pytest.raises(RuntimeError, match="method='cats' was asked for, and a draft step of this Llama"):
            model.generate(make_prompt(), max_new_tokens=8, assistant_model=twin)
        with pytest.raises(RuntimeError, match="has passed it by"):
            twin.generate(make_prompt(), max_new_tokens=8)
    expected = model.generate(make_prompt(), max_new_tokens=8)
    for other in ({"method": "griffin"}, {"method": "teal"}, {"method": "cats", "density": 1.0, "draft_dtype": "int8"}):
        with make_sparse(model, **{**fields, **other}) as twin:
            assert torch.equal(model.generate(make_prompt(), max_new_tokens=8, assistant_model=twin), expected)
            assert twin.stats.num_drafted
