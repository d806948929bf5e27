"""The twin: a model of the same class over the same weights, whose MLPs can be sparse. The only place that patches
modules.
"""

import functools
import types
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .call import Call
from .config import SiriusConfig
from .kept import Kept
from .mlp import MlpSite
from .residency import find_held, kept_neuron_bytes
from .sparsity import method_class
from .sparsity.base import TwinModule
from .stats import GenerationStats
from .streaming import is_offloaded, own_forward, streaming_hook


_CAPTURED = ("output_attentions", "output_hidden_states")
# Names within transformers.
_IS_HOOKED, _CAPTURING_HOOK = "_output_capturing_hooks_installed", "output_capturing_hook"


class SparseTwin:
    """What a twin can do beyond its model class. Made by [`make_sparse`], used as `model.generate(...,
    assistant_model=twin)`.

    A forward of the twin outside of `generate` is a prefill, and so it is dense. `twin.generate(...)` is the
    sparse-only baseline: a dense prefill, which chooses the neurons, then sparse decoding without correction.

    Attributes:
        sirius_config ([`SiriusConfig`]): the settings.
        stats ([`GenerationStats`]): the counts of the latest call; `stats.total` those of all calls.
        dense_model: the model that the twin drafts for.
    """

    sirius_config: SiriusConfig
    stats: GenerationStats
    sites: list[MlpSite]
    others: list[nn.Module]  # those outside the MLPs of which a draft holds copies
    kept: Kept  # what stays from call to call
    is_offloaded: bool  # whether accelerate streams weights of the dense model

    @property
    def dense_model(self) -> PreTrainedModel:
        return self.__dict__["_dense_model"]

    def detach(self) -> None:
        """Ends the bond with the dense model, which is left exactly as it was before `make_sparse`. Harmless when
        repeated.
        """
        from .assistant import detach

        detach(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.detach()

    def new_call(self) -> Call:
        """Returns the state of one `generate` call; within it, and after it, `stats` speaks of it."""
        return Call(self)

    def train(self, mode: bool = True):
        """Sets the mode of the dense model, whose modules are the twin's as well."""
        self.dense_model.train(mode)
        self._follow_mode()
        return self

    def _pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yields each module of the twin's own, itself included, with the dense model's that it stands for."""
        yield self, self.dense_model
        yield from self.__dict__["_copies"]

    def _follow_mode(self) -> None:
        for copied, original in self._pairs():
            copied.training = original.training

    def __call__(self, *args, **kwargs):
        # The copied containers have a mode of their own, which has to follow the originals' train() and eval().
        if self.training != self.dense_model.training:
            self._follow_mode()
        if any(kwargs.get(name, getattr(self.config, name, False)) for name in _CAPTURED):
            self._share_capturing_hooks()
        return super().__call__(*args, **kwargs)

    def _share_capturing_hooks(self) -> None:
        """Lays the hooks that record attentions and hidden states as the dense model would. Left to itself transformers
        lays them for the twin too, and so twice over the modules that both share.
        """
        models = [module for module in self.dense_model.modules() if isinstance(module, PreTrainedModel)]
        if not any(getattr(module, _IS_HOOKED, False) for module in models):
            maybe_install_capturing_hooks(self.dense_model)
        for copied, original in self._pairs():
            if not isinstance(copied, type(original)):  # a part in its owner's place
                continue
            for key, hook in original._forward_hooks.items():
                if getattr(hook, "__name__", "") == _CAPTURING_HOOK:
                    copied._forward_hooks.setdefault(key, hook)
            if hasattr(original, _IS_HOOKED):
                setattr(copied, _IS_HOOKED, getattr(original, _IS_HOOKED))

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
        prompt = next(
            (kwargs[name] for name in ("input_ids", "inputs", "inputs_embeds") if kwargs.get(name) is not None), None
        )
        check_batch_size(args[0] if args else prompt)
        with self.new_call():
            return super().generate(*args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # The dense model's prefill is the one place where neurons are observed, with and without correction.
        call = Call.current()
        with call.observing(mask_of_new_tokens(model_kwargs)):
            outputs = self.dense_model._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        call.method.select()
        call.undo.enter_context(call.method.drafting())
        return outputs


def mask_of_new_tokens(model_kwargs: dict) -> torch.Tensor | None:
    """Returns the attention mask of the tokens that the first forward reads, long [batch_size, num_new_tokens]."""
    attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
    if attention_mask is None or cache is None:
        return attention_mask
    return attention_mask[:, cache.get_seq_length() :]


def check_batch_size(prompt: torch.Tensor | None) -> None:
    """Raises `ValueError` for more than one sequence."""
    if isinstance(prompt, torch.Tensor) and prompt.ndim > 1 and prompt.shape[0] > 1:
        raise ValueError(
            f"hf_sirius generates one sequence at a time, got a batch of {prompt.shape[0]}: call generate for each "
            "prompt (a pipeline "
            "does so with batch_size=1)"
        )


def build_twin(model: PreTrainedModel, config: SiriusConfig, sites: list[MlpSite]) -> "SparseTwin":
    """Builds the twin of a model: copies of the containers on the way to the MLPs (and to other projections that the
    draft casts), and the model's own modules for all the rest.

    Nothing of the dense model changes. The copies share their dicts of parameters and buffers with the originals.
    """
    replacements = {id(site.owner): method_class(config.method).replacements(site) for site in sites}
    others = find_held(model, sites, config)
    for owner, name in others:
        replacements.setdefault(id(owner), {})[name] = TwinModule(getattr(owner, name))
    owners = {id(module): module for module in model.modules() if id(module) in replacements}
    copies: dict[int, nn.Module] = {}
    twin = _copied(model, replacements, copies)
    twin.__class__ = _twin_class(type(model))
    # Not submodules of the twin.
    twin.__dict__["_dense_model"] = model
    # Without the twin itself, which would make a cycle: what it keeps is to be freed at once, and not when the garbage
    # collector comes. (accelerate's hooks make one all the same.)
    pairs = [(copies[id(module)], module) for module in model.modules() if id(module) in copies and module is not model]
    pairs += [(new, owners[owner_id]) for owner_id, parts in replacements.items() for new in parts.values()]
    twin.__dict__["_copies"] = pairs
    twin.sirius_config = config
    twin.sites = sites
    twin.others = [getattr(owner, name) for owner, name in others]
    twin.kept = Kept(
        [module for module in twin.others if streaming_hook(module) is None],
        config.draft_dtype,
        kept_neuron_bytes(sites, config),
    )
    twin.is_offloaded = is_offloaded(model)
    twin.stats = GenerationStats(config.kernel_size, total=GenerationStats(config.kernel_size))
    return twin


def _copied(
    module: nn.Module, replacements: Mapping[int, dict[str, nn.Module]], copies: dict[int, nn.Module]
) -> nn.Module:
    """Returns the module with replacements, by the id of their owner, somewhere in it; itself where there are none."""
    if id(module) in copies or not any(id(submodule) in replacements for submodule in module.modules()):
        return copies.get(id(module), module)
    copies[id(module)] = twin = _shallow_copy(module)
    twin._modules = {name: child and _copied(child, replacements, copies) for name, child in module._modules.items()}
    for name, replacement in replacements.get(id(module), {}).items():
        twin.__dict__.pop(name, None)  # an activation may be a plain function
        twin._modules[name] = replacement
    return twin


@functools.cache
def _twin_class(model_class: type[PreTrainedModel]) -> type:
    # The name stays: pipelines and the like look classes up by it.
    return type(model_class.__name__, (SparseTwin, model_class), {"__module__": model_class.__module__})


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Returns a module of the same class over the same parameters and buffers, with hooks and submodules of its own."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        # `.to()` and `load_state_dict(assign=True)` put new tensors into these two dicts, which must reach the twin as
        # well.
        if isinstance(value, dict) and name.startswith("_") and name not in ("_parameters", "_buffers"):
            twin.__dict__[name] = value.copy()
    hook = twin.__dict__.pop("_hf_hook", None)
    # Accelerate's `forward` is bound to the original, whose dense code it would run.
    twin.__dict__.pop("forward", None)
    twin.__dict__.pop("_old_forward", None)
    if (forward := own_forward(module)) is not None:
        twin.__dict__["forward"] = types.MethodType(forward, twin)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        hook.init_hook = lambda module: module  # the weights are where they should be already
        add_hook_to_module(twin, hook)
        del hook.init_hook
    return twin
