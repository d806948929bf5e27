"""Watching the dense model's MLPs during the forwards of one context, with the model in evaluation meanwhile."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .shared import SharedContext
from .sites import MlpSite, ProjectionSite, part_of


# What is watched: of an MLP, "activation" is act(gate_proj x) and "neurons" the input of the down projection; of a
# projection its "inputs".
Observed = Literal["activation", "neurons", "inputs"]

eagerly = SharedContext(lambda: torch.compiler.set_stance("force_eager"))
_observer: ContextVar[object | None] = ContextVar("hf_sirius_observer", default=None)


def is_compiled(model: nn.Module) -> bool:
    """Whether any module runs code that torch.compile made."""
    return any(
        module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within the block, a model runs eagerly, be it compiled or not."""
    return eagerly() if is_compiled(model) else contextlib.nullcontext()


@contextlib.contextmanager
def observing(
    model: nn.Module,
    sites: list[MlpSite] | list[ProjectionSite],
    observed: Observed,
    observe: Callable[[Any, torch.Tensor], None],
    attention_mask: torch.Tensor | None = None,
) -> Iterator[None]:
    """Within the block, hands what is computed at the sites in this context to `observe(site, values)`. Compiled
    modules run eagerly meanwhile, as what was compiled before has no place for an observer.

    Args:
        model: the dense model.
        sites: its MLPs, or its projections.
        observed: what to watch.
        observe: takes values of shape [num_tokens, num_neurons or in_features]; padding tokens are left out.
        attention_mask: long [batch_size, num_new_tokens] of the tokens that will be read, or `None` without padding.

    Raises:
        `ValueError` at the end of the block if it saw nothing of some site.
    """
    me = object()
    num_seen = [0] * len(sites)  # rows of values

    def hand_over(site: MlpSite | ProjectionSite, values: torch.Tensor) -> None:
        # Another thread's forward passes the same hooks, but not in this context.
        if _observer.get() is not me:
            return
        values = values.detach().flatten(0, -2)
        start = num_seen[site.idx]
        num_seen[site.idx] += len(values)
        if attention_mask is not None:
            batch_size, num_new_tokens = attention_mask.shape
            # A prefill may come in chunks, and a looped model runs an MLP several times over the same tokens.
            start = start // batch_size % num_new_tokens
            token_mask = attention_mask[:, start : start + len(values) // batch_size].flatten().bool()
            values = values[token_mask.to(values.device)]
        observe(site, values)

    def watch(site: MlpSite | ProjectionSite):
        if observed == "inputs":
            return site.module.register_forward_pre_hook(lambda _, args: hand_over(site, args[0]))
        if observed == "neurons":
            return site.down.register_forward_pre_hook(lambda _, args: hand_over(site, args[0]))
        # The activation may be a plain function or shared by all layers, so the gate projection is watched instead.
        activation = part_of(site.owner, site.activation)
        return site.gate.register_forward_hook(
            lambda _, args, output: hand_over(site, activation(output[..., : site.num_neurons]))
        )

    with contextlib.ExitStack() as undo:
        undo.callback(_observer.reset, _observer.set(me))
        for site in sites:
            undo.callback(watch(site).remove)
        with uncompiled(model):
            yield
        if not all(num_seen):
            raise ValueError(
                f"nothing was seen of {sites[num_seen.index(0)].name} while {type(model).__name__} read the prompt: "
                "its forward does not call its projections, as with a fused kernel, so that no neurons can be chosen. "
                "Load the model without it"
            )


@contextlib.contextmanager
def intercepting(
    model: nn.Module, modules: list[nn.Module], intercept: Callable[[int, tuple, dict], tuple[tuple, dict] | None]
) -> Iterator[None]:
    """Within the block, these modules of a model take what `intercept(idx, args, kwargs)` returns in place of what they
    are given in this context, or just that where it returns `None`. Compiled modules run eagerly meanwhile.
    """
    me = object()

    def hook_of(idx: int):
        return lambda _, args, kwargs: intercept(idx, args, kwargs) if _observer.get() is me else None

    with contextlib.ExitStack() as undo:
        undo.callback(_observer.reset, _observer.set(me))
        for idx, module in enumerate(modules):
            undo.callback(module.register_forward_pre_hook(hook_of(idx), with_kwargs=True).remove)
        with uncompiled(model):
            yield


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, no module of a model is in training, so that none drops anything out."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
