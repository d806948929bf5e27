"""How the thresholds of cats and teal are measured on a corpus."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from tqdm.auto import tqdm

from ..model.encoder_decoder import text_input
from ..model.observation import evaluating, observing
from ..model.sites import find_mlps, find_projections
from ..settings.calibration import CALIBRATED_DENSITIES, Calibration, probe_weights
from ..settings.config import SiriusConfig
from ..settings.fields import rules
from ..settings.methods import check_method_name, method_class, owners_of
from ..weights.draft_modules import TwinModule
from .base import TwinActivation
from .budgets import MAX_TOKENS, check_blocks, greedy_budgets
from .cutoffs import MagnitudeHistogram
from .scores import InputScores


@torch.no_grad()
def calibrate(
    model: nn.Module,
    tokenizer,
    texts: Iterable,
    *,
    method: str = "cats",
    weighting: str = "magnitude",
    budget: str = "uniform",
    max_length: int = 512,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Measures a model on a corpus, for `SiriusConfig(method="cats", calibration=...)`: |act(gate_proj x)|, or for
    `method="teal"` the scores of the inputs of all projections.

    The texts are read one at a time and only histograms are kept, so the memory needed does not grow with the corpus.
    With `budget="greedy"` the first 128 tokens are read again, and each block runs on them a few hundred times.

    Args:
        model: the dense model, loaded and on its device.
        tokenizer: the model's tokenizer. It may be `None` if every item of `texts` holds token ids already.
        texts: strings, or items with `input_ids` of shape [length] or [1, length] (such as those of
            `optimum.gptq.data.get_dataset`). Of an encoder-decoder an item has `decoder_input_ids`, the text, and what
            the encoder reads, as the model's forward takes it.
        method: the method that it is for, `"cats"` or `"teal"`.
        weighting: that of the config, for teal.
        budget: `"greedy"` measures for teal how many inputs each projection can do without as well (see
            `SiriusConfig.budget`); the calibration then serves both budgets.
        max_length: longer texts are cut to this many tokens.
        max_tokens: stop after this many tokens; all texts are read without it.
        progress: whether to show a progress bar.

    Raises:
        TypeError: for a single string, for text without a tokenizer, or text alone for an encoder-decoder.
        ValueError: if the corpus has no token, the model activations that are not finite, no known MLP or, for greedy
            budgets, blocks that do not run by themselves, or for options that do not go together.
    """
    _check_options(method, weighting, budget)
    if budget == "greedy" and model.config.is_encoder_decoder:
        raise ValueError("budget='greedy' is for decoder-only models: calibrate with budget='uniform'")
    minimum, why = 1, ""
    if budget == "greedy":
        minimum, why = 2, ", as budget='greedy' compares what follows the first token of a text"
    for name, value in (("max_length", max_length), ("max_tokens", max_tokens)):
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}{why}, got {value}")
    if isinstance(texts, Mapping):
        raise TypeError("texts must be an iterable of texts, got a single encoding: pass [encoding]")
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of texts, got a single string: pass [text], or its lines")
    if any(isinstance(module, (TwinModule, TwinActivation)) for module in model.modules()):
        raise ValueError("calibrate measures the dense model, got its sparse twin: pass twin.dense_model")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has weights that are not loaded, or offloaded by accelerate: calibrate the model "
            "where it is loaded, or use griffin, which needs no calibration"
        )
    acts_on, observed = method_class(method).acts_on, method_class(method).observed
    sites = find_mlps(model) if acts_on == "mlps" else find_projections(model)
    if not sites:
        raise ValueError(
            f"all MLPs of {type(model).__name__} are experts, whose thresholds are always those of the prompt: leave "
            "the calibration out"
        )
    scores = InputScores(sites, weighting) if acts_on == "projections" else lambda _, values: values
    histograms = [MagnitudeHistogram() for _ in sites]
    num_texts, num_tokens, ids_name = 0, 0, text_input(model, "input_ids")
    sample: list[torch.Tensor] = []  # the first tokens of the corpus

    def count(site, values: torch.Tensor) -> None:
        if not values.isfinite().all():
            raise ValueError(
                f"{site.name} has activations that are not finite, in {str(values.dtype).removeprefix('torch.')}: load "
                "the model in bfloat16 or float32, or check its weights"
            )
        histograms[site.idx].add(scores(site.idx, values))

    with evaluating(model), tqdm(total=max_tokens, unit="token", disable=not progress, desc="calibrating") as bar:
        for text in texts:
            length = max_length if max_tokens is None else min(max_length, max_tokens - num_tokens)
            beside = _beside(model, text)
            input_ids = _input_ids(beside.pop(ids_name) if beside else text, tokenizer)[:, :length]
            if input_ids.shape[1]:
                inputs = {name: value.to(model.device) for name, value in {**beside, ids_name: input_ids}.items()}
                with observing(model, sites, observed, count):
                    model.base_model(**inputs, use_cache=False)
                if budget == "greedy" and num_tokens < MAX_TOKENS:
                    if not sample:  # told before all of the corpus is read
                        check_blocks(model, sites, input_ids[:, :MAX_TOKENS])
                    sample.append(input_ids[:, : MAX_TOKENS - num_tokens].clone())  # the text itself is let go
                num_texts += 1
                num_tokens += input_ids.shape[1]
                bar.update(input_ids.shape[1])
            if max_tokens is not None and num_tokens >= max_tokens:
                break
    if not num_tokens:
        raise ValueError("the corpus holds no token: pass at least one text that is not empty")
    table = torch.stack([h.quantiles([1 - d for d in CALIBRATED_DENSITIES]).cpu() for h in histograms])
    budgets = None
    if budget == "greedy":
        with evaluating(model):
            budgets = greedy_budgets(model, sites, sample, table, scores, progress)
    metadata = {
        "method": method,
        "weighting": weighting,
        "model_class": type(model).__name__,
        "name_or_path": getattr(model.config, "_name_or_path", ""),
        f"num_{acts_on}": len(sites),
        "num_texts": num_texts,
        "num_tokens": num_tokens,
    }
    return Calibration(table, probe_weights(sites), metadata, budgets)


