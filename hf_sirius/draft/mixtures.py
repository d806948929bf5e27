"""What drafts of a mixture of experts may be, and which one is made where nothing is asked for."""

from typing import Any

from transformers import PreTrainedModel

from ..model.experts import ExpertsSite
from ..model.sites import MlpSite
from ..settings.config import SiriusConfig
from ..settings.methods import method_of
from ..sparsity.in_experts import FewerExperts


def draft_of_experts(experts: list[ExpertsSite], offloaded_kernel_size: int | None) -> dict[str, Any]:
    """Returns the fields of the config where nothing is asked for: half of the experts, or where a token is given one
    alone, cats, which holds nothing, or of a model that is offloaded griffin.

    Args:
        offloaded_kernel_size: tokens per cycle where the weights are streamed; `None` where they are not.
    """
    single = "cats" if offloaded_kernel_size is None else "griffin"
    method = "experts" if any(block.top_k > 1 for block in experts) else single
    return {"method": method, "density": 0.5, "kernel_size": offloaded_kernel_size or "auto"}


def check_experts(
    model: PreTrainedModel,
    config: SiriusConfig,
    sites: list[MlpSite],
    experts: list[ExpertsSite],
    offloaded: bool,
) -> None:
    """Raises `ValueError` where a draft would have nothing to leave out, or cannot hold what it needs."""
    if offloaded and not all(block.opens for block in experts):
        raise ValueError(
            f"{type(model).__name__} is offloaded by accelerate, and its experts are not of the form that "
            "transformers' experts_implementation takes, so that no part of them can stay resident: load it without "
            "offloading"
        )
    if config.density == 1:
        return
    method = method_of(config)
    inside = method.experts_class
    if inside is FewerExperts:
        if all(block.top_k == 1 for block in experts):
            reason = "gives each token a single expert" if experts else "has no experts that a token is given"
            raise ValueError(
                f"method={config.method!r} drafts with fewer experts per token, and {type(model).__name__} {reason}: "
                "use method='griffin' or 'cats'"
            )
        return
    acts = inside is not None and any(block.opens for block in experts)
    if not sites and not acts and method.acts_on == "mlps":
        raise ValueError(
            f"method={config.method!r} cannot act within the experts of {type(model).__name__}, which are not of the "
            "form that transformers' experts_implementation takes, and it has no other MLPs: use method='experts'"
        )
