"""A third method touches one file, which is this one, and one row of the table."""

import pytest
import torch
from accelerate import disk_offload
from tiny import build_model, make_prompt

from hf_sirius import SiriusConfig, make_sparse, tune
from hf_sirius.cli import loading
from hf_sirius.cli.arguments import make_parser
from hf_sirius.settings.methods import METHODS, MethodRow
from hf_sirius.sparsity.base import SparsityMethod, TwinActivation


class First(SparsityMethod):
    """Keeps the first neurons of each MLP."""

    observed = "neurons"
    gathers = True

    def observe(self, site, values):
        pass

    def choose(self, site):
        self.neuron_indices[site.idx] = torch.arange(max(1, round(self.config.density * site.num_neurons)))


class Positive(SparsityMethod):
    """Keeps the neurons whose activation is positive."""

    observed = "activation"

    @classmethod
    def replacements(cls, site):
        return {site.activation: TwinActivation(getattr(site.owner, site.activation), site.idx)}

    def observe(self, site, values):
        pass

    def choose(self, site):
        pass

    def drop(self, site_idx, activations):
        return activations.relu()

    def num_parameters_read(self, site):
        return site.num_parameters_read(0.5, gate_in_full=True)


@pytest.fixture(params=[First, Positive])
def method(request, monkeypatch):
    name = request.param.__name__.lower()
    monkeypatch.setitem(METHODS, name, MethodRow(f"{__name__}:{request.param.__name__}"))
    return name


@pytest.mark.parametrize(
    "fields",
    [{}, {"tree_width": 3}, {"draft_dtype": "bfloat16"}, {"draft_dtype": "int8", "draft_scope": "all"}],
    ids=["plain", "tree", "cast", "whole"],
)
def test_it_drafts(method, fields):
    model, options = build_model(), {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(make_prompt(), **options)
    with make_sparse(model, method=method, density=0.3, threshold=1.0, kernel_size=4, **fields) as twin:
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **options), expected)
        assert twin.stats.num_drafted > 0 and 0 < twin.stats.draft_density < 1
        assert not torch.equal(twin.generate(make_prompt(), **options), expected)


def test_it_drafts_for_an_offloaded_model_or_is_refused(method, tmp_path):
    model = disk_offload(build_model(), str(tmp_path))
    expected = model.generate(make_prompt(), max_new_tokens=12)
    if method != "first":
        with pytest.raises(ValueError, match="offloaded"):
            make_sparse(model, method=method)
        return
    with make_sparse(model, method=method, threshold=1.0, kernel_size=4) as twin:
        assert torch.equal(model.generate(make_prompt(), assistant_model=twin, max_new_tokens=12), expected)


def test_it_is_saved_and_loaded(method, tmp_path):
    config = SiriusConfig(method=method, density=0.3)
    config.save_pretrained(tmp_path)
    assert SiriusConfig.from_pretrained(tmp_path) == config
    assert config.with_method("cats").method == "cats"
    with pytest.raises(ValueError, match="reselect_every belongs to method='griffin'"):
        SiriusConfig(method=method, reselect_every=2)


def test_the_command_line_and_tune_know_it(method):
    args = make_parser().parse_args(["generate", "--model", "reasoner", "--prompt", "a", "--method", method])
    assert loading.sirius_config(args).method == method
    prompts = [{"input_ids": make_prompt()}]
    tuned = tune(build_model(), prompts, methods=[method], densities=[0.3], kernel_sizes=[4], max_new_tokens=8)
    assert tuned.config.method == method
