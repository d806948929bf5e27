"""What a twin is when the user sets nothing."""

import dataclasses

import pytest
import torch
from accelerate import cpu_offload
from families import tiny_model
from tiny import build_model, make_prompt

from hf_sirius import SiriusConfig, make_sparse
from hf_sirius.draft import choice
from hf_sirius.model.sites import find_mlps


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    choice._chosen.clear()


def test_the_choice_is_made_once_and_told():
    model = build_model(dtype=torch.float32)
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
        seconds = iter([1.0, 1.0, *verifications, *draft.values()])
        monkeypatch.setattr(choice, "_seconds", lambda run, device: next(seconds))
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
            key=lambda k: ((k - 1) * 0.3 + 1 + 0.2 * (k - 1)) / sum(0.98**i for i in range(k)),
        )
    )


def test_without_room_for_a_copy_griffin_drafts(monkeypatch):
    monkeypatch.setattr(choice, "_free_memory", lambda device: 1000)
    with make_sparse(build_model(dtype=torch.float32)) as twin:
        assert twin.sirius_config.method == "griffin" and twin.sirius_config.draft_dtype is None


def test_where_neurons_cannot_be_gathered_cats_drafts(monkeypatch):
    monkeypatch.setattr(choice, "_free_memory", lambda device: 1000)
    with make_sparse(tiny_model("bitnet")) as twin:
        assert twin.sirius_config.method == "cats"


def test_what_is_kept_since_changes_no_answer(monkeypatch):
    model = build_model(dtype=torch.float32)
    with make_sparse(model) as twin:
        chosen = twin.sirius_config
    monkeypatch.setattr(choice, "_free_memory", lambda device: 1000)
    with make_sparse(model) as twin:
        assert twin.sirius_config == chosen


def test_every_field_is_known_to_say_what_a_draft_is_or_not():
    names = {field.name for field in dataclasses.fields(SiriusConfig)}
    assert names == {*choice.CHOSEN, "kernel_size", "threshold", "temperature", "draft_confidence"}


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
