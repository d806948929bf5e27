"""The bond of a model with its twins: a class that the model has while any of them lives.

`model.generate(..., assistant_model=make_sparse(model))` looks `generate` up before there is a twin, so nothing laid
over it could take part. But stock `generate` asks the model's *class* for its decoding loop, once the arguments are
made. The model gets its own class back with its last twin, and nothing is written to the instance.

`_assisted_decoding` and `_get_candidate_generator` are private to transformers and used in no other file;
tests/decode/test_attach.py fails loudly if their signatures change.
"""

import collections
import copyreg
import ctypes
import functools
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from ..model.compat import IS_5_17, SettledCriteria
from ..model.stock import STOCK_CLASS, stock_class
from .call import Call
from .candidates import SiriusCandidateGenerator
from .checks import check_batch_size, check_call
from .whisper import Segmented


class _Lock:
    """Held while models and twins get to know each other. The end of a twin, which may come anywhere, as the garbage
    collector comes, never waits for it, and never comes within a block that holds it, but at the block's end.
    """

    def __init__(self):
        self._lock, self._depth = threading.RLock(), 0
        self._ended: collections.deque[tuple] = collections.deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *exc_info) -> None:
        self._depth -= 1
        self._lock.release()
        self._settle()

    def end(self, *bond: Any) -> None:
        """Unties a bond, now or when the lock is free."""
        self._ended.append(bond)
        self._settle()

    def _settle(self) -> None:
        while self._ended and self._lock.acquire(blocking=False):
            try:
                if self._depth or not self._ended:
                    return
                self._depth += 1
                _untie(*self._ended.popleft())
                self._depth -= 1
            finally:
                self._lock.release()


lock = _Lock()
# dense model -> its living twins
_bonds: "weakref.WeakKeyDictionary[PreTrainedModel, set[weakref.ref]]" = weakref.WeakKeyDictionary()
# dense model -> casts and memory of its latest twin, for the next one. Nothing in them leads back to the model.
_latest: "weakref.WeakKeyDictionary[PreTrainedModel, list]" = weakref.WeakKeyDictionary()


