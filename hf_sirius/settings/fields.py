"""The fields that a user may set, what each may be, its default and its help. No import here takes long, so that the
command line can tell what is wrong at once.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .methods import check_method_name, did_you_mean, owners_of


if TYPE_CHECKING:
    import torch

    from .calibration import Calibration

CONFIG_NAME = "sirius_config.json"  # in which they are saved
DRAFT_DTYPES = ("bfloat16", "float16", "int8", "int4", "nf4")
_Fields = TypeVar("_Fields", bound="Fields")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field may be, for the checks, the command line and the harness."""

    kind: type  # `float`, `int`, `str` or `bool`
    allowed: str = ""  # the range of a number, in words
    is_allowed: Callable[[Any], bool] = lambda value: True  # whether a number lies in it
    choices: tuple[str, ...] = ()  # the strings that are allowed
    words: tuple[str, ...] = ()  # what it may be in place of a number
    is_optional: bool = False  # whether it may be `None`
    check_list: Callable[[str, Sequence], None] | None = None  # what checks a list of numbers, where it may be one
    help: str = ""  # what it means, in a sentence

    def check(self, name: str, value: Any) -> None:
        """Raises `TypeError` or `ValueError` unless the field may have this value."""
        if (value is None and self.is_optional) or (isinstance(value, str) and value in self.words):
            return
        if self.check_list is not None and isinstance(value, (list, tuple)):
            self.check_list(name, value)
        elif self.choices:
            if value not in self.choices:
                allowed = [*(["None"] if self.is_optional else []), *map(repr, self.choices)]
                hint = did_you_mean(value, self.choices) if isinstance(value, str) else ""
                raise ValueError(f"{name} must be one of [{', '.join(allowed)}], got {value!r}{hint and '.' + hint}")
        elif self.kind is bool:
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        elif self.kind is not str:
            kinds = (int, float) if self.kind is float else int
            if isinstance(value, bool) or not isinstance(value, kinds):
                what = " or ".join([self.expected, *(["None"] if self.is_optional else [])])
                raise TypeError(f"{name} must be {what}, a number {self.allowed}, got {value!r}")
            if not math.isfinite(value) or not self.is_allowed(value):
                raise ValueError(f"{name} must be {self.allowed}, got {value!r}")

    @property
    def expected(self) -> str:
        """Returns what a value is, in words."""
        kinds = {float: "a number", int: "an int", str: "a text", bool: "true or false"}
        return " or ".join([kinds[self.kind], *map(repr, self.words)])

    def read(self, text: str) -> Any:
        """Returns the value that a text stands for. Raises `ValueError` for one that is no number where it must be."""
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[text.lower()]
            return text if text in self.words else self.kind(text)
        except (ValueError, KeyError) as error:
            raise ValueError(f"must be {self.expected}, got {text!r}") from error


def _field(default: Any, kind: type, *args: Any, **kwargs: Any) -> Any:
    rule = Rule(kind, *args, is_optional=default is None, **kwargs)
    return dataclasses.field(default=default, metadata={"rule": rule})


def _check_sizes(name: str, sizes: Sequence) -> None:
    """Raises `TypeError` or `ValueError` unless these are tokens of cycles, as `stats.kernel_sizes` notes them."""
    told = f"{name} as a list has an int for each cycle, its tokens (below -1 they are looked up), got {list(sizes)}"
    if not sizes:
        raise ValueError(f"{told}: stats.kernel_sizes has those of the latest call")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{told}, where {size!r} is none")
        if size in (0, -1):
            raise ValueError(f"{told}: 1 stands for a cycle without a draft, and not {size}")


