"""`make_sparse`: builds a twin and lets stock `model.generate(..., assistant_model=twin)` find its way to it.

Three methods are laid over the dense *instance*, and taken off again with its last twin. `generate` opens the call, so
that everything the call leaves on modules is gone when it ends, however it ends. `_get_stopping_criteria` and
`_get_candidate_generator` are private to transformers and used nowhere else; tests/test_assistant.py fails loudly if
their signatures change.
"""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin, PreTrainedModel, SynthIDTextWatermarkLogitsProcessor
from transformers.utils.quantization_config import QuantizationMethod

from .call import Call
from .compat import IS_5_17, SettledCriteria
from .config import SiriusConfig, check_field_names
from .drafting import SiriusCandidateGenerator
from .mlp import find_mlps
from .offload import check_offload
from .quantization import check_draft_dtype
from .streaming import execution_device, is_offloaded
from .tree import check_tree
from .tree_drafting import TreeCandidateGenerator
from .twin import SparseTwin, build_twin, check_batch_size


# Tokens per cycle: the paper's, and where a verification has to stream the weights.
KERNEL_SIZE, OFFLOADED_KERNEL_SIZE = 16, 32

# dense model -> its twins
_attached: "weakref.WeakKeyDictionary[PreTrainedModel, weakref.WeakSet]" = weakref.WeakKeyDictionary()


def make_sparse(model: PreTrainedModel, config: SiriusConfig | None = None, **fields: Any) -> SparseTwin:
    """Returns the contextually sparse twin of a causal language model, which drafts for it in stock `generate`.

        sparse = make_sparse(model, method="griffin", density=0.5)
        model.generate(**inputs, assistant_model=sparse)

    The twin is of the model's class and shares its weights; the model's modules and state dict stay as they are.
    Several twins of one model can live side by side. `twin.detach()`, or the twin as a context manager, takes the bond
    back. Until then a twin keeps what its calls share: the projections that `draft_scope="all"` casts and, of `griffin`
    on a CPU, the memory for gathered neurons that are not quantized.

    Args:
        model: the dense model, with its weights loaded.
        config: the settings; `SiriusConfig()` by default.
        fields: fields of the config, which win over those of `config`.

    Raises:
        `TypeError` if `model` is not a `PreTrainedModel` or `config` not a `SiriusConfig`; `ValueError` for a value
        that is not allowed, a model without an MLP of a known kind, one without its weights, one quantized other than
        by bitsandbytes, a twin, a calibration of another model, a `draft_memory` too small, or a `draft_dtype` that
        the device cannot run; `ImportError` for a package that a `draft_dtype` needs; `FileNotFoundError` if offloaded
        weights are gone.
    """
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
    config = (config or SiriusConfig()).replace(**fields)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; hf_sirius takes decoder-only language models"
        )
    offloaded = is_offloaded(model)
    if not offloaded and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has parameters on the meta device: load its weights first, with from_pretrained"
        )
    _check_quantization(model, offloaded)
    if offloaded and config.method != "griffin":
        raise ValueError(
            f"{type(model).__name__} is offloaded by accelerate: a draft of method={config.method!r} would have to "
            "stream it for every token. Use method='griffin', whose neurons stay resident"
        )
    if offloaded:
        check_offload(model)
    check_draft_dtype(config.draft_dtype, execution_device(model))
    if config.kernel_size is None:
        config = config.replace(kernel_size=OFFLOADED_KERNEL_SIZE if offloaded else KERNEL_SIZE)
    sites = find_mlps(model)
    if config.tree_width > 1:
        check_tree(model)
    if config.calibration is not None:
        config.calibration.check_model(sites)
    twin = build_twin(model, config, sites)
    for name in _OVERLAYS:
        twin.__dict__.pop(name, None)  # bound to the dense model
    _attach(twin)
    return twin


def _check_quantization(model: PreTrainedModel, offloaded: bool) -> None:
    if not getattr(model, "is_quantized", False):
        return
    method = getattr(model, "quantization_method", None)
    if method != QuantizationMethod.BITS_AND_BYTES:
        raise ValueError(
            f"{type(model).__name__} is quantized by {getattr(method, 'value', method)}, of which hf_sirius cannot "
            "take neurons: load it with BitsAndBytesConfig (8 or 4 bits), or without quantization and with a "
            "draft_dtype of griffin's"
        )
    if offloaded:
        raise ValueError(
            f"{type(model).__name__} is quantized by bitsandbytes and offloaded as well, which is not supported: "
            "offload the unquantized model, with draft_dtype='int8' or 'nf4' for a small draft"
        )


