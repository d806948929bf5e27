"""The state of one `generate` call: its choice of neurons, its counts, and all that has to be undone when it ends."""

import contextlib
from contextvars import ContextVar, Token

from torch import nn
from transformers import PreTrainedModel, StoppingCriteriaList

from .config import SiriusConfig
from .mlp import MlpSite
from .sparsity import method_class
from .stats import GenerationStats


_current: ContextVar["Call | None"] = ContextVar("hf_sirius_call", default=None)


class Call(contextlib.AbstractContextManager):
    """A context manager around stock `generate`: within it, `Call.current()` is this call; at its end nothing is left
    behind.

    Attributes:
        model: the dense model.
        method: the sparsity method, which holds the neurons (and their gathered weights) of this call.
        stats: the counts of this call.
        stopping_criteria: those of the call, once `generate` has prepared them.
        is_verifying: whether a draft has been handed out and its verification is not over.
        undo: what the end of the call, be it an exception, has to close (hooks, contexts).
    """

    def __init__(
        self,
        config: SiriusConfig,
        model: PreTrainedModel,
        sites: list[MlpSite],
        projections: list[nn.Module],
        stats: GenerationStats,
    ):
        self.config = config
        self.model = model
        self.method = method_class(config.method)(config, sites, projections)
        self.stats = stats
        self.stopping_criteria: StoppingCriteriaList | None = None
        self.is_verifying = False
        self.undo = contextlib.ExitStack()
        self._token: Token | None = None

    @staticmethod
    def current() -> "Call | None":
        """Returns the innermost call of this context (thread), or `None` outside of `generate`."""
        return _current.get()

    def __enter__(self) -> "Call":
        self._token = _current.set(self)
        return self

    def __exit__(self, *exc_info) -> None:
        _current.reset(self._token)
        self.undo.close()
        if (draft_density := self.method.draft_density(self.model)) is not None:
            self.stats.record_draft_density(draft_density)
