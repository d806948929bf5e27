"""Casts outside the MLPs: made once for all calls and twins, never out of date, and freed with the last twin."""

import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload
from tiny import build_model, make_prompt

from hf_sirius import make_sparse
from hf_sirius.quantization import DraftLinear
from hf_sirius.sparsity.griffin import Griffin


FIELDS = {"method": "griffin", "threshold": 1.0, "draft_dtype": "bfloat16", "draft_scope": "all"}


def held_in_a_call(twin) -> dict:
    """Returns what the draft of a call has outside the MLPs, by the module that it stands in for."""
    with twin.new_call() as call:
        held = dict(call.method.held)
    assert not call.method.held and list(held) == twin.others
    return held


def weights_in(held: dict) -> list[torch.Tensor]:
    return [part.linear.weight for part in held.values()]


def test_they_are_made_once_for_all_calls_and_twins():
    model = build_model()
    with make_sparse(model, **FIELDS) as twin, make_sparse(model, **FIELDS, kernel_size=4) as other:
        held = held_in_a_call(twin)
        assert held and all(isinstance(part, DraftLinear) for part in held.values())
        assert held_in_a_call(twin) == held == held_in_a_call(other)
        with make_sparse(model, **{**FIELDS, "draft_dtype": "float16"}) as another:
            assert {weight.dtype for weight in weights_in(held_in_a_call(another))} == {torch.float16}
        assert held_in_a_call(twin) == held
    with make_sparse(model, method="griffin", draft_dtype="bfloat16") as twin:
        assert not held_in_a_call(twin), "of the MLPs alone"


@torch.no_grad()
def add(model):
    model.get_output_embeddings().weight.add_(0.5)


@torch.no_grad()
def write_one_number(model):
    model.get_output_embeddings().weight[-2, 3] += 1.0


def merge(model):  # as adapters do
    model.get_output_embeddings().weight.data += 0.5


def replace(model):
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.5)


def load(model):
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})


def load_new_tensors(model):
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()}, assign=True)


def cast(model):
    model.float()


def write_bias(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias += 1.0


CHANGES = [add, write_one_number, merge, replace, load, load_new_tensors, cast, write_bias]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_reaches_them(change):
    model = build_model(attention_bias=True)
    with make_sparse(model, **FIELDS) as twin:
        before = held_in_a_call(twin)
        change(model)
        held = held_in_a_call(twin)
        assert held != before and held_in_a_call(twin) == held
        for projection, part in held.items():
            assert torch.equal(part.linear.weight, projection.weight.bfloat16())
            assert projection.bias is None or torch.equal(part.linear.bias, projection.bias.bfloat16())
        dense = model.generate(make_prompt(), max_new_tokens=20)
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, max_new_tokens=20), dense)


def test_weights_made_for_inference_alone():
    with torch.inference_mode():
        model = build_model()
    with make_sparse(model, **FIELDS) as twin:
        assert held_in_a_call(twin) == held_in_a_call(twin)
        assert model.generate(make_prompt(), assistant_model=twin, max_new_tokens=20).shape == (1, 31)


def test_gathered_neurons_are_freed_with_the_call_and_casts_with_the_last_twin(monkeypatch):
    gathered, select = [], Griffin.select

    def noting(method):
        select(method)
        in_mlps = {part for site in method.sites for part in site.parts}
        gathered.extend(weakref.ref(held.linear.weight) for part, held in method.held.items() if part in in_mlps)

    monkeypatch.setattr(Griffin, "select", noting)
    model = build_model()
    gc.collect()
    gc.disable()  # at once, and not when the collector finds them
    try:
        twin, other = make_sparse(model, **FIELDS), make_sparse(model, **FIELDS)
        casts = [weakref.ref(weight) for weight in weights_in(held_in_a_call(twin))]
        model.generate(make_prompt(), assistant_model=twin, max_new_tokens=8)
        assert gathered and all(ref() is None for ref in gathered)
        twin.detach()
        assert casts and all(ref() is not None for ref in casts), "the other twin has them"
        del other
        assert all(ref() is None for ref in casts)
        held_in_a_call(twin)  # which drafts by itself still
    finally:
        gc.enable()


def test_a_model_that_is_offloaded_later_is_refused_before_anything_is_cast():
    model = build_model()
    with make_sparse(model, **FIELDS) as twin:
        cpu_offload(model)
        with pytest.raises(ValueError, match=r"was offloaded after make_sparse.*call make_sparse again"):
            model.generate(make_prompt(), assistant_model=twin, max_new_tokens=8)
