"""What drafts of a mixture of experts may be, and which one is made where nothing is asked for."""

from typing import Any

from transformers import PreTrainedModel

from ..model.experts import ExpertsSite
from ..model.sites import MlpSite
from ..settings.config import SiriusConfig
from ..settings.methods import method_of
from ..sparsity.in_experts import FewerExperts


def draft_of_experts(experts: list[ExpertsSite]) -> dict[str, Any]:
    """Returns the fields of the config where nothing is asked for: half of a token's experts, which holds nothing and
    reads less, or cats where a token is given one.
    """
    method = "experts" if any(block.top_k > 1 for block in experts) else "cats"
    return {"method": method, "density": 0.5, "kernel_size": "auto"}


def check_experts(
    model: PreTrainedModel,
    config: SiriusConfig,
    sites: list[MlpSite],
    experts: list[ExpertsSite],
    offloaded: bool,
) -> None:
    """Raises `ValueError` where a draft would have nothing to leave out, or cannot hold what it needs."""
    if experts and offloaded:
        raise ValueError(
            f"{type(model).__name__} is a mixture of experts and offloaded by accelerate, of which hf_sirius makes no "
            "drafts: load it without offloading"
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
