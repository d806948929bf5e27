"""Models with PEFT's adapters: the twin drafts with the one that is in use."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny import METHODS, build_model, make_prompt, slow_unless

from hf_sirius import make_sparse
from hf_sirius.model.adapters import adapters_in_use


peft = pytest.importorskip("peft")

GREEDY = {"max_new_tokens": 30, "do_sample": False}
LOSSLESS = {"threshold": 1.0, "kernel_size": 5}


def build_adapted(targets=("q_proj", "v_proj"), model=None):
    """Returns a `PeftModel` with two adapters that change what the model writes."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=list(targets), init_lora_weights=False, lora_alpha=64)
    user = peft.get_peft_model(model or build_model(), config)
    user.add_adapter("other", config)
    return user.double().eval()


def switch(user, to: str) -> None:
    base = user.base_model
    base.enable_adapter_layers()
    base.unmerge_adapter()
    if to == "none":
        base.disable_adapter_layers()
    elif to == "merged":
        base.merge_adapter()
    else:
        user.set_adapter(to)


WHOLE = {"method": "griffin", "density": 1.0}
DRAFTS = {
    "cast": {**WHOLE, "draft_dtype": "bfloat16", "draft_scope": "all"},
    "whole": WHOLE,
    "compiled": {**WHOLE, "compile_draft": True},
}


@pytest.mark.parametrize(
    "fields",
    [pytest.param(f, id=name, marks=slow_unless(name != "compiled")) for name, f in DRAFTS.items()],
)
def test_a_twin_drafts_with_the_adapter_in_use(fields):
    user = build_adapted()
    outputs = {}
    with make_sparse(user, **fields, **LOSSLESS) as sparse:
        for to in ("default", "other", "none", "default", "merged"):
            switch(user, to)
            expected = user.generate(input_ids=make_prompt(), **GREEDY)
            output = user.generate(input_ids=make_prompt(), assistant_model=sparse, **GREEDY)
            assert torch.equal(output, expected)
            assert sparse.stats.acceptance_rate > 0.9, to
            with torch.no_grad():
                assert torch.equal(sparse(make_prompt()).logits, user(input_ids=make_prompt()).logits), to
            outputs.setdefault(to, output.tolist())
    assert outputs["default"] != outputs["other"] != outputs["none"] != outputs["default"]


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_a_twin_of_an_offloaded_model_drafts_with_the_adapter_in_use(offload, tmp_path):
    user = build_adapted()
    folder = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
    offload(user.get_base_model(), execution_device=torch.device("cpu"), **folder)
    with make_sparse(user, **WHOLE, **LOSSLESS) as sparse:
        for to in ("default", "other", "none"):
            switch(user, to)
            expected = user.generate(input_ids=make_prompt(), **GREEDY)
            assert torch.equal(user.generate(input_ids=make_prompt(), assistant_model=sparse, **GREEDY), expected)
            assert sparse.stats.acceptance_rate == 1, to


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_method_takes_adapters_of_the_attention(method):
    user = build_adapted()
    expected = user.generate(input_ids=make_prompt(), **GREEDY)
    output = user.generate(input_ids=make_prompt(), assistant_model=make_sparse(user, **method, **LOSSLESS), **GREEDY)
    assert torch.equal(output, expected)


def test_the_twin_of_a_peft_model_is_that_of_its_base_model():
    user = build_adapted()
    with make_sparse(user, method="griffin") as sparse:
        assert sparse.dense_model is user.get_base_model()


def test_a_mixed_model_is_that_of_its_base_model_as_well():
    model = build_model()
    user = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    with make_sparse(user, method="griffin") as sparse:
        assert sparse.dense_model is model


def test_layers_beside_the_model_s_own_are_refused_by_what_looks_at_them():
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"])
    user = peft.get_peft_model(build_model(), config).double().eval()
    with pytest.raises(ValueError, match=r"o_proj is a peft.* several layers in one place: call merge_and_unload\(\)"):
        make_sparse(user, method="teal")


def test_the_adapters_in_use_are_told():
    user = build_adapted()
    told = []
    for to in ("default", "other", "none", "merged"):
        switch(user, to)
        told.append(adapters_in_use(user.get_base_model()))
    assert told == [{"active": ["default"]}, {"active": ["other"]}, {}, {"active": ["other"], "merged": ["other"]}]
    assert adapters_in_use(build_model()) == {}


