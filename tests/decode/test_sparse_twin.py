"""What a user holds of a twin, as a model."""

import copy
import pickle

import pytest
import torch
from tiny import build_model, make_prompt
from transformers import GenerationConfig

from hf_sirius import make_sparse


def make_twin(model):
    return make_sparse(model, method="griffin", threshold=1.0, kernel_size=5)


def test_a_generation_config_that_is_replaced_reaches_the_twin():
    model = build_model()
    with make_twin(model) as sparse:
        model.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
        assert sparse.generate(make_prompt()).shape[1] == make_prompt().shape[1] + 3
        sparse.generation_config = GenerationConfig(max_new_tokens=4, pad_token_id=0)
        assert model.generate(make_prompt()).shape[1] == make_prompt().shape[1] + 4


@pytest.mark.parametrize("save", [pickle.dumps, lambda twin: torch.save(twin, "/dev/null")])
def test_a_twin_is_not_pickled(save):
    model = build_model()
    with make_twin(model) as sparse, pytest.raises(TypeError, match=r"is not pickled.*sirius_config\.save_pretrained"):
        save(sparse)
    with make_twin(model):
        assert type(pickle.loads(pickle.dumps(model))) is type(build_model())  # while the model is


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_twin_writes_as_it_does(copied):
    model, options = build_model(), {"max_new_tokens": 12, "do_sample": False}
    with make_twin(model) as sparse:
        clone = copied(sparse)
        assert clone is not sparse and (clone.dense_model is model) == (copied is copy.copy)
        assert torch.equal(clone.generate(make_prompt(), **options), sparse.generate(make_prompt(), **options))
