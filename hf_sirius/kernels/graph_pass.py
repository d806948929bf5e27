"""What inductor makes of the kernels' products in a graph: one call of those with the same inputs."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from . import operators  # noqa: F401, which defines them


class JoinedProductsPass(CustomGraphPass):
    """Has inductor make the products of a graph that have the same inputs in one call of a kernel."""

    def __call__(self, graph: fx.Graph) -> None:
        products = torch.ops.hf_sirius
        for one, several in (
            (products.grouped_product.default, products.grouped_products.default),
            (products.int4_product.default, products.int4_products.default),
        ):
            groups: dict[fx.Node, list[fx.Node]] = {}
            for node in graph.find_nodes(op="call_function", target=one):
                if all(weight.op == "placeholder" for weight in node.args[1:]):  # which is there from the start
                    groups.setdefault(node.args[0], []).append(node)
            for inputs, nodes in groups.items():
                if len(nodes) > 1:
                    _join(graph, several, inputs, nodes)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _join(graph: fx.Graph, several: Callable[..., list[torch.Tensor]], inputs: fx.Node, nodes: list[fx.Node]) -> None:
    with graph.inserting_before(nodes[0]):
        tensors = zip(*(node.args[1:] for node in nodes), strict=True)
        together = graph.call_function(several, (inputs, *map(list, tensors)))
        together.meta["val"] = [node.meta["val"] for node in nodes]
        all_outputs = [graph.call_function(operator.getitem, (together, i)) for i in range(len(nodes))]
    for node, outputs in zip(nodes, all_outputs, strict=True):
        outputs.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(outputs)
        graph.erase_node(node)
