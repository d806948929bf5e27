"""`SiriusConfig`: what it refuses, and that what was saved is what comes back."""

import dataclasses
import json
import math
import tempfile
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_sirius import Calibration, SiriusConfig
from hf_sirius.settings.calibration import CALIBRATION_NAME
from hf_sirius.settings.config import CONFIG_NAME
from hf_sirius.settings.fields import DRAFT_DTYPES, memory_bytes, rules


FIELDS = [field.name for field in dataclasses.fields(SiriusConfig)]


def make_calibration(num_sites: int = 2, seed: int = 0, budget: str = "uniform", **metadata: str) -> Calibration:
    """Returns thresholds as `calibrate` would measure them, of no model."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(num_sites, 100, generator=generator)
    probe = torch.randn(num_sites, 16, generator=generator)
    budgets = torch.rand(num_sites, 100, generator=generator) if budget == "greedy" else None
    return Calibration(table, probe, {"num_tokens": 7, **metadata}, budgets)


def write_config(directory: Path, text: str | bytes) -> Path:
    (directory / CONFIG_NAME).write_bytes(text.encode() if isinstance(text, str) else text)
    return directory


@st.composite
def valid_configs(draw):
    """Any config that `SiriusConfig` takes, calibrated ones among them."""
    fields = {
        "density": draw(st.floats(0, 1, exclude_min=True)),
        "kernel_size": draw(st.one_of(st.none(), st.just("auto"), st.integers(2, 10_000))),
        "draft_confidence": draw(st.floats(0, 1, exclude_max=True)),
        "threshold": draw(st.one_of(st.floats(0, 1), st.sampled_from([0, 1]))),
        "temperature": draw(st.floats(0, 1e300, exclude_min=True)),
    }
    kind = draw(st.sampled_from(["griffin", "cats", "cats topk", "cats calibrated", "teal", "teal calibrated"]))
    if kind == "cats topk":
        fields["selection"] = "topk"
    if kind == "cats calibrated":
        fields["calibration"] = make_calibration(num_sites=draw(st.integers(1, 3)), seed=draw(st.integers(0, 9)))
    fields["draft_dtype"] = draw(st.sampled_from([None, *DRAFT_DTYPES]))
    fields["draft_scope"] = draw(st.sampled_from(["mlp", "all"])) if fields["draft_dtype"] else "all"
    fields["compile_draft"] = draw(st.booleans())
    fields["draft_memory"] = draw(st.one_of(st.none(), st.integers(1), st.sampled_from(["6GiB", "500MB"])))
    if kind.startswith("teal"):
        fields["weighting"] = draw(st.sampled_from(["magnitude", "column"]))
    if kind == "teal calibrated":
        fields["budget"] = draw(st.sampled_from(["uniform", "greedy"]))
        measured = draw(st.sampled_from(["greedy", fields["budget"]]))
        fields["calibration"] = make_calibration(budget=measured, method="teal", weighting=fields["weighting"])
    if kind == "griffin":
        fields["reselect_every"] = draw(st.one_of(st.none(), st.integers(1)))
    return SiriusConfig(method=kind.split()[0], **fields)


# Validation


@pytest.mark.parametrize("name", FIELDS)
def test_fields_cannot_be_assigned(name):
    config = SiriusConfig()
    before = getattr(config, name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, before)


NOT_A_NUMBER = [True, False, "0.5", None, [0.5]]
NOT_FINITE = [math.nan, math.inf, -math.inf]
BAD_VALUES = [
    *(("density", value, ValueError, "(0, 1]") for value in [0, 0.0, -0.1, 1.0001, 2, *NOT_FINITE]),
    *(("density", value, TypeError, "(0, 1]") for value in NOT_A_NUMBER),
    *(("threshold", value, ValueError, "[0, 1]") for value in [-0.01, 1.01, *NOT_FINITE]),
    *(("threshold", value, TypeError, "[0, 1]") for value in NOT_A_NUMBER),
    *(("temperature", value, ValueError, "greater than 0") for value in [0, 0.0, -0.6, *NOT_FINITE]),
    *(("temperature", value, TypeError, "greater than 0") for value in NOT_A_NUMBER),
    *(("kernel_size", value, ValueError, "at least 2") for value in [1, 0, -16]),
    ("kernel_size", "fast", TypeError, "must be an int or 'auto' or None, a number at least 2"),
    *(
        ("kernel_size", value, TypeError, "int")
        for value in [16.0, math.nan, math.inf, *NOT_A_NUMBER]
        if value is not None
    ),
    *(("reselect_every", value, ValueError, "at least 1") for value in [0, -1]),
    ("reselect_every", 1.5, TypeError, "int"),
    *(("draft_confidence", value, ValueError, r"in [0, 1)") for value in [-0.1, 1.0, math.nan]),
    *(("selection", value, ValueError, "['threshold', 'topk']") for value in ["top-k", "", None, 3]),
    *(("compile_draft", value, TypeError, "True or False") for value in [1, None, "true"]),
    *(("method", value, ValueError, "['griffin', 'cats', 'teal', 'experts']") for value in ["grifin", ""]),
    *(("method", value, TypeError, "['griffin', 'cats', 'teal', 'experts']") for value in [None, 3, ["cats"]]),
]


@pytest.mark.parametrize("name, value, error, allowed", BAD_VALUES)
def test_a_bad_value_is_refused_with_what_was_given_and_what_is_allowed(name, value, error, allowed):
    with pytest.raises(error) as raised:
        SiriusConfig(**{name: value})
    message = str(raised.value)
    assert type(raised.value) is error
    assert name in message and repr(value) in message and allowed in message


@pytest.mark.parametrize(
    "meant, misspelt", [("griffin", "grifin"), ("griffin", "Griffin"), ("cats", "CATS"), ("cats", "cat")]
)
def test_a_misspelt_method_is_answered_with_the_nearest(meant, misspelt):
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        SiriusConfig(method=misspelt)


def test_a_method_like_no_other_is_answered_with_the_list_alone():
    with pytest.raises(ValueError, match="The methods are") as raised:
        SiriusConfig(method="xyzzy")
    assert "Did you mean" not in str(raised.value)


@pytest.mark.parametrize("value", [{}, "calibration.safetensors", torch.zeros(2, 100)], ids=["dict", "path", "tensor"])
def test_a_calibration_must_be_one(value):
    with pytest.raises(TypeError, match=rf"hf_sirius\.Calibration, got {type(value).__name__}.*from_pretrained"):
        SiriusConfig(calibration=value)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"method": "griffin", "selection": "topk"}, "method='cats'.*'griffin'"),
        ({"method": "griffin", "calibration": make_calibration()}, "method='cats'.*'griffin'"),
        ({"selection": "topk", "calibration": make_calibration()}, "selection='topk' needs no thresholds"),
        ({"method": "cats", "budget": "greedy"}, "budget belongs to method='teal'.*'cats'"),
        (
            {"method": "teal", "budget": "greedy"},
            r"budget='greedy' needs a calibration.*hf_sirius\.calibrate\(.*budget='greedy'",
        ),
        (
            {"method": "teal", "budget": "greedy", "calibration": make_calibration(method="teal")},
            r"measured without budget='greedy'.*hf_sirius\.calibrate\(.*or use budget='uniform'",
        ),
        (
            {"method": "teal", "calibration": make_calibration()},
            r"for method='cats' and weighting='magnitude', but the config has method='teal'.*calibrate\(.*'teal'",
        ),
        (
            {"method": "teal", "weighting": "column", "calibration": make_calibration(method="teal")},
            "weighting='magnitude', but .* weighting='column': use those, or calibrate",
        ),
        ({"reselect_every": 2}, "reselect_every belongs to method='griffin'.*'cats'.*with_method"),
        ({"method": "griffin", "draft_memory": "6 elephants"}, "in KB, MB, GB, KiB, MiB or GiB, got '6 elephants'"),
        ({"method": "griffin", "draft_memory": 0}, "greater than 0.*got 0"),
        ({"method": "griffin", "draft_memory": -5}, "greater than 0.*got -5"),
        ({"method": "griffin", "draft_memory": "1TiB"}, "KiB, MiB or GiB, got '1TiB'"),
        ({"method": "griffin", "draft_dtype": "float23"}, "one of .*'bfloat16'.*got 'float23'"),
        ({"method": "griffin", "draft_scope": "mlp"}, "draft_dtype is None: set it to one of"),
        ({"draft_scope": "attention"}, "draft_scope must be one of .*got 'attention'"),
    ],
    ids=[
        "griffin topk",
        "griffin calibrated",
        "topk calibrated",
        "cats budgeted",
        "budget without calibration",
        "budget not measured",
        "calibration of another method",
        "calibration of another weighting",
        "cats reselected",
        "no budget",
        "empty budget",
        "negative budget",
        "large unit",
        "no dtype",
        "scope of nothing",
        "no scope",
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SiriusConfig(**fields)


def test_a_dtype_of_torch_is_taken_by_its_name():
    config = SiriusConfig(method="griffin", draft_dtype=torch.bfloat16)
    assert config == SiriusConfig(method="griffin", draft_dtype="bfloat16")
    assert SiriusConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_types_of_the_fields_can_be_asked_for():
    hints = typing.get_type_hints(SiriusConfig)
    assert hints["density"] is float and hints["calibration"] == Calibration | None


@pytest.mark.parametrize("value, expected", [(7, 7), ("1000", 1000), ("6GiB", 6 * 2**30), ("500MB", 500_000_000)])
def test_a_number_of_bytes(value, expected):
    assert memory_bytes(SiriusConfig(method="griffin", draft_memory=value).draft_memory) == expected


def test_truths_are_read_from_words():
    rule = rules()["compile_draft"]
    assert rule.read("true") is rule.read("True") is True and rule.read("false") is False
    with pytest.raises(ValueError, match="must be true or false, got 'yes'"):
        rule.read("yes")


@pytest.mark.parametrize("fields", [{"density": 1}, {"threshold": 0}, {"threshold": 1.0}, {"kernel_size": 2}])
def test_the_ends_of_the_ranges_are_allowed(fields):
    (name, value), = fields.items()  # fmt: skip
    assert getattr(SiriusConfig(**fields), name) == value


def test_replace_gives_another_config_and_validates_it():
    config = SiriusConfig(density=0.4)
    changed = config.replace(kernel_size=8)
    assert (changed.density, changed.kernel_size, config.kernel_size) == (0.4, 8, None)
    with pytest.raises(ValueError, match="density must be in"):
        config.replace(density=0)


def test_another_method_leaves_the_calibration_behind():
    config = SiriusConfig(method="teal", budget="greedy", calibration=make_calibration(budget="greedy", method="teal"))
    assert config.with_method("cats") == SiriusConfig(method="cats")
    assert config.with_method("teal", density=0.3) == config.replace(density=0.3)
    cats = make_calibration()
    assert config.with_method("cats", calibration=cats) == SiriusConfig(method="cats", calibration=cats)


@pytest.mark.parametrize(
    "build", [SiriusConfig().replace, lambda **fields: SiriusConfig.from_dict(fields)], ids=["replace", "from_dict"]
)
def test_unknown_fields_are_named_with_the_known_ones(build):
    with pytest.raises(ValueError, match=r"no field 'densty', 'sparsity'.*'density'"):
        build(sparsity=0.5, densty=0.3)


def test_equal_configs_have_equal_hashes():
    plain, calibrated = SiriusConfig(density=0.3), SiriusConfig(calibration=make_calibration())
    assert plain == SiriusConfig(density=0.3) and hash(plain) == hash(SiriusConfig(density=0.3))
    twin = SiriusConfig(calibration=make_calibration())
    assert calibrated == twin and hash(calibrated) == hash(twin)


# Saving and loading


@settings(deadline=None, max_examples=50)
@given(config=valid_configs())
def test_every_config_comes_back_from_a_directory_and_from_a_dict(config):
    assert SiriusConfig.from_dict(config.to_dict(), calibration=config.calibration) == config
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        assert SiriusConfig.from_pretrained(directory) == config


def test_the_file_is_plain_json_with_the_fields_by_name(tmp_path):
    SiriusConfig(method="griffin", density=0.25).save_pretrained(tmp_path / "made" / "on the way")
    values = json.loads((tmp_path / "made" / "on the way" / CONFIG_NAME).read_text())
    assert values["method"] == "griffin" and values["density"] == 0.25 and "hf_sirius_version" in values


def test_keywords_override_what_was_saved(tmp_path):
    config = SiriusConfig(density=0.3, calibration=make_calibration())
    config.save_pretrained(tmp_path)
    changes = {"density": 0.2, "kernel_size": 4}
    assert SiriusConfig.from_pretrained(tmp_path, **changes) == config.replace(**changes)
    griffin = SiriusConfig.from_pretrained(tmp_path, method="griffin", calibration=None)
    assert griffin == SiriusConfig(method="griffin", density=0.3)
    with pytest.raises(ValueError, match="density must be in"):
        SiriusConfig.from_pretrained(tmp_path, density=2)


def test_a_misspelt_keyword_is_not_swallowed(tmp_path):
    SiriusConfig().save_pretrained(tmp_path)
    with pytest.raises((ValueError, TypeError), match="densty"):
        SiriusConfig.from_pretrained(tmp_path, densty=0.3)


@pytest.mark.parametrize("later", [SiriusConfig(), SiriusConfig(method="griffin")], ids=["cats", "griffin"])
def test_saving_over_a_calibrated_config_leaves_nothing_of_it(tmp_path, later):
    SiriusConfig(calibration=make_calibration()).save_pretrained(tmp_path)
    later.save_pretrained(tmp_path)
    assert SiriusConfig.from_pretrained(tmp_path) == later


@pytest.mark.parametrize("text", ["", "{", '{"density": 0.5,}', "[1, 2]", "null", '"cats"', b"\xff\xfe\x00"])
def test_a_file_that_holds_no_json_object_is_refused(tmp_path, text):
    with pytest.raises(ValueError):
        SiriusConfig.from_pretrained(write_config(tmp_path, text))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"densty": 0.5}, "densty"),
        ({"density": 1.5}, "density"),
        ({"density": "0.5"}, "density"),
        ({"calibration": None}, "calibration"),
        ({"method": "csparse"}, "csparse"),
    ],
)
def test_a_file_with_a_bad_field_is_refused_as_documented(tmp_path, values, words):
    with pytest.raises(ValueError, match=words):
        SiriusConfig.from_pretrained(write_config(tmp_path, json.dumps(values)))


def test_a_missing_file_and_a_missing_directory_raise_oserror(tmp_path):
    with pytest.raises(OSError, match=CONFIG_NAME):
        SiriusConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError):
        SiriusConfig.from_pretrained(tmp_path / "missing", local_files_only=True)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        SiriusConfig().save_pretrained(file)


# The hub


class FakeHub:
    """Stands in for `huggingface_hub.HfApi`, and keeps what it was asked."""

    def __init__(self):
        self.created: list[dict] = []
        self.commits: list[dict] = []

    def create_repo(self, repo_id, **kwargs):
        self.created.append({"repo_id": repo_id, **kwargs})
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **kwargs):
        files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        self.commits.append({**kwargs, "files": files})
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: fake)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr("transformers.configuration_utils.hf_api", lambda: fake)
    monkeypatch.setattr("hf_sirius.settings.config.hf_api", lambda: fake, raising=False)
    return fake


def push(config, directory: Path, how: str) -> None:
    options = {"repo_id": "me/sparse", "token": "secret", "private": True, "commit_message": "Half of it"}
    if how == "push_to_hub":
        config.push_to_hub(**options)
    else:
        config.save_pretrained(str(directory), push_to_hub=True, **options)


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_the_hub_is_asked_for_the_same_as_by_any_config(hub, tmp_path, how):
    push(LlamaConfig(), tmp_path / "llama", how)
    push(SiriusConfig(calibration=make_calibration()), tmp_path / "sirius", how)
    assert hub.created[0] == hub.created[1]
    llama, sirius = hub.commits
    extra = {"README.md"} if how == "push_to_hub" else set()
    assert set(llama.pop("files")) == {"config.json"} | extra
    assert set(sirius.pop("files")) == {CONFIG_NAME, CALIBRATION_NAME} | extra
    assert sirius == llama and sirius["token"] == "secret"


def test_the_repository_is_named_after_the_directory_by_default(hub, tmp_path):
    SiriusConfig().save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert [created["repo_id"] for created in hub.created] == ["mine"]


def test_what_was_pushed_can_be_loaded(hub, tmp_path):
    config = SiriusConfig(density=0.3, calibration=make_calibration())
    config.push_to_hub("me/sparse")
    for name, content in hub.commits[0]["files"].items():
        (tmp_path / name).write_bytes(content)
    assert SiriusConfig.from_pretrained(tmp_path) == config
