"""What a user may choose: `SiriusConfig`. It knows no model and changes none."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers.utils import PushToHubMixin, cached_file
from transformers.utils.hub import hf_api

from .calibration import CALIBRATION_NAME, Calibration
from .sparsity import check_method_name


CONFIG_NAME = "sirius_config.json"
SELECTIONS = ("threshold", "topk")
DRAFT_DTYPES = ("bfloat16", "float16", "int8", "nf4")
MAX_TREE_WIDTH = 16
DRAFT_SCOPES = ("mlp", "all")
# Fields that only one method takes.
OWN_FIELDS = {
    "cats": ("selection", "calibration"),
    "griffin": ("draft_dtype", "draft_scope", "draft_memory", "reselect_every"),
}
_DOWNLOAD_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "subfolder", "token",
    "user_agent",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SiriusConfig(PushToHubMixin):
    """The settings of a sparse twin and of its correction. Frozen: derive another one with
    `config.replace(density=0.3)`.

    Args:
        method (`str`, defaults to `"cats"`):
            How neurons are chosen. `"cats"`: per token, by |act(gate_proj x)| (fine-grained; FSparse in the paper).
            `"griffin"`: once per prompt, from the prefill's activations (coarse-grained; CSparse in the paper).
        density (`float`, defaults to 0.5):
            Share of the neurons of each MLP that a draft step keeps, in (0, 1].
        kernel_size (`int`, *optional*):
            Tokens per cycle: `kernel_size - 1` drafted ones and one of the full model. At least 2; by default 16, or 32
            for a model that accelerate offloads, where a verification costs more. The twin's own config tells which.
        threshold (`float`, defaults to 0.1):
            A drafted token is kept if it is the full model's argmax or its likelihood is at least this, in [0, 1].
            1.0 gives the full model's output: token for token when greedy, the same distribution when sampling.
        temperature (`float`, defaults to 0.6):
            Temperature of the softmax in which that likelihood is read. Greater than 0.
        selection (`str`, defaults to `"threshold"`):
            For `"cats"`. `"threshold"`: a neuron is kept while it exceeds its layer's threshold (from `calibration`, or
            else from the prompt), so that the share kept varies by token. `"topk"`: the largest share of each token.
        calibration ([`Calibration`], *optional*):
            For `"cats"` with thresholds: what [`calibrate`] measured on a corpus. Saved and loaded with the config.
        draft_dtype (`str` or `torch.dtype`, *optional*):
            For `"griffin"`: dtype of the gathered neurons, `"bfloat16"`, `"float16"`, `"int8"` or `"nf4"` (the last two
            by bitsandbytes, `pip install hf_sirius[bnb]`); by default the model's own format. Fewer bytes to read, at a
            less faithful draft; the verification is the model's own all the same.
        draft_scope (`str`, defaults to `"mlp"`):
            What `draft_dtype` casts. `"mlp"`: the gathered neurons. `"all"`: the attention's projections and the head
            as well, of which the twin then keeps copies; they are made anew when the weights change.
        draft_memory (`int` or `str`, *optional*):
            For `"griffin"`: the most bytes that a draft's own weights may take, such as `6 * 2**30` or `"6GiB"`. Of an
            offloaded model, modules outside the MLPs stay resident as far as this allows; by default all do.
        draft_confidence (`float`, defaults to 0.0):
            A draft ends after a token that the twin itself finds less likely than this (softmax(l / temperature) of its
            own processed logits), in [0, 1), so that a hopeless tail is not drafted. 0 drafts `kernel_size - 1` tokens
            always.
        reselect_every (`int`, *optional*):
            For `"griffin"`: choose the neurons anew after every so many cycles, from the activations of the prompt and
            of all verifications so far. By default the prompt alone decides.
        tree_width (`int`, defaults to 1):
            Continuations that a draft carries on, 1 to 16; the full model reads them all in one forward and keeps the
            longest acceptable one. 1 drafts a single one.
        branch_cutoff (`float`, defaults to 0.95):
            Where the twin finds a token at least this likely, a tree does not branch, in [0, 1].
    """

    method: str = "cats"
    density: float = 0.5
    kernel_size: int | None = None
    threshold: float = 0.1
    temperature: float = 0.6
    selection: str = "threshold"
    calibration: Calibration | None = None
    draft_dtype: str | None = None
    draft_scope: str = "mlp"
    draft_memory: int | str | None = None
    draft_confidence: float = 0.0
    reselect_every: int | None = None
    tree_width: int = 1
    branch_cutoff: float = 0.95

    def __post_init__(self):
        check_method_name(self.method)
        _check_number("density", self.density, "in (0, 1], the share of neurons to keep", lambda x: 0 < x <= 1)
        _check_number("threshold", self.threshold, "in [0, 1], a likelihood", lambda x: 0 <= x <= 1)
        _check_number("temperature", self.temperature, "greater than 0", lambda x: x > 0)
        _check_number("draft_confidence", self.draft_confidence, "in [0, 1), a likelihood", lambda x: 0 <= x < 1)
        _check_int("kernel_size", self.kernel_size)
        if self.kernel_size is not None and self.kernel_size < 2:
            raise ValueError(
                "kernel_size must be at least 2 (one drafted token and one of the full model), got "
                f"{self.kernel_size}. "
                "Without drafts there is nothing to correct: call model.generate without an assistant instead."
            )
        _check_int("reselect_every", self.reselect_every)
        if self.reselect_every is not None and self.reselect_every < 1:
            raise ValueError(
                f"reselect_every must be at least 1 (cycles), got {self.reselect_every}; None never chooses anew"
            )
        if isinstance(self.tree_width, bool) or not isinstance(self.tree_width, int):
            raise TypeError(f"tree_width must be an int, got {self.tree_width!r}")
        if not 1 <= self.tree_width <= MAX_TREE_WIDTH:
            raise ValueError(f"tree_width must be in 1 to {MAX_TREE_WIDTH}, got {self.tree_width}; 1 drafts no tree")
        _check_number("branch_cutoff", self.branch_cutoff, "in [0, 1], a likelihood", lambda x: 0 <= x <= 1)
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {list(SELECTIONS)}, got {self.selection!r}")
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise TypeError(
                f"calibration must be a hf_sirius.Calibration, got {type(self.calibration).__name__}. "
                "Make one with hf_sirius.calibrate(...) or load it with Calibration.from_pretrained(...)."
            )
        if self.method != "cats" and (self.selection != "threshold" or self.calibration is not None):
            raise ValueError(
                f"selection and calibration belong to method='cats', but the method is {self.method!r}: leave them "
                "out, or, to change the method of a config, pass selection='threshold' and calibration=None with it"
            )
        if isinstance(self.draft_dtype, torch.dtype):
            object.__setattr__(self, "draft_dtype", str(self.draft_dtype).removeprefix("torch."))
        if self.draft_dtype not in (None, *DRAFT_DTYPES):
            raise ValueError(
                f"draft_dtype must be None (the model's) or one of {list(DRAFT_DTYPES)}, got {self.draft_dtype!r}"
            )
        if self.draft_scope not in DRAFT_SCOPES:
            raise ValueError(f"draft_scope must be one of {list(DRAFT_SCOPES)}, got {self.draft_scope!r}")
        if self.draft_scope != "mlp" and self.draft_dtype is None:
            raise ValueError(
                f"draft_scope={self.draft_scope!r} says what draft_dtype casts, but draft_dtype is None: set it to one "
                f"of {list(DRAFT_DTYPES)}, or leave draft_scope out"
            )
        for name in ("draft_dtype", "draft_memory", "reselect_every"):
            if self.method != "griffin" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is about gathered neurons, but method={self.method!r} gathers none: use method='griffin', "
                    f"or leave {name} out"
                )
        if self.draft_memory is not None:
            _check_memory(self.draft_memory)
        if self.selection == "topk" and self.calibration is not None:
            raise ValueError(
                "selection='topk' needs no thresholds: leave calibration out, or use selection='threshold'"
            )

    def replace(self, **fields: Any) -> "SiriusConfig":
        """Returns a copy with the given fields changed, validated anew."""
        check_field_names(fields)
        return dataclasses.replace(self, **fields)

    def with_method(self, method: str, **fields: Any) -> "SiriusConfig":
        """Returns a copy for another method, without the fields that belong to the one it had."""
        check_method_name(method)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        others = [name for owner, names in OWN_FIELDS.items() if owner != method for name in names]
        return self.replace(method=method, **{**{name: defaults[name] for name in others}, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values; a calibration is left out, as it has a file of its own."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "calibration"}

    @classmethod
    def from_dict(cls, values: dict[str, Any], calibration: Calibration | None = None) -> "SiriusConfig":
        """Builds a config from `to_dict`'s result. Raises `ValueError` for a name that is not a field."""
        if not isinstance(values, dict):
            raise ValueError(f"a config is a mapping of fields, got {values!r}")
        values = {name: value for name, value in values.items() if name != "hf_sirius_version"}
        if "calibration" in values:
            raise ValueError("a calibration is no plain value: pass it as calibration=..., or save it with the config")
        check_field_names(values)
        return cls(**values, calibration=calibration)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `sirius_config.json` (and the thresholds, if calibrated) to a directory, created if need be.

        With `push_to_hub=True` the files go to the hub as well; `kwargs` are `repo_id`, `commit_message`, and what
        `huggingface_hub.create_repo` takes (`private`, `token`, ...).
        """
        from . import __version__

        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"save_directory must be a directory, but {str(directory)!r} is a file")
        directory.mkdir(parents=True, exist_ok=True)
        if push_to_hub:
            commit_message = kwargs.pop("commit_message", None)
            repo_id = kwargs.pop("repo_id", directory.name)
            repo_id = hf_api().create_repo(repo_id, exist_ok=True, **kwargs).repo_id
            timestamps = self._get_files_timestamps(directory)
        if self.calibration is not None:
            self.calibration.save_pretrained(directory)
        else:
            (directory / CALIBRATION_NAME).unlink(missing_ok=True)  # of an earlier save
        stored = {"hf_sirius_version": __version__, **self.to_dict()}
        if self.calibration is not None:
            stored["calibration"] = CALIBRATION_NAME
        text = json.dumps(stored, indent=2)
        (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        if push_to_hub:
            self._upload_modified_files(
                directory, repo_id, timestamps, commit_message=commit_message, token=kwargs.get("token")
            )

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | os.PathLike, **kwargs) -> "SiriusConfig":
        """Loads a config (and its thresholds, if saved with it) from a directory or a hub repository.

        Args:
            pretrained_name_or_path: a directory that `save_pretrained` wrote, or a repository id on the hub.
            kwargs: config fields override what was saved; everything else (`revision`, `token`, `cache_dir`,
                `local_files_only`, ...) is handed to the download.

        Raises:
            `OSError` if there is no such file, `ValueError` if it is not a valid config.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        unknown = sorted(set(kwargs) - set(_DOWNLOAD_OPTIONS))
        if unknown:
            raise ValueError(
                f"unknown keyword {', '.join(map(repr, unknown))}: neither a field {sorted(names)} nor an option of "
                f"the download {list(_DOWNLOAD_OPTIONS)}"
            )
        file = cached_file(pretrained_name_or_path, CONFIG_NAME, **kwargs)
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON ({error}): write it anew with save_pretrained") from error
        calibration = None
        if isinstance(values, dict) and values.get("calibration") == CALIBRATION_NAME:
            del values["calibration"]
            calibration = Calibration.from_file(cached_file(pretrained_name_or_path, CALIBRATION_NAME, **kwargs))
        try:
            config = cls.from_dict(values, calibration=calibration)
        except TypeError as error:
            raise ValueError(f"{file} is not a valid config: {error}") from error
        return config.replace(**overrides) if overrides else config


