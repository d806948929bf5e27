"""Products with the same inputs, which a graph makes in one call."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from hf_sirius.kernels.graph_pass import JoinedProductsPass
from hf_sirius.weights import packed
from hf_sirius.weights.formats import draft_linear


pytest.importorskip("numba")


@pytest.fixture(params=["int8", "int4"])
def linears(request, monkeypatch):
    monkeypatch.setattr(packed, "_is_int4_kernel_faster", lambda: True)
    torch.manual_seed(0)
    return [draft_linear(nn.Linear(64, size, bias=False), request.param) for size in (32, 16, 8, 64)]


def products(first, second, *tensors):
    """Three products of the same inputs, and one of others."""
    num = len(tensors) // 4
    ops = torch.ops.hf_sirius
    product = ops.grouped_product if num == 2 else ops.int4_product
    q, k, v, o = (product(second if i == 3 else first, *tensors[i * num : (i + 1) * num]) for i in range(4))
    return q * 2, k, v + q.sum(), o


def test_products_with_the_same_inputs_become_one(linears):
    inputs = torch.randn(1, 1, 64), torch.randn(1, 3, 64)
    tensors = [tensor for linear in linears for tensor in linear.linear.tensors]
    traced = make_fx(products)(*inputs, *tensors)
    names = [str(node.target) for node in traced.graph.nodes]
    assert sum("_product." in name for name in names) == 4
    right = traced(*inputs, *tensors)
    JoinedProductsPass()(traced.graph)
    traced.recompile()
    traced.graph.lint()
    names = [str(node.target) for node in traced.graph.nodes]
    assert sum("_product." in name for name in names) == sum("_products." in name for name in names) == 1
    for outputs, expected in zip(traced(*inputs, *tensors), right, strict=True):
        assert torch.equal(outputs, expected)


@pytest.mark.slow
def test_inductor_runs_them(linears, monkeypatch):
    """As the pass is no public part of torch, this is to fail where it changes."""
    torch._dynamo.reset()
    several, call = [], JoinedProductsPass.__call__

    def counted(self, graph):
        call(self, graph)
        several.extend(len(node.args[1]) for node in graph.nodes if "_products." in str(node.target))

    monkeypatch.setattr(JoinedProductsPass, "uuid", lambda self: None)  # no graph of an earlier run
    monkeypatch.setattr(JoinedProductsPass, "__call__", counted)

    def layers(modules, first, second):
        *three, last = modules
        return [module(first) for module in three] + [last(second)]

    inputs = torch.randn(1, 1, 64), torch.randn(1, 3, 64)
    with torch.no_grad():
        compiled = torch.compile(layers, fullgraph=True, options={"post_grad_custom_pre_pass": JoinedProductsPass()})
        found, right = compiled(nn.ModuleList(linears), *inputs), layers(linears, *inputs)
    assert several == [3] and all(map(torch.allclose, found, right))