def _check_options(method: str, weighting: str, budget: str) -> None:
    check_method_name(method)
    if method not in (allowed := owners_of("calibration")):
        raise ValueError(f"method={method!r} needs no calibration: calibrate for one of {allowed}")
    SiriusConfig(method=method, weighting=weighting)
    rules()["budget"].check("budget", budget)
    if budget != "uniform" and method not in (allowed := owners_of("budget")):
        raise ValueError(f"budget belongs to one of {allowed}, got method={method!r}: leave it out, or use one of them")


def _beside(model: nn.Module, text) -> dict[str, torch.Tensor]:
    """Returns the inputs of an encoder-decoder, the text included; of another model none."""
    if not model.config.is_encoder_decoder:
        return {}
    if not isinstance(text, Mapping) or "decoder_input_ids" not in text or len(text) < 2:
        given = sorted(text) if isinstance(text, Mapping) else type(text).__name__
        raise TypeError(
            f"{type(model).__name__} is an encoder-decoder: an item of texts must map decoder_input_ids, and "
            f"what the encoder reads (such as input_ids or input_features), got {given}"
        )
    return {name: torch.as_tensor(value) for name, value in text.items()}


def _input_ids(text, tokenizer) -> torch.Tensor:
    """Returns the token ids of one item of a corpus, long [1, length]."""
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("texts holds strings, so a tokenizer is needed; without one, pass items with input_ids")
        return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()
    try:
        input_ids = torch.as_tensor(text["input_ids"] if isinstance(text, Mapping) else text)
        if input_ids.ndim == 0:
            raise TypeError("a single number")
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"an item of texts must be a string, token ids, or a mapping with input_ids, got {type(text).__name__}"
        ) from error
    return input_ids.long().reshape(1, -1)