def check_field_names(fields: dict[str, Any]) -> None:
    """Raises `ValueError` naming the fields that `SiriusConfig` does not have."""
    allowed = [field.name for field in dataclasses.fields(SiriusConfig)]
    unknown = sorted(set(fields) - set(allowed))
    if unknown:
        raise ValueError(f"SiriusConfig has no field {', '.join(map(repr, unknown))}; its fields are {allowed}")


def _check_int(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an int or None, got {value!r}")


def memory_bytes(value: int | str) -> int:
    """Returns a number of bytes, from an int or a string such as "6GiB"."""
    return int(value) if isinstance(value, int) or value.isdigit() else convert_file_size_to_int(value)


def _check_memory(value: Any) -> None:
    allowed = "draft_memory must be a number of bytes greater than 0, as an int or in KB, MB, GB, KiB, MiB or GiB"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{allowed}, got {value!r}")
    try:
        num_bytes = memory_bytes(value)
    except ValueError as error:
        raise ValueError(f"{allowed}, got {value!r}") from error
    if num_bytes < 1:
        raise ValueError(f"{allowed}, got {value!r}")


def _check_number(name: str, value: Any, allowed: str, is_allowed) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number {allowed}, got {value!r}")
    if not math.isfinite(value) or not is_allowed(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
