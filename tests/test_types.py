"""What a type checker and an editor know of the public names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sirius


PROGRAM = """
import hf_sirius
from hf_sirius import Calibration, GenerationStats, SiriusConfig, SparseTwin, Trace, make_sparse
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def use(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    twin = make_sparse(model, method="griffin", density=0.5)
    reveal_type(twin)
    also_a_model: PreTrainedModel = twin
    reveal_type(twin.stats.aal)
    reveal_type(twin.stats.num_cycles)
    reveal_type(twin.stats.cycles[0].likelihoods)
    reveal_type(twin.dense_model)
    with make_sparse(model, SiriusConfig(density=0.3)) as inner:
        reveal_type(inner)
    reveal_type(twin.sirius_config.replace(threshold=1.0).density)
    reveal_type(hf_sirius.calibrate(model, tokenizer, ["a"]))
    reveal_type(hf_sirius.trace(twin, tokenizer, "a"))
    reveal_type(hf_sirius.tune(model, []))
    reveal_type(hf_sirius.reasoner_path())
    reveal_type(hf_sirius.reasoner_problems())
    reveal_type(hf_sirius.smollm2_path())
    make_sparse("gpt2")
    SiriusConfig(densty=0.3)
    hf_sirius.make_sparce
"""
EXPECTED = [
    'Revealed type is "hf_sirius.decode.sparse_twin.SparseTwin"',
    'Revealed type is "float | None"',
    'Revealed type is "int"',
    'Revealed type is "tuple[float | None, ...]"',
    'Revealed type is "transformers.modeling_utils.PreTrainedModel"',
    'Revealed type is "hf_sirius.decode.sparse_twin.SparseTwin"',
    'Revealed type is "float"',
    'Revealed type is "hf_sirius.settings.calibration.Calibration"',
    'Revealed type is "hf_sirius.study.tracing.Trace"',
    'Revealed type is "hf_sirius.study.tuning_result.Tuning"',
    'Revealed type is "str"',
    'Revealed type is "list[dict[Any, Any]]"',
    'Revealed type is "str"',
    'Argument 1 to "make_sparse" has incompatible type "str"; expected "PreTrainedModel"',
    'Unexpected keyword argument "densty" for "SiriusConfig"',
    'Module has no attribute "make_sparce"',
]


@pytest.mark.slow
def test_a_users_program_is_checked(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    package = Path(hf_sirius.__file__).parents[1]
    # mypy finds what is installed by itself, and does not look where an editable install points to.
    path = {} if package.name == "site-packages" else {"MYPYPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--follow-imports", "silent", program.name],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **path},
    )  # fmt: skip
    told = [line.split(": ", 2)[2] for line in done.stdout.splitlines() if line.startswith("program.py:")]
    assert len(told) == len(EXPECTED), done.stdout + done.stderr
    for line, expected in zip(told, EXPECTED, strict=True):
        assert line.startswith(expected), line
