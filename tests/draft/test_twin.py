"""The twin: of the model's class, over the model's weights, and no change to the model."""

import contextlib
import copy
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from tiny import METHODS, build_model, make_prompt, sparse_logits
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_sirius import make_sparse
from hf_sirius.decode.sparse_twin import SparseTwin
from hf_sirius.draft.copies import shallow_copy
from hf_sirius.sparsity.base import TwinActivation
from hf_sirius.weights.draft_modules import TwinModule


FAMILIES = ("llama", "phi3", "opt", "gpt2")
GREEDY = {"max_new_tokens": 10, "do_sample": False}
# What stands outside of the MLPs.
SHARED = {
    "llama": ["lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.1.self_attn",
              "model.layers.1.self_attn.q_proj", "model.layers.0.input_layernorm"],
    "phi3": ["lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0.self_attn"],
    "opt": ["lm_head", "model.decoder.embed_tokens", "model.decoder.embed_positions",
            "model.decoder.layers.0.self_attn", "model.decoder.layers.1.final_layer_norm"],
    "gpt2": ["lm_head", "transformer.wte", "transformer.wpe", "transformer.h.0.attn", "transformer.h.1.ln_2",
             "transformer.ln_f"],
}  # fmt: skip
every_kind = pytest.mark.parametrize("family, name", [(f, n) for f in FAMILIES for n in ("cats-threshold", "griffin")])


def storages(*models) -> dict[int, int]:
    """Returns {address: bytes} of everything that the modules hold: parameters, buffers and plain tensor attributes."""
    tensors = []
    for model in models:
        tensors += [*model.parameters(), *model.buffers()]
        for module in model.modules():
            tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def snapshot(model) -> dict:
    """Returns what make_sparse must not change: which modules there are, and what stands in their dicts."""
    return {
        name: (id(module), {key: id(value) for key, value in vars(module).items()},
               [id(child) for child in module.children()], list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }  # fmt: skip


# What it is


@every_kind
def test_it_is_a_model_of_the_same_class(family, name):
    model = build_model(family)
    twin = make_sparse(model, **METHODS[name])
    own_class = type(build_model(family))
    assert isinstance(twin, own_class) and isinstance(twin, PreTrainedModel) and isinstance(twin, SparseTwin)
    assert type(twin).__name__ == type(model).__name__ and type(twin).__module__ == type(model).__module__
    assert not issubclass(own_class, SparseTwin)  # the model's own class is not the twin's
    assert twin.config is model.config and twin.dtype == model.dtype and twin.device == model.device
    assert twin.num_parameters() == model.num_parameters()


@every_kind
def test_its_state_dict_is_the_dense_models(family, name):
    model = build_model(family)
    dense, sparse = model.state_dict(), make_sparse(model, **METHODS[name]).state_dict()
    assert list(sparse) == list(dense)
    for key, tensor in dense.items():
        assert sparse[key].data_ptr() == tensor.data_ptr() and sparse[key].shape == tensor.shape, key


@every_kind
def test_it_holds_no_weights_of_its_own(family, name):
    model = build_model(family)
    before = storages(model)
    twin = make_sparse(model, **METHODS[name])
    model.generate(make_prompt(), assistant_model=twin, **GREEDY)
    added = sum(storages(model, twin).values()) - sum(before.values())
    assert 0 <= added < 0.01 * sum(before.values())
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}


@every_kind
def test_all_but_the_mlps_are_the_same_modules(family, name):
    model = build_model(family)
    twin = make_sparse(model, **METHODS[name])
    for path in SHARED[family]:
        assert twin.get_submodule(path) is model.get_submodule(path), path
    own = [module for path, module in twin.named_modules() if module not in set(model.modules())]
    stand_ins = [module for module in own if isinstance(module, (TwinModule, TwinActivation))]
    assert stand_ins and not any(list(module.parameters(recurse=False)) for module in own if module not in stand_ins)


def test_repr_names_what_was_replaced():
    shown = repr(make_sparse(build_model(), method="griffin"))
    assert shown.startswith("LlamaForCausalLM(") and "(down_proj): TwinModule(of Linear(in_features=64" in shown


