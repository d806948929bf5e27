"""Fewer experts: of a mixture of experts, a draft reads only some of those that each token is given."""

from .in_experts import FewerExperts
from .whole import Whole


class Experts(Whole):
    """Keeps the share `density` of a token's experts, at least one: those that the router gives the largest weights.
    All else is whole.
    """

    is_steady = False
    experts_class = FewerExperts
