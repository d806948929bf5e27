"""The state of one `generate` call: its choice of neurons, its counts, and all that has to be undone when it ends."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteriaList

from .offload import check_offload, running, taking
from .sparsity import method_class
from .stats import GenerationStats
from .streaming import is_offloaded


if TYPE_CHECKING:
    from .twin import SparseTwin

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

    def __init__(self, twin: "SparseTwin"):
        self.twin = twin
        self.config = twin.sirius_config
        self.model = twin.dense_model
        self.method = method_class(self.config.method)(self.config, twin.sites)
        self.stats = GenerationStats(self.config.kernel_size, total=twin.stats.total)
        self.stopping_criteria: StoppingCriteriaList | None = None
        self.is_verifying = False
        self.undo = contextlib.ExitStack()
        self._token: Token | None = None

    @staticmethod
    def current() -> "Call | None":
        """Returns the innermost call of this context (thread), or `None` outside of `generate`."""
        return _current.get()

    def __enter__(self) -> "Call":
        if offloaded := is_offloaded(self.model):
            if not self.twin.is_offloaded:
                raise ValueError(
                    f"{type(self.model).__name__} was offloaded after make_sparse, whose twin knows nothing of it: "
                    "detach this one, and call make_sparse again"
                )
            check_offload(self.model)
        with contextlib.ExitStack() as undo:
            self.method.held.update(self.twin.kept.casts())
            self.method.memory = undo.enter_context(self.twin.kept.memory())
            if offloaded:
                undo.enter_context(running(self.model, self.twin.sites))
            self.undo.push(undo.pop_all())
        self.twin.stats = self.stats  # not before this call is sure to run
        self._token = _current.set(self)
        return self

    def __exit__(self, *exc_info) -> None:
        try:
            _current.reset(self._token)
        finally:
            self.undo.close()
        if (draft_density := self.method.draft_density(self.model)) is not None:
            self.stats.record_draft_density(draft_density)
        self.method.held.clear()
        self.method.memory.clear()

    @contextlib.contextmanager
    def observing(self, attention_mask: torch.Tensor | None, takes_weights: bool = True) -> Iterator[None]:
        """Within the block, the method watches the dense model's forwards in this context, and takes the weights that
        the draft needs as they are streamed past.

        Args:
            attention_mask: long [batch_size, num_new_tokens] of the tokens that will be read, or `None` without
                padding.
            takes_weights: whether weights are taken, where the model is offloaded.
        """
        with contextlib.ExitStack() as watched:
            watched.enter_context(self.method.observing(attention_mask))
            if self.twin.is_offloaded and takes_weights:
                watched.enter_context(taking(self.method, self.twin.sites, self.twin.others))
            yield