def test_saving_it_saves_the_dense_model(tmp_path):
    model = build_model(dtype=torch.float32)
    make_sparse(model, method="griffin").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(make_prompt()).logits, model(make_prompt()).logits)


# What it leaves alone


@every_kind
def test_the_dense_model_is_unchanged(family, name):
    model, tokens = build_model(family), make_prompt()
    dense = copy.deepcopy(model.state_dict())
    expected = model(tokens).logits
    expected_ids = model.generate(tokens, **GREEDY)
    before = snapshot(model)

    def check(moment):
        assert snapshot(model) == before, moment
        assert all(torch.equal(tensor, dense[key]) for key, tensor in model.state_dict().items()), moment
        assert torch.equal(model(tokens).logits, expected), moment

    twin = make_sparse(model, **METHODS[name])
    check("made")
    assert torch.equal(model.generate(tokens, **GREEDY), expected_ids)
    model.generate(tokens, assistant_model=twin, **GREEDY)
    check("assisted")
    twin.generate(tokens, **GREEDY)
    check("sparse alone")
    with pytest.raises(RuntimeError, match="stop here"):
        model.generate(tokens, assistant_model=twin, logits_processor=[_raise_at(14)], **GREEDY)
    check("failed")
    twin.detach()
    check("detached")


def _raise_at(length):
    def process(input_ids, scores):
        if input_ids.shape[1] >= length:
            raise RuntimeError("stop here")
        return scores

    return process


# What reaches it


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cast_reaches_it(name, dtype):
    model = build_model()
    twin = make_sparse(model, density=0.3, **METHODS[name])
    model.to(dtype)
    assert {p.dtype for p in twin.parameters()} == {dtype}
    fresh = make_sparse(build_model().to(dtype), density=0.3, **METHODS[name])
    prompt, tokens = make_prompt(), make_prompt(5, seed=1)
    assert torch.equal(sparse_logits(twin, prompt, tokens), sparse_logits(fresh, prompt, tokens))
    model.generate(prompt, assistant_model=twin, **GREEDY)
    assert twin.stats.num_drafted > 0


@pytest.mark.parametrize("assign", [False, True], ids=["copied in", "assigned"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["cats-threshold", "griffin"])
def test_loaded_weights_reach_it(family, name, assign):
    model, other = build_model(family), build_model(family, seed=1)
    twin = make_sparse(model, density=0.3, **METHODS[name])
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    prompt, tokens = make_prompt(), make_prompt(5, seed=1)
    expected = sparse_logits(make_sparse(other, density=0.3, **METHODS[name]), prompt, tokens)
    assert torch.equal(sparse_logits(twin, prompt, tokens), expected)


def test_weights_trained_in_place_reach_it():
    model = build_model()
    twin = make_sparse(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert torch.equal(twin(make_prompt()).logits, model(make_prompt()).logits)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["cats-threshold", "griffin"])
def test_the_mode_of_the_dense_model_reaches_its_next_call(name, mode):
    model = build_model("opt", dropout=0.5).train(not mode)
    twin = make_sparse(model, **METHODS[name])
    model.train(mode)
    model.generate(make_prompt(), assistant_model=twin, max_new_tokens=3)
    astray = [path for path, module in twin.named_modules() if module.training != mode]
    assert not astray and all(module.training == mode for module in model.modules())


@pytest.mark.parametrize("name", ["cats-threshold", "griffin"])
def test_the_mode_of_the_dense_model_reaches_a_plain_forward(name):
    model = build_model("opt", dropout=0.5).train()  # as AutoModelForCausalLM.from_config leaves it
    twin = make_sparse(model, **METHODS[name])
    model.eval()
    assert torch.equal(twin(make_prompt()).logits, model(make_prompt()).logits)


# Models that were worked on before


@pytest.mark.parametrize("name", ["cats-threshold", "griffin"])
@pytest.mark.parametrize("path", ["", "model", "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.gate_proj"])
def test_accelerates_hooks_do_not_lead_back_to_dense_code(path, name):
    class Hook(ModelHook):
        num_calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.num_calls += 1
            return args, kwargs

    prompt, tokens = make_prompt(), make_prompt(5, seed=1)
    model, hook = build_model(), Hook()
    expected = sparse_logits(make_sparse(build_model(), density=0.2, **METHODS[name]), prompt, tokens)
    add_hook_to_module(model.get_submodule(path), hook)
    before = snapshot(model)
    with make_sparse(model, density=0.2, **METHODS[name]) as twin:
        assert torch.equal(sparse_logits(twin, prompt, tokens), expected)
    assert hook.num_calls == (1 if path.endswith("gate_proj") and name == "griffin" else 2)
    assert snapshot(model) == before


def _patch_with_method(module):
    dense_forward = type(module).forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: dense_forward(self, *args, **kwargs), module)


