"""`make_sparse`: attach and detach, what it refuses, and the private parts of transformers that it stands on."""

import copy
import gc
import inspect
import itertools
import subprocess
import sys
import types
import weakref

import pytest
import torch
import transformers
from tiny import METHODS, build_model, build_tokenizer, make_prompt
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.generation.candidate_generator import CandidateGenerator

from hf_sirius import SiriusConfig, calibrate, make_sparse
from hf_sirius.decode.bond import STEPS


GREEDY = {"max_new_tokens": 10, "do_sample": False}
LOSSLESS = {"threshold": 1.0, "density": 0.2, "kernel_size": 4}


def assisted(model, twin, seed: int = 0):
    return model.generate(make_prompt(seed=seed), assistant_model=twin, **GREEDY)


def plain(model, seed: int = 0):
    return model.generate(make_prompt(seed=seed), **GREEDY)


# Attach and detach


def test_detach_gives_back_the_very_same_instance():
    model = build_model()
    before, own_class = dict(vars(model)), type(model)
    twin = make_sparse(model)
    assert type(model) is not own_class and vars(model) == before
    twin.detach()
    assert type(model) is own_class
    assert vars(model).keys() == before.keys() and all(vars(model)[key] is value for key, value in before.items())
    twin.detach()  # harmless
    assert type(model) is own_class


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_several_twins_detach_in_any_order(order):
    model = build_model()
    keys, expected = set(vars(model)), plain(model)
    twins = [make_sparse(model, **fields, **LOSSLESS) for fields in METHODS.values()]
    attached = list(twins)
    for i in order:
        twins[i].detach()
        attached.remove(twins[i])
        for twin in attached:
            assert torch.equal(assisted(model, twin), expected) and twin.stats.num_drafted > 0
            twin.stats.reset()
    assert set(vars(model)) == keys


def test_as_a_context_manager_it_detaches_even_on_an_error():
    model = build_model()
    own_class = type(model)
    with pytest.raises(RuntimeError, match="in between"), make_sparse(model) as twin:
        assert twin.dense_model is model and type(model) is not own_class
        raise RuntimeError("in between")
    assert type(model) is own_class


@pytest.mark.parametrize("whose", ["detached", "another model's"])
def test_a_twin_of_no_concern_is_refused_with_the_remedy(whose):
    model = build_model()
    twin = make_sparse(model if whose == "detached" else build_model(seed=1))
    if whose == "detached":
        twin.detach()
    with pytest.raises(ValueError, match=r"not attached.*make_sparse"):
        assisted(model, twin)


def test_the_assistant_may_be_given_by_place():
    model = build_model()
    with make_sparse(model, **LOSSLESS) as twin:
        expected = plain(model)
        by_place = model.generate(make_prompt(), None, None, None, None, None, twin, **GREEDY)
        assert torch.equal(by_place, expected) and twin.stats.num_drafted > 0


def test_another_assistant_still_works_beside_a_twin():
    model, assistant = build_model(), build_model(num_hidden_layers=1)
    expected = plain(model)
    with make_sparse(model) as twin:
        assert torch.equal(model.generate(make_prompt(), assistant_model=assistant, **GREEDY), expected)
        assert torch.equal(model.generate(make_prompt(), prompt_lookup_num_tokens=3, **GREEDY), expected)
        assert twin.stats.num_cycles == 0


@pytest.mark.parametrize("name", ["cats-threshold", "griffin"])
def test_every_twin_has_its_own_sparse_baseline(name):
    model = build_model()
    only = make_sparse(build_model(), density=0.1, **METHODS[name])
    first = make_sparse(model, density=0.1, **METHODS[name])
    second = make_sparse(model, density=0.1, **METHODS[name])
    expected = only.generate(make_prompt(), **GREEDY)
    assert not torch.equal(expected, plain(model))
    assert torch.equal(first.generate(make_prompt(), **GREEDY), expected)
    assert torch.equal(second.generate(make_prompt(), **GREEDY), expected)


# Copies and lifetimes


