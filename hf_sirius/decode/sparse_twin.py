"""What a user holds: the twin as a model of its own, and its bond with the dense model."""

import copy
import functools
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from ..draft.draft import Draft
from ..draft.twin import Twin
from ..model.stock import stock_class
from ..settings.config import SiriusConfig
from ..sparsity.base import drafting_method
from .bond import release
from .call import Call
from .checks import check_batch_size
from .first_forward import mask_of_new_tokens
from .stats import CallHistory, GenerationStats


# To type checkers a twin is a model; at run time its class is made of this one and the model's own.
_Model = PreTrainedModel if TYPE_CHECKING else object


class SparseTwin(_Model):
    """What a twin can do beyond its model class. Made by [`make_sparse`], used as `model.generate(...,
    assistant_model=twin)`.

    A forward of the twin outside of `generate` is a prefill, and so it is dense. `twin.generate(...)` is the
    sparse-only baseline: a dense prefill, which chooses the neurons, then sparse decoding without correction.

    Nothing of a draft refers to this object, so that it is gone as soon as the user lets go of it.

    Attributes:
        sirius_config ([`SiriusConfig`]): the settings.
        stats ([`GenerationStats`]): the counts of the latest call; `stats.total` those of all calls.
        dense_model: the model that the twin drafts for.
    """

    sirius_config: SiriusConfig
    dense_model: PreTrainedModel
    _twin: Twin
    _history: CallHistory

    @property
    def stats(self) -> GenerationStats:
        return self._history.latest

    def detach(self) -> None:
        """Ends the bond with the dense model, which is left exactly as it was before `make_sparse`, and lets go of what
        is kept for its next twin. Harmless when repeated.
        """
        release(self, self._twin.kept.bag, self.dense_model)
        self._twin.kept.clear()

    def __enter__(self) -> "SparseTwin":
        return self

    def __exit__(self, *exc_info) -> None:
        self.detach()

    def new_call(self, stopping_criteria: StoppingCriteriaList | None = None) -> Call:
        """Returns the state of one `generate` call; within it, and after it, `stats` speaks of it."""
        return Call(Draft(self._twin, self.dense_model), self._history, stopping_criteria)

    @property
    def training(self) -> bool:
        return self.dense_model.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.dense_model.training = mode

    def train(self, mode: bool = True):
        """Sets the mode of the dense model, whose modules are the twin's as well."""
        self.dense_model.train(mode)
        self._twin.follow_mode(self.dense_model)
        return self

    @property
    def generation_config(self) -> GenerationConfig:
        """The dense model's, also where that is replaced."""
        return self.dense_model.generation_config

    @generation_config.setter
    def generation_config(self, generation_config: GenerationConfig) -> None:
        self.dense_model.generation_config = generation_config

    def __copy__(self) -> "SparseTwin":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict) -> "SparseTwin":
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any):
        raise TypeError(
            "a sparse twin is not pickled, as it shares its weights with the dense model: save that one, and the "
            "settings with sirius_config.save_pretrained(...), and call make_sparse on the loaded model"
        )

    def __call__(self, *args, **kwargs):
        if Call.current() is None:
            self._twin.follow_attributes(self.dense_model)
        self._twin.follow(self.dense_model, kwargs)
        outputs = self._twin.module(*args, **kwargs)
        if (method := drafting_method()) is not None:
            method.check_acted(self.dense_model)
        return outputs

    def generate(self, *args, **kwargs):
        """Stock `generate`, with a dense prefill and sparse decoding, at batch size 1."""
        generation_config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        if getattr(generation_config, "is_assistant", False):
            raise ValueError(
                "this sparse twin is not attached to the model that it was given to: it was detached, or it is a copy, "
                f"or it was made from another {type(self.dense_model).__name__}. Call make_sparse on this model."
            )
        settings = generation_config or self.generation_config
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name, getattr(settings, name, None)) is not None:
                raise ValueError(
                    f"{name} was given to a sparse twin's generate, which is the model without correction and takes "
                    "no assistant: call generate of its dense_model, or leave it out"
                )
        with self.new_call():
            return super().generate(*args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # The dense model's prefill is the one place where neurons are observed, with and without correction.
        check_batch_size(input_ids)
        call = Call.current()
        with call.draft.observing(mask_of_new_tokens(self.dense_model, model_kwargs)):
            outputs = self.dense_model._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        call.draft.select()
        call.undo.enter_context(call.draft.drafting())
        return outputs


def sparse_twin(twin: Twin, model: PreTrainedModel) -> "SparseTwin":
    """Returns what a user holds of a twin of `model`."""
    user_class = _user_class(stock_class(model))
    held = user_class.__new__(user_class)
    held.__dict__.update(twin.module.__dict__)
    held.__dict__.pop("generation_config", None)
    # Not submodules of the twin.
    history = CallHistory(twin.config.kernel_size)
    held.__dict__.update(sirius_config=twin.config, dense_model=model, _twin=twin, _history=history)
    return held


@functools.cache
def _user_class(model_class: type[PreTrainedModel]) -> type:
    # The name stays: pipelines and the like look classes up by it.
    namespace = {"__module__": model_class.__module__, "__doc__": SparseTwin.__doc__}
    return type(model_class.__name__, (SparseTwin, model_class), namespace)
