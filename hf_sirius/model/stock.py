"""The class that a model has by itself."""

from torch import nn


STOCK_CLASS = "_stock_class"  # stands in the class that a model has while twins of it live


def stock_class(model: nn.Module) -> type:
    """Returns the class of a model, that under the one which a living twin has laid over it."""
    return getattr(type(model), STOCK_CLASS, type(model))