def _patch_with_wrapper(module):
    dense_forward = module.forward
    module.forward = lambda *args, **kwargs: dense_forward(*args, **kwargs)


@pytest.mark.parametrize("name", ["cats-threshold", "griffin"])
@pytest.mark.parametrize("patch", [_patch_with_method, _patch_with_wrapper], ids=["a method", "a wrapper"])
@pytest.mark.parametrize("path", ["", "model.layers.1.mlp"])
def test_a_patched_forward_is_never_silently_dense(path, patch, name):
    """Kernels, and `model.forward = torch.compile(model.forward)`, lay the *dense* forward over the instance."""
    prompt, tokens = make_prompt(), make_prompt(5, seed=1)
    expected = sparse_logits(make_sparse(build_model(), density=0.2, **METHODS[name]), prompt, tokens)
    model = build_model()
    patch(model.get_submodule(path))
    with contextlib.suppress(ValueError):  # to refuse it is as good
        twin = make_sparse(model, density=0.2, **METHODS[name])
        assert torch.equal(sparse_logits(twin, prompt, tokens), expected)


@pytest.mark.parametrize("name", ["cats-threshold", "griffin"])
def test_a_tied_head_stays_tied(name):
    model = build_model(tie_word_embeddings=True)
    twin = make_sparse(model, **METHODS[name])
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight is model.lm_head.weight


def test_two_twins_of_one_model_share_no_containers():
    model = build_model()
    first, second = make_sparse(model, density=0.1), make_sparse(model, method="griffin", density=0.9)
    shared = set(model.modules())
    assert not (set(first.modules()) - shared) & (set(second.modules()) - shared)
    activations = [twin.model.layers[0].mlp.act_fn for twin in (first, second)]
    assert isinstance(activations[0], TwinActivation) and activations[1] is model.model.layers[0].mlp.act_fn


def test_the_mode_is_one_of_both():
    model = build_model()
    twin = make_sparse(model, method="griffin")
    for mode in (True, False):
        assert twin.train(mode) is twin
        assert {module.training for module in [*model.modules(), *twin.modules()]} == {mode}


def test_a_copy_of_a_copy_runs_what_is_laid_over_the_module():
    module = torch.nn.Linear(2, 2)
    module.forward = types.MethodType(lambda self, inputs: inputs + 1, module)
    add_hook_to_module(module, ModelHook())
    assert shallow_copy(shallow_copy(module))(torch.ones(1)).item() == 2


@pytest.mark.parametrize("selection", ["threshold", "topk"])
def test_an_activation_that_is_a_plain_function(selection):
    model = build_model()
    for block in model.model.layers:
        del block.mlp._modules["act_fn"]
        block.mlp.act_fn = torch.nn.functional.silu
    expected = model.generate(make_prompt(), **GREEDY)
    fields = {"method": "cats", "selection": selection, "density": 0.3, "threshold": 1.0, "kernel_size": 5}
    with make_sparse(model, **fields) as twin:
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **GREEDY), expected)
        assert twin.stats.draft_density < 0.9


def test_taking_accelerates_hooks_off_the_twin_leaves_those_that_it_stands_in_for():
    model = build_model()
    for part in (model.model.layers[0].mlp, model.model.layers[0].mlp.gate_proj):
        add_hook_to_module(part, ModelHook())
    before, expected = snapshot(model), model.generate(make_prompt(), **GREEDY)
    twin = make_sparse(model, method="griffin", threshold=1.0, kernel_size=5)
    remove_hook_from_submodules(twin)
    assert snapshot(model) == before
    assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **GREEDY), expected)
