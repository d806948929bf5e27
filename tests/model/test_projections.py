"""What a projection is, and whose weight lies open."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sirius.model.projections import compute_dtype, is_opaque, is_projection, plain_tensors


class Leaf(nn.Module):
    """A layer of some library."""

    def __init__(self, dtype=None):
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.register_buffer("qweight", torch.zeros(4, 6, dtype=torch.int8))
        if dtype is not None:
            self.register_buffer("scales", torch.ones(6, dtype=dtype))


class Adapter(nn.Module):
    """Has the sizes of the layer that it holds."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features


@pytest.mark.parametrize(
    "module, expected",
    [(nn.Linear(4, 6), True), (Conv1D(6, 4), True), (Leaf(), True), (Adapter(nn.Linear(4, 6)), False),
     (nn.LayerNorm(4), False), (nn.Embedding(4, 6), False), (nn.Bilinear(4, 4, 6), False), (None, False)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_a_projection_is(module, expected):
    assert is_projection(module) == expected


def without_weight() -> nn.Linear:
    linear = nn.Linear(4, 6)
    del linear.weight
    linear.register_buffer("weight_packed", torch.zeros(6, 2, dtype=torch.uint8))
    return linear


@pytest.mark.parametrize(
    "projection, expected",
    [(nn.Linear(4, 6), False), (nn.Linear(4, 6, device="meta"), False), (Conv1D(6, 4), False), (Leaf(), True),
     (nn.Linear(4, 6).to(torch.float8_e4m3fn), True), (without_weight(), True)],
    ids=["Linear", "meta", "Conv1D", "Leaf", "float8", "packed"],
)  # fmt: skip
def test_whose_weight_lies_open(projection, expected):
    assert is_opaque(projection) == expected


def test_in_which_dtype_a_projection_computes():
    assert compute_dtype(nn.Linear(4, 6).bfloat16()) == torch.bfloat16
    assert compute_dtype(Leaf(torch.float16)) == torch.float16
    assert compute_dtype(Leaf()) == torch.float32
    leaf = Leaf()
    leaf.compute_dtype = torch.bfloat16
    assert compute_dtype(leaf) == torch.bfloat16


def test_buffers_are_tensors_of_a_projection():
    leaf = Leaf(torch.float32)
    assert [id(tensor) for tensor in plain_tensors(leaf)] == [id(leaf.qweight), id(leaf.scales)]