def _attach(twin: SparseTwin) -> None:
    model = twin.dense_model
    if model not in _attached:
        _attached[model] = weakref.WeakSet()
        for name, overlay in _OVERLAYS.items():
            covered = model.__dict__.get(name)
            if _is_overlay(covered):
                covered = None  # a deep copy of a model with twins comes with overlays, which cover nothing
            # What is covered is kept on the overlay, to be freed with the model.
            laid = functools.update_wrapper(functools.partial(overlay, covered), getattr(type(model), name))
            model.__dict__[name] = types.MethodType(laid, model)
    _attached[model].add(twin)


def detach(twin: SparseTwin) -> None:
    """Takes the bond between a twin and its dense model back; the last twin's end puts the instance back as it was."""
    twin.kept.clear()
    model = twin.dense_model
    twins = _attached.get(model, weakref.WeakSet())
    twins.discard(twin)
    if model in _attached and not twins:
        del _attached[model]
        for name in _OVERLAYS:
            overlay = model.__dict__.get(name)
            if not _is_overlay(overlay):
                continue  # somebody has laid another method over ours since: it stays
            del model.__dict__[name]
            if (covered := overlay.__func__.args[0]) is not None:
                model.__dict__[name] = covered


def _is_overlay(method: Any) -> bool:
    function = getattr(method, "__func__", None)
    return isinstance(function, functools.partial) and function.func in _OVERLAYS.values()


def _drafts_for(twin: Any, model: PreTrainedModel) -> bool:
    return isinstance(twin, SparseTwin) and model in _attached and twin in _attached[model]


# The overlays. `covered` is what stood in the instance's __dict__ before, if anything did.


def _generate(covered: Callable | None, model: PreTrainedModel, *args, **kwargs):
    generate = covered or types.MethodType(type(model).generate, model)
    twin = kwargs.get("assistant_model", args[6] if len(args) > 6 else None)
    if not _drafts_for(twin, model):
        return generate(*args, **kwargs)
    for prompt in (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))):
        check_batch_size(prompt)
    with twin.new_call():
        return generate(*args, **kwargs)


def _get_stopping_criteria(covered: Callable | None, model: PreTrainedModel, *args, **kwargs):
    criteria = (covered or types.MethodType(type(model)._get_stopping_criteria, model))(*args, **kwargs)
    call = Call.current()
    # A later one is of a dense call within this call, such as a processor may make.
    if call is not None and call.model is model and call.stopping_criteria is None:
        call.stopping_criteria = criteria
        if IS_5_17:
            return SettledCriteria(criteria, call)
    return criteria


def _get_candidate_generator(
    covered: Callable | None,
    model: PreTrainedModel,
    generation_config,
    input_ids,
    inputs_tensor,
    logits_processor,
    model_kwargs,
    assistant_model=None,
    **kwargs,
):
    if not _drafts_for(assistant_model, model):
        return (covered or types.MethodType(type(model)._get_candidate_generator, model))(
            generation_config=generation_config, input_ids=input_ids, inputs_tensor=inputs_tensor,
            logits_processor=logits_processor, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs,
        )  # fmt: skip
    if generation_config.assistant_ensemble_weight is not None:
        raise ValueError(
            "assistant_ensemble_weight blends the draft's probabilities into the model's, while a sparse twin is "
            "verified by its likelihood threshold: leave assistant_ensemble_weight out and lower SiriusConfig.threshold"
        )
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale={generation_config.guidance_scale} runs the model over a KV-cache of its own, in which "
            "drafts cannot be undone: leave guidance_scale out, or generate without the twin"
        )
    if any(isinstance(processor, SynthIDTextWatermarkLogitsProcessor) for processor in logits_processor):
        raise ValueError(
            "SynthID's watermark counts every token that it is asked about, of which some are rolled back: use a "
            "WatermarkingConfig, which counts none, or generate without the twin"
        )
    if (call := Call.current()) is None or call.model is not model:
        raise ValueError(
            "generate was looked up before make_sparse laid its own over it, as in model.generate(..., "
            "assistant_model=make_sparse(model)): make the twin first, on a line of its own, and call model.generate "
            "then"
        )
    config = assistant_model.sirius_config
    if config.tree_width > 1 and generation_config.do_sample:
        raise ValueError(
            f"tree_width={config.tree_width} was given with do_sample=True, but a tree keeps the likeliest of its "
            "branches, which would skew the distribution: use tree_width=1 to sample, or do_sample=False (a pipeline "
            "samples unless it is told so)"
        )
    generator_class = TreeCandidateGenerator if config.tree_width > 1 else SiriusCandidateGenerator
    return generator_class(assistant_model, call, generation_config, logits_processor)


_OVERLAYS = {
    "generate": _generate,
    "_get_stopping_criteria": _get_stopping_criteria,
    "_get_candidate_generator": _get_candidate_generator,
}
