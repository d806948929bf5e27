"""`make_sparse`: what it takes, and what it refuses."""

from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from ..draft.choice import CHOSEN, choose_draft
from ..draft.mixtures import check_experts, draft_of_experts
from ..draft.states import find_recurrence
from ..draft.tree_reading import check_tree
from ..draft.twin import build_twin
from ..model.accelerate_hooks import execution_device, is_offloaded, unloaded
from ..model.adapters import base_of_adapters, is_adapted
from ..model.encoder_decoder import text_inputs
from ..model.experts import ExpertsSite, find_experts
from ..model.observation import evaluating, uncompiled
from ..model.projections import is_opaque, is_projection
from ..model.sites import decoder_modules, find_mlps, find_projections
from ..model.unfit import check_fit
from ..settings.config import SiriusConfig, check_field_names
from ..settings.methods import method_class, method_of
from ..weights.formats import check_draft_dtype
from ..weights.offload import check_offload
from ..weights.shortlist import SHORTLIST, check_head
from .bond import bind
from .sparse_twin import SparseTwin, sparse_twin


# Tokens per cycle: the paper's, and where a verification has to stream the weights.
KERNEL_SIZE, OFFLOADED_KERNEL_SIZE = 16, 32


def make_sparse(model: PreTrainedModel, config: SiriusConfig | None = None, **fields: Any) -> SparseTwin:
    """Returns the contextually sparse twin of a language model, which drafts for it in stock `generate`. Of an
    encoder-decoder the decoder drafts.

        sparse = make_sparse(model, method="griffin", density=0.5)
        model.generate(**inputs, assistant_model=sparse)

    The twin is of the model's class and shares its weights; the model's modules and state dict stay as they are.
    The twin may be made inside the call, `model.generate(**inputs, assistant_model=make_sparse(model))`, and several
    twins of one model can live side by side. While any lives, the model has a class of the same name over its own; with
    the last one, be it that nobody holds it any more, it is as it was.

    What the calls share is kept with the model for its next twin: the casts that `draft_dtype` asks for, the graph of
    `compile_draft` and, of `griffin` on a CPU, the memory for gathered neurons that are not quantized.
    `twin.detach()`, the twin as a context manager, a twin of other settings, or the model's own end let go of it.

    Args:
        model: the dense model, with its weights loaded; of a `PeftModel` its base model is meant.
        config: the settings. Without them, and without any field that says what a draft is (such as `method`,
            `density` or `draft_dtype`), a draft is chosen that promises the least time per token on this machine: see
            `draft/choice.py`, and `twin.sirius_config` for what it is.
        fields: fields of the config, which win over those of `config` and over what is chosen.

    Raises:
        TypeError: if `model` is not a `PreTrainedModel` or `config` not a `SiriusConfig`.
        ValueError: for a value that is not allowed, a model without an MLP or experts of a known kind, one without its
            weights, one that is quantized and offloaded as well, quantized weights that cannot be read, a twin, a
            calibration of another model, a `draft_memory` too small, a draft or a model of which `compile_draft` can
            make no graph, or a `draft_dtype` that the device cannot run.
        ImportError: for a package that a `draft_dtype` needs.
        FileNotFoundError: if offloaded weights are gone.
    """
    model = base_of_adapters(model)
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise TypeError(
            "make_sparse takes a transformers model that can generate (such as AutoModelForCausalLM loads), got "
            f"{type(model).__name__}"
        )
    if isinstance(model, SparseTwin):
        raise ValueError("this model is a sparse twin already: call make_sparse on its dense_model")
    if config is not None and not isinstance(config, SiriusConfig):
        raise TypeError(
            f"config must be a SiriusConfig, got {type(config).__name__}: use SiriusConfig.from_dict or "
            "from_pretrained, or pass fields by name"
        )
    check_field_names(fields)
    is_chosen = config is not None or any(name in CHOSEN for name in fields)
    config = (config or SiriusConfig()).replace(**fields)
    check_fit(model)
    offloaded = is_offloaded(model)
    if (name := next(unloaded(model), None)) is not None:
        raise ValueError(
            f"{type(model).__name__} has parameters on the meta device, of which nothing loads the weights (the first "
            f"is {name}): load them with from_pretrained; adapters before accelerate offloads the model"
        )
    _prepare_quantized(model, offloaded)
    if offloaded:
        check_offload(model)
    recurrence = find_recurrence(model)
    sites = find_mlps(model)
    if offloaded and any(is_adapted(part) for site in sites for part in site.parts):
        raise ValueError(
            f"the MLPs of this {type(model).__name__} have adapters, and accelerate offloads it: merge them before, "
            "with merge_and_unload() of the PeftModel"
        )
    experts, _ = find_experts(model, decoder_modules(model))
    if not is_chosen:
        if experts:
            chosen = draft_of_experts(experts, OFFLOADED_KERNEL_SIZE if offloaded else None)
        else:
            chosen = choose_draft(model, sites, OFFLOADED_KERNEL_SIZE)
        config = config.replace(**{**chosen, **fields})
        if config.compile_draft and not _can_compile(config, experts):
            config = config.replace(density=1.0)
    check_experts(model, config, sites, experts, offloaded)
    holds_part = method_of(config).gathers or (experts and config.method == "experts")
    if offloaded and config.density < 1 and config.draft_dtype is None and not holds_part:
        raise ValueError(
            f"{type(model).__name__} is offloaded by accelerate: a draft of method={config.method!r}, which gathers no "
            "neurons, has to hold all of it. Use method='griffin', whose neurons alone stay resident, or a "
            "draft_dtype, such as 'int4', in which all may fit"
        )
    if config.kernel_size is None:
        # Below a threshold of 1 the output would depend on the clock.
        unstreamed = "auto" if config.threshold == 1.0 else KERNEL_SIZE
        config = config.replace(kernel_size=OFFLOADED_KERNEL_SIZE if offloaded else unstreamed)
    check_draft_dtype(config.draft_dtype, execution_device(model))
    if config.draft_head == SHORTLIST:
        check_head(model)
    if config.compile_draft:
        _check_compiled(model, config, experts)
    if config.tree_width > 1 and recurrence is not None:
        raise ValueError(
            f"{type(model).__name__} keeps states, which cannot branch with a tree's continuations: use tree_width=1"
        )
    if config.tree_width > 1:
        check_tree(model)
    if config.calibration is not None:
        acts_on = method_class(config.method).acts_on
        config.calibration.check_model(sites if acts_on == "mlps" else find_projections(model))
    twin = build_twin(model, config, sites)
    user = sparse_twin(twin, model)
    bind(user, twin.kept.bag, model)
    return user


