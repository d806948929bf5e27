"""What a twin is when the user sets nothing."""

import dataclasses

import pytest
import torch
from accelerate import cpu_offload
from tiny import build_model, make_prompt
from torch import nn

from hf_sirius import SiriusConfig, make_sparse
from hf_sirius.draft import choice
from hf_sirius.model.sites import find_mlps
from hf_sirius.weights import formats


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    choice._chosen.clear()


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # whose layers are Conv1Ds
def test_the_choice_is_made_once_and_told(family):
    model = build_model(family, dtype=torch.float32)
    with make_sparse(model) as twin, make_sparse(model, threshold=1.0) as other:
        chosen = twin.sirius_config
        assert chosen.draft_dtype in choice.AGREEMENT and chosen.density == 1.0
        assert chosen.kernel_size == "auto"
        assert other.sirius_config == chosen.replace(threshold=1.0), "remembered"
        expected = model.generate(make_prompt(), max_new_tokens=12)
        assert torch.equal(model.generate(make_prompt(), assistant_model=other, max_new_tokens=12), expected)


@pytest.mark.parametrize(
    "fields", [{"method": "griffin"}, {"density": 0.5}, {"draft_dtype": "int8"}, {"tree_width": 2}]
)
def test_whoever_says_what_a_draft_is_has_chosen(fields, monkeypatch):
    monkeypatch.setattr("hf_sirius.decode.attach.choose_draft", None)
    model = build_model(dtype=torch.float32)
    with make_sparse(model, **fields) as twin, make_sparse(model, SiriusConfig(**fields)) as other:
        assert twin.sirius_config == other.sirius_config == SiriusConfig(**fields, kernel_size=16)


def test_other_fields_win_over_the_choice():
    with make_sparse(build_model(dtype=torch.float32), kernel_size=7, temperature=1.0) as twin:
        assert twin.sirius_config.kernel_size == 7 and twin.sirius_config.draft_dtype in choice.AGREEMENT


def test_the_least_time_per_token_wins(monkeypatch):
    model = build_model(dtype=torch.float32)
    sites = find_mlps(model)

    def chosen(verification_per_token: float, **draft: float):
        verifications = [1.0 + (n - 1) * verification_per_token for n in choice._NUM_TOKENS]
        seconds = [1.0, 1.0, *verifications, *draft.values()]
        monkeypatch.setattr(choice, "_rounds", lambda runs, device: [seconds, seconds])
        sizes = [p.numel() for site in sites for part in site.parts for p in part.parameters()]
        # All that is timed stands for all, so that the seconds are those of the whole model.
        return choice._fastest(model, sites, sum(sizes), None, list(draft), torch.device("cpu"))

    assert chosen(0.0, int8=0.5, int4=0.1)["draft_dtype"] == "int4"
    assert chosen(0.0, int8=0.15, int4=0.1)["draft_dtype"] == "int8"
    long = chosen(0.0, int8=0.01, int4=0.01)["kernel_size"]
    short = chosen(0.2, int8=0.3, int4=0.3)["kernel_size"]
    assert (
        long
        > short
        == min(
            choice.KERNEL_SIZES,
            key=lambda k: ((k - 1) * 0.3 + 1 + 0.2 * (k - 1)) / sum(choice.AGREEMENT["int8"] ** i for i in range(k)),
        )
    )


@pytest.mark.parametrize("offload, method", [(lambda model: model, "cats"), (cpu_offload, "griffin")])
def test_without_room_for_a_copy_cats_drafts_which_holds_nothing(offload, method, monkeypatch):
    monkeypatch.setattr(choice, "_free_memory", lambda device: 1000)
    with make_sparse(offload(build_model(dtype=torch.float32))) as twin:
        assert twin.sirius_config.method == method and twin.sirius_config.draft_dtype is None
        assert method == "griffin" or not twin._twin.resident


def test_what_a_lack_of_memory_decided_is_not_remembered(monkeypatch):
    model = build_model(dtype=torch.float32, hidden_size=128, intermediate_size=256)
    free = {"bytes": 1000}
    monkeypatch.setattr(choice, "_free_memory", lambda device: free["bytes"])

    def chosen():
        with make_sparse(model) as twin:
            return twin.sirius_config.draft_dtype

    assert chosen() is None
    free["bytes"] = 1.6 * model.num_parameters()  # half of which holds 4 bits and their scales, and not 8
    assert chosen() == "int4"
    with make_sparse(model) as first:
        free["bytes"] = 0
        assert first.sirius_config.draft_dtype == chosen() == "int4", "it shares what the first one has"
    assert chosen() is None


def test_a_head_without_a_shortlist_is_remembered_apart(monkeypatch):
    class OtherHead(nn.Linear):
        pass

    def fastest(model, sites, num_weights, head, dtypes, device):
        draft_head = "shortlist" if choice.has_shortlist(head) else "full"
        return {"density": 1.0, "draft_dtype": "int8", "draft_head": draft_head}

    monkeypatch.setattr(choice, "_fastest", fastest)
    model, other = build_model(dtype=torch.float32), build_model(dtype=torch.float32)
    other.lm_head.__class__ = OtherHead
    for each, draft_head in ((model, "shortlist"), (other, "full"), (model, "shortlist")):
        with make_sparse(each) as twin:
            assert twin.sirius_config.draft_head == draft_head


def test_without_8_bits_the_head_has_4(monkeypatch):
    def check(draft_dtype, device):
        if draft_dtype == "int8":
            raise ImportError("needs bitsandbytes")

    monkeypatch.setattr(formats, "check_draft_dtype", check)
    model = build_model(dtype=torch.float32)
    with make_sparse(model) as twin:
        assert twin.sirius_config.draft_dtype == "int4" and twin._twin.resident[model.lm_head] == "int4"
        assert model.generate(make_prompt(), assistant_model=twin, max_new_tokens=8).shape == (1, 19)


def test_what_is_kept_since_changes_no_answer(monkeypatch):
    model = build_model(dtype=torch.float32)
    with make_sparse(model) as twin:
        chosen = twin.sirius_config
    monkeypatch.setattr(choice, "_free_memory", lambda device: 1000)
    with make_sparse(model) as twin:
        assert twin.sirius_config == chosen


def test_every_field_is_known_to_say_what_a_draft_is_or_not():
    names = {field.name for field in dataclasses.fields(SiriusConfig)}
    assert names == {*choice.CHOSEN, "kernel_size", "threshold", "temperature", "draft_confidence", "compile_draft"}


def test_the_draft_of_an_offloaded_model_is_held_whole():
    model = build_model(dtype=torch.float32)
    expected = model.generate(make_prompt(), max_new_tokens=12)
    cpu_offload(model)
    with make_sparse(model, threshold=1.0) as twin:
        assert (twin.sirius_config.draft_dtype, twin.sirius_config.kernel_size) == ("int8", 32)
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, max_new_tokens=12), expected)
        assert twin.stats.num_accepted >= 5


def test_the_users_random_numbers_are_left_alone():
    model = build_model(dtype=torch.float32)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with make_sparse(model):
        assert torch.equal(torch.rand(3), expected)
