"""What a twin keeps from call to call: made once for all calls and twins, never out of date, freed with the last."""

import copy
import gc
import platform
import weakref

import pytest
import torch
from accelerate import cpu_offload
from tiny import build_model, make_prompt, slow
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_sirius import make_sparse
from hf_sirius.draft.draft import Draft
from hf_sirius.settings.fields import DRAFT_DTYPES
from hf_sirius.study.widening import wide_reasoner
from hf_sirius.weights import formats
from hf_sirius.weights import gather as gather_module
from hf_sirius.weights.kept import Kept
from hf_sirius.weights.linear import DraftLinear
from hf_sirius.weights.memory import process_memory, trim_heap


FIELDS = {"method": "griffin", "threshold": 1.0, "kernel_size": 16, "draft_dtype": "bfloat16", "draft_scope": "all"}


def held_in_a_call(twin) -> dict:
    """Returns what the draft of a call has outside the MLPs, by the module that it stands in for."""
    with twin.new_call() as call, call.draft.drafting():
        held = dict(call.draft.held)
    assert not call.draft.held and list(held) == list(twin._twin.resident)
    return held


def weights_in(held: dict) -> list[torch.Tensor]:
    return [part.linear.weight for part in held.values()]


def test_they_are_made_once_for_all_calls_and_twins():
    model = build_model()
    with make_sparse(model, **FIELDS) as twin, make_sparse(model, **{**FIELDS, "kernel_size": 4}) as other:
        held = held_in_a_call(twin)
        assert held and all(isinstance(part, DraftLinear) for part in held.values())
        assert held_in_a_call(twin) == held == held_in_a_call(other)
        with make_sparse(model, **{**FIELDS, "draft_dtype": "float16"}) as another:
            assert {weight.dtype for weight in weights_in(held_in_a_call(another))} == {torch.float16}
        assert held_in_a_call(twin) == held
    with make_sparse(model, method="griffin", draft_dtype="bfloat16", draft_scope="mlp") as twin:
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


def some_rows(weight):
    weight[7:9] = 0


def one_column_less(weight):
    weight[:, 1:] += 1.0


def last_rows(weight):
    weight[-2:].copy_(weight[:2])


@pytest.mark.parametrize("width", [512, 1000, 1024])
@pytest.mark.parametrize("write", [some_rows, one_column_less, last_rows])
def test_writing_behind_autograds_back_shows(write, width):
    projection = torch.nn.Linear(width, 2 * width)
    kept = Kept({projection: "bfloat16"}, {}, lambda: None)
    before = kept.casts()[projection]
    assert kept.casts()[projection] is before
    write(projection.weight.data)
    assert kept.casts()[projection] is not before


def test_a_model_that_is_cast_to_the_drafts_dtype_needs_no_casts():
    model = build_model()
    with make_sparse(model, **FIELDS) as twin:
        casts = [weakref.ref(weight) for weight in weights_in(held_in_a_call(twin))]
        model.bfloat16()
        with twin.new_call() as call, call.draft.drafting():
            assert not call.draft.held
        gc.collect()
        assert casts and all(ref() is None for ref in casts)


def test_layers_of_bitsandbytes_have_settled_before_several_threads_use_them(monkeypatch):
    """Their first forward changes them, for which two threads at once would spoil them."""
    from bitsandbytes.nn import Linear4bit

    settled, forward = [], Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: settled.append(self) or forward(self, x))
    with make_sparse(build_model(), **{**FIELDS, "draft_dtype": "nf4"}) as twin:
        held = held_in_a_call(twin)
        assert held and {part.linear for part in held.values()} <= set(settled)


def test_a_copy_of_a_twin_keeps_for_itself():
    with make_sparse(build_model(), **FIELDS) as twin, twin.new_call():
        clone = copy.deepcopy(twin)
    assert set(held_in_a_call(clone)) == set(clone._twin.resident) and not set(clone._twin.resident) & set(
        twin._twin.resident
    )


def test_weights_made_for_inference_alone():
    with torch.inference_mode():
        model = build_model()
    with make_sparse(model, **FIELDS) as twin:
        assert held_in_a_call(twin) == held_in_a_call(twin)
        assert model.generate(make_prompt(), assistant_model=twin, max_new_tokens=20).shape == (1, 31)


# The memory for gathered neurons


@pytest.fixture
def any_size(monkeypatch):
    """Has the neurons of tiny models kept in memory as those of large ones are."""
    for module in (gather_module, formats):
        monkeypatch.setattr(module, "OWN_MEMORY", 1)


def gather(twin, prompt: torch.Tensor, meanwhile=lambda: None) -> list[int]:
    """Returns where the neurons of a call are gathered, and sees that they are those that the prompt chose."""
    with twin.new_call() as call:
        with call.draft.observing(None):
            twin.dense_model(prompt)
        call.draft.select()
        meanwhile()
        for site in twin._twin.sites:
            chosen = call.draft.method.neuron_indices[site.idx]
            assert torch.equal(call.draft.held[site.up].linear.weight, site.up.weight[chosen])
            assert torch.equal(call.draft.held[site.down].linear.weight, site.down.weight[:, chosen])
        return [call.draft.held[part].linear.weight.data_ptr() for site in twin._twin.sites for part in site.parts]


def test_calls_gather_in_the_same_memory_one_at_a_time(any_size):
    with make_sparse(build_model(), method="griffin") as twin:
        places = gather(twin, make_prompt())
        assert len(set(places)) == 6 and gather(twin, make_prompt(seed=1)) == places

        inner = []
        outer = gather(twin, make_prompt(), lambda: inner.extend(gather(twin, make_prompt(seed=1))))
        assert outer == places and not set(inner) & set(outer)

        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gather(twin, make_prompt(), interrupt)
        assert gather(twin, make_prompt(seed=2)) == places
        twin.double(), twin.half()  # too large now, and then of another dtype
        assert gather(twin, make_prompt()) == places


