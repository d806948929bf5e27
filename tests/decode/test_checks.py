"""What a call cannot ask of a twin is told before the first token; what it asks in vain is told once."""

import types
import warnings

import pytest
import torch
from tiny import build_model, make_prompt
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from hf_sirius import make_sparse


GREEDY = {"max_new_tokens": 24, "do_sample": False}
every_width = pytest.mark.parametrize("tree_width", [1, 3])


def make_twin(model, **fields):
    return make_sparse(model, **{"method": "griffin", "threshold": 1.0, "kernel_size": 5, **fields})


def assert_refused(model, match: str, tree_width: int = 1, **options) -> None:
    """Asserts that nothing is written before the error, and that the dense model goes on as before."""
    written = []
    streamer = types.SimpleNamespace(put=written.append, end=lambda: None)
    with make_twin(model, tree_width=tree_width) as sparse, pytest.raises(ValueError, match=match):
        model.generate(make_prompt(), **GREEDY, **options, assistant_model=sparse, streamer=streamer)
    assert len(written) <= 1, "more than the prompt was written"


# Methods that are laid over the instance while a call runs


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@every_width
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_soft_prompts_are_refused(kind, tree_width, peft):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    user = peft.get_peft_model(build_model(), config).double().eval()
    expected = user.generate(input_ids=make_prompt(), **GREEDY)
    with make_twin(user, tree_width=tree_width) as sparse:
        with pytest.raises(ValueError, match=r"PeftModelForCausalLM.prepare_inputs_for_generation is laid over"):
            user.generate(input_ids=make_prompt(), **GREEDY, assistant_model=sparse)
        assert torch.equal(user.generate(input_ids=make_prompt(), **GREEDY), expected)
        assert "prepare_inputs_for_generation" not in vars(sparse._twin.module), "of the PeftModel"


@every_width
def test_a_soft_prompt_goes_beside_a_twin_as_the_error_says(tree_width, peft):
    prompt, num_tokens = make_prompt(), 4
    model = build_model()
    user = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_tokens)
    ).double()
    expected = user.eval().generate(input_ids=prompt, **GREEDY)[:, prompt.shape[1] :]
    with torch.no_grad(), make_twin(model, tree_width=tree_width, density=0.9) as sparse:
        embeddings = torch.cat([user.get_prompt(1).double(), model.get_input_embeddings()(prompt)], dim=1)
        outputs = user.get_base_model().generate(inputs_embeds=embeddings, **GREEDY, assistant_model=sparse)
        assert torch.equal(outputs, expected) and sparse.stats.num_accepted


@every_width
def test_a_prefix_goes_beside_a_twin_as_the_error_says(tree_width, peft):
    prompt, model = make_prompt(), build_model()
    user = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).double()
    expected = user.eval().generate(input_ids=prompt, **GREEDY)
    with torch.no_grad(), make_twin(model, tree_width=tree_width, density=0.9) as sparse:
        options = {
            "past_key_values": user.get_prompt(1),
            "attention_mask": torch.ones(1, 4 + prompt.shape[1]),
            **GREEDY,
        }
        outputs = user.get_base_model().generate(prompt, **options, assistant_model=sparse)
        assert torch.equal(outputs, expected) and sparse.stats.num_accepted


def test_a_method_that_anybody_lays_over_is_refused():
    model = build_model()
    update = model._update_model_kwargs_for_generation
    model._update_model_kwargs_for_generation = lambda *args, **kwargs: update(*args, **kwargs)
    assert_refused(model, "is laid over this LlamaForCausalLM's own _update_model_kwargs_for_generation")
    model._update_model_kwargs_for_generation = update  # its own, as PEFT leaves it
    with make_twin(model) as sparse:
        assert torch.equal(
            model.generate(make_prompt(), **GREEDY, assistant_model=sparse), model.generate(make_prompt(), **GREEDY)
        )


# KV-caches that drop tokens