MLP = ("gate_proj", "up_proj", "down_proj")
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(target_modules=[*MLP], init_lora_weights=False, lora_alpha=16),
    "dora": lambda: peft.LoraConfig(target_modules=[*MLP], init_lora_weights=False, lora_alpha=16, use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=[*MLP], feedforward_modules=["down_proj"], init_ia3_weights=False, task_type="CAUSAL_LM"
    ),
}
IN_MLPS = {
    **{name: {**fields, "density": 0.5} for name, fields in METHODS.items()},
    "griffin-cast": {"method": "griffin", "density": 0.5, "draft_dtype": "bfloat16"},
    "teal-cast": {"method": "teal", "density": 0.5, "draft_dtype": "bfloat16"},
    "int8": {**WHOLE, "draft_dtype": "int8", "draft_scope": "all"},
    "whole": WHOLE,
}


def build_adapted_mlps(kind: str):
    torch.manual_seed(0)
    user = peft.get_peft_model(build_model(), ADAPTERS[kind]())
    user.add_adapter("other", ADAPTERS[kind]())
    return user.double().eval()


@pytest.mark.parametrize(
    "draft, kind",
    [*((draft, "lora") for draft in IN_MLPS), ("griffin", "dora"), ("griffin", "ia3"), ("int8", "dora"),
     ("cats-topk", "ia3")],
)  # fmt: skip
def test_adapters_of_mlps_draft_as_those_that_are_merged(draft, kind):
    user, fields = build_adapted_mlps(kind), IN_MLPS[draft]
    greedy = {**GREEDY, "max_new_tokens": 16}
    outputs = set()
    with make_sparse(user, **fields, **LOSSLESS) as sparse:
        for to in ("default", "other", "none", ["default", "other"]):
            switch(user, to if isinstance(to, str) else to[0])
            if isinstance(to, list):
                user.base_model.set_adapter(to)
            expected = user.generate(input_ids=make_prompt(), **greedy)
            output = user.generate(input_ids=make_prompt(), assistant_model=sparse, **greedy)
            assert torch.equal(output, expected)
            assert sparse.stats.num_drafted > 0
            outputs.add(str(output.tolist()))
            if fields["method"] == "teal":  # which drops inputs of the layers, and none of their adapters
                continue
            merged = merged_copy(user)
            with make_sparse(merged, **fields, **LOSSLESS) as other:
                merged.generate(make_prompt(), assistant_model=other, **greedy)
            drafted = [[cycle.drafted_ids for cycle in twin.stats.cycles] for twin in (sparse, other)]
            assert drafted[0] == drafted[1], to
    assert len(outputs) == 4


def merged_copy(user):
    """Returns a copy of the base model in which what is active is part of the weights."""
    model = copy.deepcopy(user.get_base_model())
    owners = [(owner, name, child) for owner in model.modules() for name, child in owner.named_children()]
    for owner, name, child in owners:
        if hasattr(child, "base_layer"):
            if not child.disable_adapters:
                child.merge()
            setattr(owner, name, child.get_base_layer())
    return model


def test_a_merge_in_place_reaches_a_draft_of_mlps():
    user = build_adapted_mlps("lora")
    with make_sparse(user, method="griffin", density=0.5, draft_dtype="int8", draft_scope="all", **LOSSLESS) as sparse:
        drafted = []
        for to in ("default", "merged", "none"):
            switch(user, to)
            expected = user.generate(input_ids=make_prompt(), **GREEDY)
            assert torch.equal(user.generate(input_ids=make_prompt(), assistant_model=sparse, **GREEDY), expected)
            drafted.append([cycle.drafted_ids for cycle in sparse.stats.cycles])
    assert drafted[0] == drafted[1] != drafted[2]


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_adapters_of_the_mlps_of_an_offloaded_model_are_refused(offload, tmp_path):
    user = build_adapted_mlps("lora")
    folder = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
    offload(user.get_base_model(), execution_device=torch.device("cpu"), **folder)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM have adapters, .* merge_and_unload\(\)"):
        make_sparse(user, method="griffin")


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_an_adapter_that_nothing_loads_is_refused(offload, tmp_path):
    model = build_model()
    folder = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
    offload(model, execution_device=torch.device("cpu"), **folder)
    user = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))  # on the meta device, as its layer is
    with pytest.raises(ValueError, match=r"lora_A.default.weight\): load them with from_pretrained; adapters before"):
        make_sparse(user, method="griffin")