@dataclasses.dataclass(frozen=True)
class Fields:
    """The settings of a sparse twin and of its correction. Frozen: `config.replace(density=0.3)` derives others.

    Args:
        method (`str`, defaults to `"cats"`):
            What a draft keeps: `"cats"` neurons per token, by |act(gate_proj x)| (fine-grained; FSparse in the paper),
            `"griffin"` neurons once per prompt, from the prefill's activations (coarse-grained; CSparse in the paper),
            `"teal"` per token the largest inputs of every projection of attention and MLPs, `"experts"` of a mixture of
            experts fewer of those that each token is given. The first three act inside experts as well.
        density (`float`, defaults to 0.5):
            Share of the neurons of each MLP (of `"teal"` of the inputs of each projection, of `"experts"` of a token's
            experts, at least one) that a draft step keeps, in (0, 1]. At 1 nothing is dropped, whatever the method: a
            draft is then its `draft_dtype` alone.
        kernel_size (`int`, `str` or a list of `int`, *optional*):
            Tokens per cycle, at least 2, of which all but one are drafted, or `"auto"`, which chooses them anew for
            each cycle. By default `"auto"` at `threshold=1.0` and 16 below; 32 for a model that accelerate offloads,
            where a verification costs more. The twin's own config tells which default it was. `"auto"` drafts as many
            as promise the least time per token, by what steps took and how many tokens were kept so far, and none where
            a dense step takes less (`decode/controller.py`). At `threshold=1.0` greedy outputs do not depend on it;
            below, and when sampling with a seed, they do. A list, such as `stats.kernel_sizes` of another call, gives
            the tokens of each cycle, so that they come again: 1 drafts nothing, negative numbers are looked up in the
            text, and the last one stays to the end of the call.
        threshold (`float`, defaults to 0.1):
            A drafted token is kept if it is the full model's argmax or its likelihood is at least this, in [0, 1]; 1
            gives the full model's output, token for token when greedy, the same distribution when sampling.
        temperature (`float`, defaults to 0.6):
            Temperature of the softmax in which that likelihood is read. Greater than 0.
        selection (`str`, defaults to `"threshold"`):
            `"threshold"` keeps a neuron while it exceeds its layer's threshold (from `calibration`, or else from the
            prompt), so that the share kept varies by token; `"topk"` the largest share of each token. For `"cats"`.
        calibration ([`Calibration`], *optional*):
            The thresholds that `calibrate` measured on a corpus; on the command line their directory. For `"cats"` and
            `"teal"`, measured for that very method and `weighting`. Saved and loaded with the config.
        weighting (`str`, defaults to `"magnitude"`):
            By what inputs are compared: `"magnitude"` their own, `"column"` times the norm of the column of the weight
            that they are multiplied with (WINA). For `"teal"`.
        budget (`str`, defaults to `"uniform"`):
            How inputs are shared out: `"uniform"` keeps the same share for each projection, `"greedy"` a larger one
            where a block's output needs it most, by a `calibration` that measured it. For `"teal"`.
        draft_dtype (`str` or `torch.dtype`, *optional*):
            Dtype of the weights that a draft reads, `"bfloat16"`, `"float16"`, `"int8"`, `"int4"` or `"nf4"`; by
            default the model's own format (which `"griffin"` dequantizes where another library than bitsandbytes has
            quantized the model). Fewer bytes to read, at a less faithful draft; the verification is the
            model's own all the same. `"int8"` has a scale for each 64 inputs on a CPU with numba (`pip install
            hf_sirius[cpu]`), one for each output without, and is bitsandbytes' elsewhere; `"int4"` has a scale and a
            zero point for each 32 inputs, and leaves the head in 8 bits where these run. `"nf4"` is bitsandbytes'
            (`pip install hf_sirius[bnb]`).
        draft_scope (`str`, defaults to `"all"`):
            What `draft_dtype` casts: `"all"` every projection of the draft, `"mlp"` the MLPs alone (of `"griffin"` the
            gathered neurons). Of what is not gathered the twin keeps copies, which are made anew when the weights
            change.
        draft_head (`str`, defaults to `"full"`):
            How a draft scores the vocabulary: `"full"` by the whole head, `"shortlist"` by a sketch of a quarter of its
            columns, and the likeliest fiftieth of the tokens by the model's own head. For large vocabularies; a sampled
            draft draws from these scores, so the output's distribution stays.
        draft_memory (`int` or `str`, *optional*):
            The most bytes that a draft's own weights may take, such as `6 * 2**30` or `"6GiB"`. Of an
            offloaded model, modules outside the MLPs stay resident as far as this allows; by default all do.
        draft_confidence (`float`, defaults to 0.0):
            A draft ends after a token that the twin itself finds less likely than this (softmax(l / temperature) of its
            own processed logits), in [0, 1), so that a hopeless tail is not drafted. 0 drafts `kernel_size - 1` tokens
            always.
        reselect_every (`int`, *optional*):
            Choose the neurons anew after every so many cycles, from the activations of the prompt and of all
            verifications so far. For `"griffin"`; by default the prompt alone decides.
        tree_width (`int`, defaults to 1):
            Continuations that a draft carries on, 1 to 16; the full model reads them all in one forward and keeps the
            longest acceptable one. 1 drafts a single one.
        branch_cutoff (`float`, defaults to 0.95):
            Where the twin finds a token at least this likely, a tree does not branch, in [0, 1].
        compile_draft (`bool`, defaults to `False`):
            Compile the draft step and the verification by `torch.compile`, in the first call: minutes, and about one
            where torch's cache on disk has them. For drafts without a tree; within the experts of a mixture for those
            that choose nothing anew for every token: of `"griffin"`, and of any method at a density of 1.
    """

    method: str = _field("cats", str)
    density: float = _field(0.5, float, "in (0, 1], the share of neurons to keep", lambda value: 0 < value <= 1)
    kernel_size: int | str | Sequence[int] | None = _field(
        None, int, "at least 2: one drafted token and one of the full model (without drafts call model.generate alone)",
        lambda value: value >= 2, words=("auto",), check_list=_check_sizes,
    )  # fmt: skip
    threshold: float = _field(0.1, float, "in [0, 1], a likelihood", lambda value: 0 <= value <= 1)
    temperature: float = _field(0.6, float, "greater than 0", lambda value: value > 0)
    selection: str = _field("threshold", str, choices=("threshold", "topk"))
    calibration: "Calibration | None" = _field(None, str)
    weighting: str = _field("magnitude", str, choices=("magnitude", "column"))
    budget: str = _field("uniform", str, choices=("uniform", "greedy"))
    draft_dtype: "str | torch.dtype | None" = _field(None, str, choices=DRAFT_DTYPES)
    draft_scope: str = _field("all", str, choices=("all", "mlp"))
    draft_head: str = _field("full", str, choices=("full", "shortlist"))
    draft_memory: int | str | None = _field(None, str)
    draft_confidence: float = _field(0.0, float, "in [0, 1), a likelihood", lambda value: 0 <= value < 1)
    reselect_every: int | None = _field(
        None, int, "at least 1 (cycles; None never chooses anew)", lambda value: value >= 1
    )
    tree_width: int = _field(1, int, "in 1 to 16 (1 drafts no tree)", lambda value: 1 <= value <= 16)
    branch_cutoff: float = _field(0.95, float, "in [0, 1], a likelihood", lambda value: 0 <= value <= 1)
    compile_draft: bool = _field(False, bool)

    def __post_init__(self):
        check_method_name(self.method)
        if type(self.draft_dtype).__module__ == "torch":  # a torch.dtype
            object.__setattr__(self, "draft_dtype", str(self.draft_dtype).removeprefix("torch."))
        for field in dataclasses.fields(self):
            field.metadata["rule"].check(field.name, getattr(self, field.name))
        if isinstance(self.kernel_size, list):
            object.__setattr__(self, "kernel_size", tuple(self.kernel_size))
        if self.calibration is not None:
            from .calibration import Calibration

            if not isinstance(self.calibration, Calibration):
                raise TypeError(
                    f"calibration must be a hf_sirius.Calibration, got {type(self.calibration).__name__}. "
                    "Make one with hf_sirius.calibrate(...) or load it with Calibration.from_pretrained(...)."
                )
        for field in dataclasses.fields(self):
            owners = owners_of(field.name)
            if owners and self.method not in owners and getattr(self, field.name) != field.default:
                told = " or ".join(f"method={owner!r}" for owner in owners)
                raise ValueError(
                    f"{field.name} belongs to {told}, but the method is {self.method!r}: leave it out, or use {told} "
                    "(with_method changes the method of a config, and drops such fields)"
                )
        if self.draft_scope == "mlp" and self.draft_dtype is None:
            raise ValueError(
                f"draft_scope={self.draft_scope!r} says what draft_dtype casts, but draft_dtype is None: set it to one "
                f"of {list(DRAFT_DTYPES)}, or leave draft_scope out"
            )
        if self.compile_draft and self.tree_width > 1:
            raise ValueError(
                f"compile_draft compiles a step of one token, but tree_width is {self.tree_width}: use 1, or leave "
                "compile_draft out"
            )
        if self.draft_memory is not None:
            memory_bytes(self.draft_memory)
        if self.selection == "topk" and self.calibration is not None:
            raise ValueError(
                "selection='topk' needs no thresholds: leave calibration out, or use selection='threshold'"
            )
        self._check_calibration()

    def _check_calibration(self) -> None:
        """Raises `ValueError` unless the calibration, if there is one, has what the other fields need."""
        if self.calibration is None:
            if self.budget != "uniform":
                raise ValueError(
                    f"budget={self.budget!r} needs a calibration that measured it, got none: pass "
                    f"calibration=hf_sirius.calibrate(..., method={self.method!r}, weighting={self.weighting!r}, "
                    f"budget={self.budget!r}), or use budget='uniform'"
                )
            return
        measured = (self.calibration.method, self.calibration.weighting)
        if measured != (self.method, self.weighting):
            raise ValueError(
                "the calibration was measured for method={!r} and weighting={!r}, but the config has method={!r} and "
                "weighting={!r}: use those, or calibrate with hf_sirius.calibrate(..., method={!r}, weighting={!r})"
                .format(*measured, self.method, self.weighting, self.method, self.weighting)
            )  # fmt: skip
        self.calibration.check_budget(self.budget)

    def replace(self: _Fields, **fields: Any) -> _Fields:
        """Returns a copy with the given fields changed, validated anew."""
        check_field_names(fields)
        return dataclasses.replace(self, **fields)

    def with_method(self: _Fields, method: str, **fields: Any) -> _Fields:
        """Returns a copy for another method, without the fields that belong to the one it had."""
        check_method_name(method)
        # A calibration belongs to one method alone, though several take one.
        owned = [f for f in dataclasses.fields(self) if owners_of(f.name)] if method != self.method else []
        return self.replace(method=method, **{**{f.name: f.default for f in owned}, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values; a calibration is left out, as it has a file of its own."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "calibration"}


def rules() -> dict[str, Rule]:
    """Returns the rule of each field, whose help is the first sentence on it above."""
    told = re.findall(r"^ +(\w+) \([^\n]*\):\n +(.*?)\.\s", Fields.__doc__ or "", re.DOTALL | re.MULTILINE)
    helps = {name: " ".join(sentence.replace("`", "").split()) for name, sentence in told}
    return {
        field.name: dataclasses.replace(field.metadata["rule"], help=helps.get(field.name, ""))
        for field in dataclasses.fields(Fields)
    }


def check_value(name: str, value: Any) -> None:
    """Raises `TypeError` or `ValueError` unless a field may have this value."""
    if name == "method":
        check_method_name(value)
    else:
        rules()[name].check(name, value)


def check_field_names(fields: dict[str, Any]) -> None:
    """Raises `ValueError` naming the fields that `SiriusConfig` does not have."""
    allowed = [field.name for field in dataclasses.fields(Fields)]
    unknown = sorted(set(fields) - set(allowed))
    if unknown:
        hint = did_you_mean(unknown[0], allowed)
        raise ValueError(f"SiriusConfig has no field {', '.join(map(repr, unknown))}.{hint} Its fields are {allowed}")


def memory_bytes(value: int | str) -> int:
    """Returns the bytes of an int or a string such as "6GiB". Raises `TypeError` or `ValueError` for others."""
    allowed = "draft_memory must be a number of bytes greater than 0, as an int or in KB, MB, GB, KiB, MiB or GiB"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{allowed}, got {value!r}")
    from accelerate.utils import convert_file_size_to_int

    try:
        num_bytes = int(value) if isinstance(value, int) or value.isdigit() else convert_file_size_to_int(value)
    except ValueError as error:
        raise ValueError(f"{allowed}, got {value!r}") from error
    if num_bytes < 1:
        raise ValueError(f"{allowed}, got {value!r}")
    return num_bytes