class Sink(DynamicLayer):
    """Keeps the first and the last tokens, as attention sinks do, and goes on counting."""

    num_seen = 0

    def update(self, key_states, value_states, *args, **kwargs):
        states = super().update(key_states, value_states, *args, **kwargs)
        self.num_seen += key_states.shape[-2]
        self.keys, self.values = (torch.cat([s[..., :1, :], s[..., 1:, :][..., -7:, :]], dim=-2) for s in states)
        return states

    def get_seq_length(self):
        return self.num_seen


@every_width
@pytest.mark.parametrize("is_lazy", [True, False])
def test_a_cache_of_layers_of_its_own_is_refused(is_lazy, tree_width):
    cache = DynamicCache()
    if is_lazy:
        cache.layer_class_to_replicate = Sink
    else:
        cache.layers = [Sink(), Sink()]
    assert_refused(build_model(), "has layers of a class of its own, Sink", tree_width, past_key_values=cache)


@every_width
@pytest.mark.parametrize("size", [8, 20])
def test_a_cache_that_hooks_compress_is_refused(size, tree_width):
    def compress(module, args, kwargs, output):
        if (cache := kwargs["past_key_values"]) is not None:
            layer = cache.layers[module.layer_idx]
            layer.keys, layer.values = layer.keys[..., -size:, :], layer.values[..., -size:, :]

    model = build_model()
    for block in model.model.layers:
        block.self_attn.register_forward_hook(compress, with_kwargs=True)
    assert model.generate(make_prompt(), **GREEDY).shape[1] == make_prompt().shape[1] + 24
    if size < make_prompt().shape[1]:
        assert_refused(model, "the model read 11 tokens, and its KV-cache grew by 8", tree_width)
        return
    # Nothing is dropped before the cache is full: at the first cycle that sees it.
    with make_twin(model, tree_width=tree_width) as sparse, pytest.raises(ValueError, match="its KV-cache grew by"):
        model.generate(make_prompt(), **GREEDY, assistant_model=sparse)


# A model in training


@every_width
def test_gradient_checkpointing_in_training_is_refused(tree_width):
    model = build_model()
    model.gradient_checkpointing_enable()
    model.train()
    assert_refused(model, "in training with gradient checkpointing", tree_width)
    model.eval()
    with make_twin(model, tree_width=tree_width) as sparse:
        outputs = model.generate(make_prompt(), **GREEDY, assistant_model=sparse)
        assert torch.equal(outputs, model.generate(make_prompt(), **GREEDY))


# Settings of stock assistants


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("num_assistant_tokens", 3, "kernel_size in make_sparse"),
        ("num_assistant_tokens_schedule", "heuristic", "kernel_size='auto'"),
        ("assistant_confidence_threshold", 0.9, "draft_confidence"),
        ("assistant_early_exit", 1, "leave one of the two out"),
        ("use_mtp", True, "leave one of the two out"),
    ],
)
def test_what_is_ignored_is_told(name, value, instead):
    if name not in vars(GenerationConfig()):
        pytest.skip("a setting of later versions of transformers")
    model = build_model()
    with make_twin(model) as sparse:
        with pytest.warns(UserWarning, match=f"^{name}={value!r} is ignored beside a sparse twin: .*{instead}") as told:
            model.generate(make_prompt(), **GREEDY, **{name: value}, assistant_model=sparse)
        assert len([one for one in told if "sparse twin" in str(one.message)]) == 1


@pytest.mark.parametrize("config", [None, GenerationConfig()])
def test_nothing_is_told_of_what_nobody_set(config):
    model = build_model()
    with make_twin(model) as sparse, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(make_prompt(), **GREEDY, generation_config=config, assistant_model=sparse)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"dola_layers": "high"}])
def test_transformers_tells_of_modes_that_do_not_go_with_an_assistant(options, caplog):
    model = build_model()
    with make_twin(model) as sparse:
        model.generate(make_prompt(), **GREEDY, **options, assistant_model=sparse)
    assert "some of the set flags will be ignored" in caplog.text
