"""Timing: dense and corrected generation in alternation, in one process, as medians and ratios."""

import os
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .assistant import make_sparse
from .config import SiriusConfig
from .evaluation import generator, problem_prompt
from .reasoner import reasoner_path, reasoner_problems


def widen(model: LlamaForCausalLM, hidden_factor: int, neuron_factor: int) -> LlamaForCausalLM:
    """Returns a larger model that computes the same logits, so that speed and acceptance are measured on one model.

    Hidden units and heads are repeated `hidden_factor` times, and neurons `neuron_factor` times; each product is
    divided by the number of times that its terms repeat. RMSNorm does not notice.

    Args:
        model: a Llama; if its head is tied to the embedding, the larger model has a head of its own.
        hidden_factor, neuron_factor: at least 1.
    """
    if hidden_factor < 1 or neuron_factor < 1:
        raise ValueError(f"the factors must be at least 1, got {hidden_factor} and {neuron_factor}")
    config = type(model.config).from_dict(model.config.to_dict())
    config.head_dim = model.model.layers[0].self_attn.head_dim
    config.hidden_size *= hidden_factor
    config.num_attention_heads *= hidden_factor
    config.num_key_value_heads *= hidden_factor
    config.intermediate_size *= neuron_factor
    config.tie_word_embeddings = False
    with torch.device("meta"):
        wide = type(model)(config)
    wide = wide.to(model.dtype).to_empty(device=model.device).eval()
    narrow_state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight}
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            weight = narrow_state[name]
            repeats = [new // old for new, old in zip(parameter.shape, weight.shape, strict=True)]
            is_product = weight.ndim == 2 and "embed_tokens" not in name
            parameter.copy_(weight.repeat(repeats) / (repeats[1] if is_product else 1))
    # Rotary frequencies are no parameters: they depend on head_dim alone.
    wide.model.rotary_emb = type(wide.model.rotary_emb)(config).to(model.device)
    wide.generation_config = model.generation_config
    return wide


class _Clock(BaseStreamer):
    """Notes when tokens arrive, to tell the prefill from the decoding."""

    def __init__(self):
        self.times: list[float] = []
        self.num_tokens = -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.num_tokens += 1 if len(self.times) == 1 else value.numel()

    def end(self) -> None:
        self.times.append(time.perf_counter())


def _synchronize(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _timed(generate, model, inputs: dict, max_new_tokens: int) -> tuple[torch.Tensor, dict[str, float]]:
    clock = _Clock()
    _synchronize(model)
    start = time.perf_counter()
    output = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    _synchronize(model)
    end = time.perf_counter()
    return output, {
        "num_tokens": clock.num_tokens,
        "seconds_to_first_token": clock.times[1] - start,
        "decode_seconds_per_token": (end - clock.times[1]) / max(1, clock.num_tokens - 1),
        "seconds": end - start,
        "seconds_per_token": (end - start) / clock.num_tokens,  # answers may differ in length below threshold=1.0
    }


def bench_decode(
    config: SiriusConfig,
    hidden_factor: int = 11,
    neuron_factor: int = 11,
    num_problems: int = 3,
    num_repeats: int = 3,
    max_new_tokens: int = 256,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Times the widened reasoner, dense and with a twin, in memory, on the problems with the longest answers.

    Both write every answer in turn, `num_repeats` times. `decode` counts from the first token on, which for the twin
    includes the gathering of its neurons; `whole` counts the prefill as well.

    Returns:
        dict: `machine`, `model`, `config`; `dense` and `sirius` with medians in seconds; `ratio_decode` and
        `ratio_whole`, the medians over pairs of sirius / dense; `num_identical` answers of `num_problems`; `stats`.
    """
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    narrow = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype=torch.float32)
    model = widen(narrow, hidden_factor, neuron_factor).to(device, dtype)
    prompts = _longest_problems(tokenizer, num_problems)
    runs: dict[str, list[dict]] = {"dense": [], "sirius": []}
    num_identical = 0
    with make_sparse(model, config) as sparse:
        generators = {"dense": generator(model), "sirius": generator(model, sparse)}
        generators["sirius"](**prompts[0].to(device), max_new_tokens=8, do_sample=False)  # warm-up
        sparse.stats.reset()
        for repeat in range(num_repeats):
            for prompt in prompts:
                outputs = {}
                for name, generate in generators.items():
                    outputs[name], run = _timed(generate, model, prompt.to(device), max_new_tokens)
                    runs[name].append(run)
                if repeat == 0:
                    num_identical += torch.equal(outputs["dense"], outputs["sirius"])
        stats = sparse.stats.total.as_dict()

    def ratio(key: str) -> float:
        return statistics.median(s[key] / d[key] for s, d in zip(runs["sirius"], runs["dense"], strict=True))

    return {
        "machine": describe_machine(device),
        "model": {"num_parameters": sum(p.numel() for p in model.parameters()), "dtype": str(dtype)},
        "config": config.to_dict(),
        **{name: {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]} for name in runs},
        "ratio_decode": ratio("decode_seconds_per_token"),
        "ratio_whole": ratio("seconds_per_token"),
        "num_identical": num_identical,
        "num_problems": len(prompts),
        "stats": stats,
    }


def _longest_problems(tokenizer: PreTrainedTokenizerBase, num_problems: int) -> list:
    problems = sorted(reasoner_problems(), key=lambda p: -len(tokenizer(p["answer"])["input_ids"]))
    return [tokenizer(problem_prompt(p["question"]), return_tensors="pt") for p in problems[:num_problems]]


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Returns what a reader needs to know of the machine that made a figure."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux
        return platform.processor() or platform.machine()