def test_twins_share_memory_where_they_gather_as_much(any_size):
    model = build_model()
    with (
        make_sparse(model, method="griffin") as twin,
        make_sparse(model, method="griffin", kernel_size=3) as alike,
        make_sparse(model, method="griffin", density=0.25) as smaller,
        make_sparse(model, method="cats") as cats,
    ):
        places = gather(twin, make_prompt())
        assert gather(alike, make_prompt()) == places
        assert not set(gather(smaller, make_prompt())) & set(places)
        with cats.new_call() as call:
            assert not call.draft._memory


def test_small_neurons_are_gathered_in_new_memory():
    with make_sparse(build_model(), method="griffin") as twin, twin.new_call() as call:
        assert not call.draft._memory


@pytest.mark.slow
@pytest.mark.parametrize("draft_dtype", [None, *DRAFT_DTYPES])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_drafts_are_the_same_in_memory_that_was_used_before(bits, draft_dtype, any_size, monkeypatch, tmp_path):
    # bitsandbytes' 4-bit layers for AVX-512 want whole blocks of 64 in a row.
    sizes = {"intermediate_size": 100} if bits is None else {"hidden_size": 64, "intermediate_size": 128}
    build_model(dtype=torch.float32, **sizes).save_pretrained(tmp_path)
    settings = {None: None, 8: BitsAndBytesConfig(load_in_8bit=True), 4: BitsAndBytesConfig(load_in_4bit=True)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings[bits])
    fields = {"method": "griffin", "density": 0.47, "draft_dtype": draft_dtype}
    fields |= {"draft_scope": "mlp"} if draft_dtype else {}

    def cycles(twin, seed):
        model.generate(make_prompt(seed=seed), assistant_model=twin, max_new_tokens=20)
        return twin.stats.cycles

    with make_sparse(model, **fields) as twin:
        drafted = [cycles(twin, seed) for seed in range(3)]
    monkeypatch.setattr(formats, "OWN_MEMORY", 10**9)  # nothing is kept
    for seed in range(3):
        with make_sparse(model, **fields) as twin:
            assert cycles(twin, seed) == drafted[seed]


# What is left


def test_gathered_neurons_are_freed_with_the_call_and_what_is_kept_with_the_last_twin(any_size, monkeypatch):
    gathered, select = [], Draft.select

    def noting(draft):
        select(draft)
        in_mlps = {part for site in draft.twin.sites for part in site.parts}
        gathered.extend(weakref.ref(held.linear.weight) for part, held in draft.held.items() if part in in_mlps)

    monkeypatch.setattr(Draft, "select", noting)
    model = build_model()
    gc.collect()
    gc.disable()  # at once, and not when the collector finds them
    try:
        twin, other = make_sparse(model, **FIELDS), make_sparse(model, **FIELDS)
        kept = [weakref.ref(weight) for weight in weights_in(held_in_a_call(twin))]
        kept += map(weakref.ref, twin._twin.kept._buffers.values())
        assert len(kept) == len(twin._twin.resident) + 6
        model.generate(make_prompt(), assistant_model=twin, max_new_tokens=8)
        assert gathered and all(ref() is None for ref in gathered)
        twin.detach()
        assert all(ref() is not None for ref in kept), "the other twin has them"
        other.detach()
        assert all(ref() is None for ref in kept)
        drafted_with = [weakref.ref(weight) for weight in weights_in(held_in_a_call(twin))]  # by itself it drafts still
        assert drafted_with and all(ref() is None for ref in drafted_with)
    finally:
        gc.enable()


def resident_bytes() -> int:
    """Returns what the process holds, without what malloc has free, of which it gives back what it likes."""
    gc.collect()
    trim_heap()
    return process_memory("VmRSS")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks Linux and glibc")
@pytest.mark.parametrize("draft_dtype", ["int8", *slow(None, *(name for name in DRAFT_DTYPES if name != "int8"))])
def test_memory_is_where_it_was_after_a_call_and_after_detach(draft_dtype):
    model = wide_reasoner(3, 12, torch.float32)
    prompt = torch.arange(4, 20).unsqueeze(0)
    fields = {**FIELDS, "kernel_size": 4, "draft_dtype": draft_dtype}

    def generate(twin):
        model.generate(prompt, assistant_model=twin, max_new_tokens=8, min_new_tokens=8)

    with make_sparse(model, **fields) as twin:
        generate(twin)  # what loads with the first use is nobody's
    before = resident_bytes()
    with make_sparse(model, **fields) as twin:
        made, after_calls = resident_bytes(), []
        for _ in range(3):
            generate(twin)
            after_calls.append(resident_bytes())
    detached = resident_bytes()
    neurons = 0.5 * sum(site.num_parameters() for site in twin._twin.sites)
    assert made - before > 0.95 * neurons * {None: 4, "bfloat16": 2, "float16": 2}.get(draft_dtype, 0)
    assert max(after_calls) - made < 0.1 * neurons and detached - before < 0.1 * neurons


def test_a_model_that_is_offloaded_later_is_refused_before_anything_is_cast():
    model = build_model()
    with make_sparse(model, **FIELDS) as twin:
        cpu_offload(model)
        with pytest.raises(ValueError, match=r"was offloaded after make_sparse.*call make_sparse again"):
            model.generate(make_prompt(), assistant_model=twin, max_new_tokens=8)