def repeatable(config: SiriusConfig) -> SiriusConfig:
    """Returns the config with a `kernel_size` where it has none, for a model that is not offloaded: by default it might
    be `"auto"`, which goes by the clock, and the same text or the same measures are to come again.
    """
    return config.replace(kernel_size=KERNEL_SIZE) if config.kernel_size is None else config


def _can_compile(config: SiriusConfig, experts: list[ExpertsSite]) -> bool:
    """Whether a graph has a place for what a method does."""
    method = method_of(config)
    return method.is_steady or (method.chooses_in_graphs and not experts)


def _check_compiled(model: PreTrainedModel, config: SiriusConfig, experts: list[ExpertsSite]) -> None:
    """Raises `ValueError` unless the step of such a draft can be compiled."""
    if not _can_compile(config, experts):
        within = " within experts" if experts else ""
        raise ValueError(
            f"method={config.method!r} at a density of {config.density} chooses anew for every token{within}, which is "
            "not compiled: use method='griffin' or density=1.0, or leave compile_draft out"
        )
    if model.config.is_encoder_decoder:
        raise ValueError("the step of an encoder-decoder's draft cannot be compiled: leave compile_draft out")
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if not model._can_compile_fullgraph or "chunked_attention" in layer_types:
        raise ValueError(f"a step of {type(model).__name__} cannot be compiled as a whole: leave compile_draft out")


def _prepare_quantized(model: PreTrainedModel, offloaded: bool) -> None:
    method = getattr(model, "quantization_method", None)
    # A GGUF file may have been dequantized as it was loaded, and torchao may have been laid over a loaded model.
    is_packed = any(is_projection(module) and is_opaque(module) for module in model.modules())
    if offloaded and (is_packed or method == QuantizationMethod.BITS_AND_BYTES):
        library = "a library" if method is None else getattr(method, "value", method)
        raise ValueError(
            f"{type(model).__name__} is quantized by {library} and offloaded as well, which is not supported: "
            "offload the unquantized model, with a draft_dtype of 8 or 4 bits for a small draft"
        )
    if is_packed:
        # Libraries may unpack or move what their layers hold in the first forward, which the twin is to see.
        token_id = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        with torch.no_grad(), evaluating(model), uncompiled(model):
            model(**text_inputs(model, token_id), use_cache=False)