def test_a_deep_copy_of_a_model_with_a_twin_stands_alone():
    model = build_model()
    twin = make_sparse(model, **LOSSLESS)
    clone = copy.deepcopy(model)
    expected = plain(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(plain(clone), expected)
    with pytest.raises(ValueError, match="not attached"):
        assisted(clone, twin)


def test_a_deep_copy_of_a_model_with_a_twin_can_have_twins():
    model = build_model()
    make_sparse(model, **LOSSLESS)
    clone = copy.deepcopy(model)
    expected = plain(model)
    with make_sparse(clone, **LOSSLESS) as twin:
        assert torch.equal(assisted(clone, twin), expected) and twin.stats.num_drafted > 0
    assert torch.equal(plain(clone), expected)


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("name", METHODS)
def test_a_dropped_twin_is_freed_and_the_model_works_on(name, used):
    model = build_model()
    expected = plain(model)
    twin = make_sparse(model, **METHODS[name])
    if used:
        assisted(model, twin)
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None
    assert torch.equal(plain(model), expected)
    with make_sparse(model, **LOSSLESS) as another:
        assert torch.equal(assisted(model, another), expected)


@pytest.mark.parametrize("with_own_generate", [False, True], ids=["stock", "with a generate of its own"])
def test_a_model_is_freed_with_its_twins(with_own_generate):
    model = build_model()
    if with_own_generate:
        model.generate = types.MethodType(type(model).generate, model)
    twin = make_sparse(model)
    assisted(model, twin)
    gone = weakref.ref(model)
    del model, twin
    gc.collect()
    assert gone() is None


def test_a_twin_keeps_its_model_alive():
    twin = make_sparse(build_model(), **LOSSLESS)
    gc.collect()
    assert torch.equal(assisted(twin.dense_model, twin), plain(twin.dense_model))


# Refusals


def build_on_meta():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_model().config)


def with_calibration_of_another():
    other = calibrate(build_model(seed=1), None, [{"input_ids": make_prompt()}], progress=False)
    return make_sparse(build_model(), calibration=other)


