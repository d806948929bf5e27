"""The state of one `generate` call: its draft, its counts, and all that has to be undone when it ends."""

import contextlib
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

from transformers import StoppingCriteriaList

from ..draft.draft import Draft
from .stats import CallHistory


_current: ContextVar["Call | None"] = ContextVar("hf_sirius_call", default=None)


class Call(contextlib.AbstractContextManager):
    """A context manager around the stock loop: within it, `Call.current()` is this call, and its draft is open; at its
    end nothing is left behind.

    Attributes:
        model: the dense model.
        stats: the counts of this call.
        next_forward: how the loop's next forward of the dense model is to be made, given the stock one; `None` as it
            is.
        is_verifying: whether a draft has been handed out and its verification is not over.
        undo: what the end of the call, be it an exception, has to close.
    """

    def __init__(self, draft: Draft, history: CallHistory, stopping_criteria: StoppingCriteriaList | None = None):
        self.draft = draft
        self.model = draft.model
        self.history = history
        self.stats = history.new()
        self.stopping_criteria = stopping_criteria
        self.next_forward: Callable[..., Any] | None = None
        self.is_verifying = False
        self.undo = contextlib.ExitStack()
        self._token: Token | None = None

    @staticmethod
    def current() -> "Call | None":
        """Returns the innermost call of this context (thread), or `None` outside of `generate`."""
        return _current.get()

    def __enter__(self) -> "Call":
        self.undo.enter_context(self.draft)
        self.history.latest = self.stats  # not before this call is sure to run
        self._token = _current.set(self)
        return self

    def __exit__(self, *exc_info) -> None:
        self.next_forward = None
        try:
            _current.reset(self._token)
        finally:
            self.undo.close()
        if not self.draft.has_drafted:
            return
        if (draft_density := self.draft.method.draft_density(self.model)) is not None:
            self.stats.record_draft_density(draft_density, self.draft.method.is_masking)