def _forgetting(name: str) -> Callable[..., Any]:
    """Returns a step of stock `generate` that takes a twin out of its frame, should the step fail."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(Assisted, self), name)(*args, **kwargs)
        except BaseException:
            _forget(sys._getframe(1).f_locals.get("assistant_model"), sys._getframe(1))
            raise

    return step


class Assisted:
    """What a model can do while twins of it live, over its own class."""

    def __new__(cls, *args: Any, **kwargs: Any):
        stock = getattr(cls, STOCK_CLASS)
        return stock(*args, **kwargs) if args or kwargs else stock.__new__(stock)  # as type(model)(config) is meant

    def __reduce_ex__(self, protocol: Any):
        """Pickles and copies the model as one of its own class."""
        make, _, *state = reduced = super().__reduce_ex__(max(protocol, 2))
        return (object.__new__, (stock_class(self),), *state) if make is copyreg.__newobj__ else reduced

    def __call__(self, *args: Any, **kwargs: Any):
        call = Call.current()
        if call is None or call.model is not self or call.next_forward is None:
            return super().__call__(*args, **kwargs)
        read, call.next_forward = call.next_forward, None
        return read(super().__call__, *args, **kwargs)

    # `generate` hands `inputs_tensor` to a loop that declares it.
    def _assisted_decoding(
        self, input_ids, *args, stopping_criteria, inputs_tensor=None, assistant_model=None, **kwargs
    ):
        decode = functools.partial(super()._assisted_decoding, input_ids, *args, inputs_tensor=inputs_tensor, **kwargs)
        if not _is_bound(assistant_model, self):
            return decode(stopping_criteria=stopping_criteria, assistant_model=assistant_model)
        try:
            check_batch_size(input_ids)
            with assistant_model.new_call(stopping_criteria) as call:
                if IS_5_17:
                    stopping_criteria = SettledCriteria(stopping_criteria, lambda: call.is_verifying)
                # No frame below this one holds what the user does, so that it is gone with the user's own.
                return decode(stopping_criteria=stopping_criteria, assistant_model=call.draft.twin.module)
        except BaseException:
            _forget(assistant_model, sys._getframe(1))
            assistant_model = None
            raise

    def _get_candidate_generator(
        self,
        generation_config,
        input_ids,
        inputs_tensor,
        logits_processor,
        model_kwargs,
        assistant_model=None,
        **kwargs,
    ):
        call = Call.current()
        if call is None or call.model is not self or assistant_model is not call.draft.twin.module:
            return super()._get_candidate_generator(
                generation_config=generation_config, input_ids=input_ids, inputs_tensor=inputs_tensor,
                logits_processor=logits_processor, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs,
            )  # fmt: skip
        check_call(self, call.draft.config, generation_config, logits_processor)
        return SiriusCandidateGenerator(call, generation_config, logits_processor)


class _Stateful:
    """What lets a twin draft for a model with recurrent states, under [`Assisted`]."""

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        if self._is_stateful and _is_bound(generation_mode_kwargs.get("assistant_model"), self):
            # Stock assisted decoding refuses such models. The twin keeps their states, as `make_sparse` has tried.
            generation_mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)


# What `generate` does before it decodes, in which it tells of wrong arguments.
STEPS = (
    "_get_deprecated_gen_repo", "_prepare_generation_config", "_validate_model_kwargs", "_validate_generation_mode",
    "_prepare_model_inputs", "_prepare_generated_length", "_validate_generated_length",
    "_prepare_cache_for_generation", "_get_logits_processor", "_get_stopping_criteria",
)  # fmt: skip
for _name in STEPS:
    setattr(Assisted, _name, _forgetting(_name))


@functools.cache
def _assisted_class(model_class: type[PreTrainedModel]) -> type:
    # transformers keys hooks and messages by these names.
    namespace = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    bases: tuple[type, ...] = (Assisted, _Stateful, model_class)
    if hasattr(model_class, "generate_with_fallback"):
        bases, namespace["is_bound"] = (Assisted, Segmented, model_class), staticmethod(_is_bound)
    return type(model_class.__name__, bases, {**namespace, STOCK_CLASS: model_class})


def bind(user: Any, kept: list, model: PreTrainedModel) -> None:
    """Has `model` know what a user holds of a twin, until it is released or gone; `kept` stays for its next twin."""
    with lock:
        if not isinstance(model, Assisted):
            model.__class__ = _assisted_class(type(model))
        bond = weakref.ref(user)
        _bonds.setdefault(model, set()).add(bond)
        _latest[model] = kept
        end = weakref.finalize(user, lock.end, weakref.ref(model), bond)
    end.atexit = False
    user.__dict__["_end"] = end


def _untie(model_ref: weakref.ref, bond: weakref.ref) -> None:
    if (model := model_ref()) is None:
        return
    bonds = _bonds[model]
    bonds.discard(bond)
    if not bonds:
        del _bonds[model]
        if STOCK_CLASS in vars(type(model)):  # else somebody has laid another class over ours since: it stays
            model.__class__ = stock_class(model)


def release(user: Any, kept: list, model: PreTrainedModel) -> None:
    """Ends a bond, and lets go of what is kept for the next twin. Harmless when repeated."""
    with lock:
        if _latest.get(model) is kept:
            del _latest[model]
        end = user.__dict__["_end"]
        if (alive := end.peek()) is not None and alive[0] is user:  # else it was released before, or is a copy
            end.detach()
            _untie(*alive[2])


def _is_bound(user: Any, model: PreTrainedModel) -> bool:
    return any(bond() is user for bond in tuple(_bonds.get(model, ())))


# Modules whose frames are those of a call of `generate`.
_OF_GENERATE = ("transformers.generation.", "transformers.models.whisper.", Segmented.__module__, "torch.")


def _forget(user: Any, frame: FrameType | None) -> None:
    """Takes a twin out of the frames of a failed stock `generate`.

    Whoever keeps the exception keeps these frames, and with them a twin that was made for this call alone: the model
    would not get its class back. The user's own variables stay as they are.
    """
    if "_end" not in getattr(user, "__dict__", ()):  # no twin
        return
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_OF_GENERATE):
        values = frame.f_locals
        for name, value in list(values.items()):
            if value is user:
                values[name] = None
            elif name in ("kwargs", "generation_mode_kwargs", "generate_kwargs"):
                value.update({key: None for key, given in value.items() if given is user})
        if sys.version_info < (3, 13):  # from there on f_locals writes through
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
        frame = frame.f_back