REFUSALS = {
    "a string": (lambda: make_sparse("gpt2"), TypeError, "AutoModelForCausalLM.*got str"),
    "nothing": (lambda: make_sparse(None), TypeError, "got NoneType"),
    "a tokenizer": (lambda: make_sparse(build_tokenizer()), TypeError, "takes a transformers model"),
    "a module": (lambda: make_sparse(torch.nn.Linear(2, 2)), TypeError, "got Linear"),
    "a headless model": (lambda: make_sparse(AutoModel.from_config(build_model().config)), TypeError, "got LlamaModel"),
    "a class": (lambda: make_sparse(type(build_model())), TypeError, "takes a transformers model"),
    "a twin": (lambda: make_sparse(make_sparse(build_model())), ValueError, "twin already.*dense_model"),
    "meta device": (lambda: make_sparse(build_on_meta()), ValueError, "meta device.*embed_tokens.weight.*: load them"),
    "a dict for config": (lambda: make_sparse(build_model(), {"density": 0.3}), TypeError, "got dict.*from_dict"),
    "a method for config": (lambda: make_sparse(build_model(), "griffin"), TypeError, "got str"),
    "a model's config": (lambda: make_sparse(build_model(), build_model().config), TypeError, "got LlamaConfig"),
    "an unknown field": (lambda: make_sparse(build_model(), densty=0.3), ValueError, "no field 'densty'.*'density'"),
    "a bad field": (lambda: make_sparse(build_model(), density=3), ValueError, "density must be in"),
    "another's calibration": (with_calibration_of_another, ValueError, "calibration is of another model.*calibrate"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_refuses(what):
    act, error, words = REFUSALS[what]
    with pytest.raises(error, match=words) as raised:
        act()
    assert type(raised.value) is error


def test_a_refusal_leaves_the_model_as_it_was():
    model = build_model()
    before = dict(vars(model))
    with pytest.raises(ValueError):
        make_sparse(model, density=3)
    assert vars(model).keys() == before.keys()


def test_keyword_fields_win_over_the_config():
    config = SiriusConfig(density=0.3, kernel_size=4)
    with make_sparse(build_model(), config, density=0.2) as twin:
        assert twin.sirius_config == config.replace(density=0.2)
    assert config.density == 0.3


@pytest.mark.parametrize("who", ["twin alone", "assisted"])
def test_a_batch_is_refused_with_its_size(who):
    model = build_model()
    batch = make_prompt().repeat(3, 1)
    with make_sparse(model) as twin:
        act = twin.generate if who == "twin alone" else lambda inputs: model.generate(inputs, assistant_model=twin)
        with pytest.raises(ValueError, match="a batch of 3"):
            act(batch)


# Import


def test_import_is_cheap():
    code = "import sys, hf_sirius; dir(hf_sirius); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_unknown_name_is_an_attribute_error():
    import hf_sirius

    with pytest.raises(AttributeError, match="no attribute 'make_sparce'"):
        hf_sirius.make_sparce  # noqa: B018


def test_nothing_of_transformers_or_torch_is_patched():
    with make_sparse(build_model()):
        places = [
            module for name, module in list(sys.modules.items()) if name.split(".")[0] in ("transformers", "torch")
        ]
        places += [
            GenerationMixin,
            PreTrainedModel,
            CandidateGenerator,
            LlamaForCausalLM,
            torch.nn.Module,
            torch.nn.Linear,
        ]
        values = [value for place in places for value in list(vars(place).values())]
        ours = [
            value
            for value in values
            if type(value) in (types.FunctionType, type) and str(value.__module__).startswith("hf_sirius")
        ]
        assert len(values) > 1000 and not ours


# What it stands on. These fail when transformers changes a private part that hf_sirius lays something over.

_GENERATOR = ["generation_config", "input_ids", "inputs_tensor", "logits_processor", "model_kwargs", "assistant_model",
              "target_tokenizer", "assistant_tokenizer"]  # fmt: skip
PRIVATE_PARTS = {
    # name: (parameters after self, the file that relies on them)
    "_assisted_decoding": (
        ["input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
         "inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer", "model_kwargs"],
        "decode/bond.py",
    ),
    "_get_candidate_generator": (_GENERATOR, "decode/bond.py"),
    "_prefill": (
        ["input_ids", "generation_config", "model_kwargs", "is_first_iteration"], "decode/sparse_twin.py",
    ),
    "_update_model_kwargs_for_generation": (
        ["outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"], "draft/draft.py",
    ),
    "generate": (
        ["inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
         "synced_gpus", "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask",
         "custom_generate", "kwargs"],
        "decode/sparse_twin.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRIVATE_PARTS)
def test_a_private_part_of_transformers_is_as_expected(name):
    expected, file = PRIVATE_PARTS[name]
    method = getattr(GenerationMixin, name, None)
    found = list(inspect.signature(method).parameters)[1:] if method else None
    assert found == expected, (
        f"transformers {transformers.__version__} has GenerationMixin.{name}({found}), while hf_sirius/{file} relies "
        f"on {expected}: adapt that file, then this list"
    )


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_generate_is_there(name):
    assert callable(getattr(GenerationMixin, name, None)), f"hf_sirius/decode/bond.py names {name}: take it off STEPS"


def test_the_stock_loop_asks_the_generator_as_expected():
    advice = f"transformers {transformers.__version__} changed its loop: adapt hf_sirius/decode/candidates.py to it"
    loop = " ".join(inspect.getsource(GenerationMixin._assisted_decoding).split())
    assert CandidateGenerator.requires_model_outputs is False, advice
    for used in (
        "candidate_generator.requires_model_outputs",
        "model_inputs |= candidate_generator.model_kwargs_overrides",
        "get_candidates( input_ids, model_kwargs=model_kwargs, model_outputs=outputs, is_first_iteration=",
        "candidate_generator.update_candidate_strategy(input_ids, new_logits, n_matches)",
        "outputs.past_key_values.crop(-",
    ):
        assert used in loop, f"{advice} (it no longer has {used!r})"
    # Stock `generate` looks for its loop at the class, once the arguments are made, and hands it `inputs_tensor`.
    generate = " ".join(inspect.getsource(GenerationMixin.generate).split())
    assert "getattr(type(self), GENERATION_MODES_MAPPING[generation_mode])" in generate, advice
    assert '"inputs_tensor" in inspect.signature(decoding_method).parameters' in generate, advice
    assert list(inspect.signature(CandidateGenerator.update_candidate_strategy).parameters) == [
        "self", "input_ids", "scores", "num_matches",
    ], advice  # fmt: skip


@pytest.mark.parametrize("how", ["keyword", "generation_config", "model"])
def test_a_twin_alone_takes_no_assistant(how):
    model = build_model()
    sparse = make_sparse(model)
    kwargs = {}
    if how == "keyword":
        kwargs["prompt_lookup_num_tokens"] = 3
    elif how == "model":
        model.generation_config.prompt_lookup_num_tokens = 3
    else:
        kwargs["generation_config"] = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens was given to a sparse twin"):
        sparse.generate(make_prompt(), **kwargs)
