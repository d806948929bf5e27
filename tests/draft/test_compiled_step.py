"""The draft step as one graph: the same drafts, for any length of the context, without compiling anew."""

import functools
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SLIDING, build_model, make_prompt
from torch._dynamo.utils import counters
from transformers import DynamicCache

from hf_sirius import make_sparse
from hf_sirius.draft import compiled


@pytest.fixture(autouse=True)
def traced_only(request, monkeypatch):
    """Most tests are about the graph, which this backend runs as it was traced; inductor takes a minute."""
    torch._dynamo.reset()
    counters.clear()
    if "with_inductor" not in request.fixturenames:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled, "tqdm", functools.partial(compiled.tqdm, disable=True))


@pytest.fixture
def with_inductor():
    pass


def num_graphs():
    return counters["stats"]["unique_graphs"]


FIELDS = {"density": 1.0, "threshold": 1.0, "kernel_size": 5}
FAMILIES = {"llama": {}, "qwen3": {}, "gemma3_text": {}, **dict.fromkeys(SLIDING, {})}
