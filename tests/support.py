"""What every family of the installed transformers can do, by a run of each as a tiny random model.

python tests/support.py            # all of them, two at a time: writes docs/support.md
python tests/support.py llama t5   # some of them, told here
"""

import argparse
import dataclasses
import multiprocessing
import queue
import re
import statistics
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from shrinking import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto

from hf_sirius import make_sparse
from hf_sirius.settings.methods import METHODS
from hf_sirius.sparsity.in_experts import WholeExperts


PAGE_BEGIN = """# Supported models

This table is written by `python tests/support.py`. It takes every family that the installed transformers ({version})
has for text, for speech to text, and for images and text, makes a tiny random model of its config, and generates from a
text by each draft. A family that is new there shows up by itself.

- *yes*: in float64, at `threshold=1.0`, the tokens are those of the full model, the draft's logits are not, and the
  share of neurons, inputs or experts that it keeps is the one asked for (`density={density}`, of teal and experts
  {teal}).
- *no*: it is refused, and the last column says why. A dash: there are no experts.

`int8` is the whole model in 8 bits. If the feed-forward blocks of a family only have other names, it needs a row in
`MLP_KINDS` of `hf_sirius/model/sites.py`, and one in the test of `tests/model/test_sites.py`.
"""
PAGE = Path(__file__).parents[1] / "docs" / "support.md"
MAPPINGS = {
    "causal": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "Causal language models"),
    "seq2seq": (
        AutoModelForSeq2SeqLM,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "Encoder-decoders and speech",
    ),
    "image": (
        AutoModelForImageTextToText,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "Images and text",
    ),
}
DENSITY = 0.3  # of neurons with a squared ReLU about half are zero
DRAFTS: dict[str, dict[str, Any]] = {name: {"method": name, "density": DENSITY} for name in METHODS}
DRAFTS["teal"]["density"] = 0.5  # what it drops in one layer changes the sizes in the next
DRAFTS["experts"]["density"] = 0.5  # of two per token
DRAFTS["int8"] = {"method": "griffin", "density": 1.0, "draft_dtype": "int8", "draft_scope": "all"}
NO_EXPERTS = "has no experts that a token is given"  # as a method says that needs them
MAX_NEW_TOKENS = 16
MAX_SECONDS = 60  # for one family
NUM_WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Draft:
    """What became of one family with one draft."""

    verdict: str  # "works", "refused", or "fails": which none may
    reason: str = ""  # of a refusal or failure
    density: float | None = None  # the share of neurons or inputs that were kept


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one family."""

    mapping: str
    family: str
    drafts: dict[str, Draft] = dataclasses.field(default_factory=dict)
    reason: str = ""  # why it was not run
    seconds: float = 0.0


def examine(mapping: str, family: str) -> Row:
    """Runs one family with every draft."""
    start = time.monotonic()
    try:
        model = tiny_model(family, MAPPINGS[mapping][0])
        inputs = tiny_inputs(model)
        dense = generate(model, inputs)
    except Exception as error:  # of any kind: no tiny model of this family can be made, or it cannot generate
        return Row(mapping, family, reason=told(error))
    drafts = {name: examine_draft(model, inputs, dense, fields) for name, fields in DRAFTS.items()}
    return Row(mapping, family, drafts, seconds=time.monotonic() - start)


def generate(model: Any, inputs: dict, **kwargs: Any) -> Any:
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    if model.config.is_encoder_decoder:
        inputs["decoder_start_token_id"] = 1
    return model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1, **kwargs)


def examine_draft(model: Any, inputs: dict, dense: Any, fields: dict[str, Any]) -> Draft:
    try:
        with make_sparse(model, **fields, threshold=1.0, kernel_size=4) as sparse:
            output = generate(model, inputs, assistant_model=sparse)
            num_drafted = sparse.stats.num_drafted
            with torch.no_grad(), sparse.new_call() as call:
                with call.draft.observing(None):
                    expected = model(**inputs).logits
                call.draft.select()
                with call.draft.drafting():
                    is_dense = torch.equal(sparse(**inputs).logits, expected)
                for _ in range(7):  # the cutoffs of cats and teal follow what earlier drafts kept
                    with call.draft.drafting():
                        sparse(**inputs)
                density = kept_share(call.draft.method) if fields["density"] < 1 else None
    except (ValueError, NotImplementedError) as error:
        return Draft("refused", told(error))
    except Exception as error:
        return Draft("fails", told(error))
    if not torch.equal(output, dense):
        return Draft("fails", "other tokens than the dense model's")
    if not num_drafted:
        return Draft("fails", "nothing was drafted")
    if is_dense:
        return Draft("fails", "the draft's logits are the dense model's")
    return Draft("works", density=density)


def kept_share(method: Any) -> float:
    """Returns the share of neurons, inputs or experts that a method kept, by the parameters that it counted as read."""
    if acting := [block for block in method.experts if type(block) is not WholeExperts]:
        return statistics.fmean(block.density() for block in acting)

    def read(site: Any, share: float) -> float:
        if method.acts_on == "projections":
            return site.num_parameters_read(share)
        return site.num_parameters_read(share, gate_in_full=method.observed == "activation")

    least, most = (sum(read(site, share) for site in method.sites) for share in (0.0, 1.0))
    return (sum(method.num_parameters_read(site) for site in method.sites) - least) / (most - least)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def _work(connection: Any) -> None:
    """Runs families that come through a connection, for as long as any do."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    while True:
        connection.send(examine(*connection.recv()))


def sweep(families: Iterable[tuple[str, str]]) -> list[Row]:
    """Runs families, (mapping, name) of each, in child processes, so that none can hang or end the others."""
    context = multiprocessing.get_context("fork")  # which has imported all already
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    families = list(families)
    for family in families:
        waiting.put(family)
    rows: dict[tuple[str, str], Row] = {}

    def look_after_a_worker() -> None:
        process = None
        while not waiting.empty():
            try:
                family = waiting.get_nowait()
            except queue.Empty:
                break
            if process is None:
                connection, other = context.Pipe()
                process = context.Process(target=_work, args=(other,), daemon=True)
                process.start()
                other.close()
            connection.send(family)
            try:
                answered = connection.poll(MAX_SECONDS)
                rows[family] = connection.recv() if answered else Row(*family, reason=f"took over {MAX_SECONDS} s")
            except EOFError:
                answered, rows[family] = False, Row(*family, reason="its process ended")
            if not answered:
                process.kill()
                process = None
        if process is not None:
            process.kill()

    threads = [threading.Thread(target=look_after_a_worker) for _ in range(NUM_WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rows[family] for family in families]


def all_families() -> list[tuple[str, str]]:
    return [(mapping, family) for mapping, (_, names, _) in MAPPINGS.items() for family in names]


def page_of(rows: list[Row]) -> str:
    """Returns the page of what became of all families."""
    text = PAGE_BEGIN.format(version=transformers.__version__, density=DENSITY, teal=DRAFTS["teal"]["density"])
    for mapping, (_, _, title) in MAPPINGS.items():
        run = [row for row in rows if row.mapping == mapping and row.drafts]
        working = [row for row in run if any(draft.verdict == "works" for draft in row.drafts.values())]
        others = [row for row in rows if row.mapping == mapping and not row.drafts]
        text += f"\n## {title}\n\n{len(working)} of {len(run)} families that were run work.\n\n"
        text += f"| family | {' | '.join(DRAFTS)} | why not |\n|---|{'---|' * len(DRAFTS)}---|\n"
        for row in sorted(run, key=lambda row: row.family):
            asked = [draft for draft in row.drafts.values() if NO_EXPERTS not in draft.reason]
            cells = [
                ("yes" if draft.verdict == "works" else "no") if draft in asked else "–"
                for draft in row.drafts.values()
            ]
            reasons = dict.fromkeys(short(draft.reason) for draft in asked if draft.reason)
            text += f"| {row.family} | {' | '.join(cells)} | {'; '.join(reasons)} |\n"
        if others:
            text += (
                "\nNot run, as no tiny model of them generates from text alone:\n\n| family | why not |\n|---|---|\n"
            )
            for row in sorted(others, key=lambda row: row.family):
                text += f"| {row.family} | {short(row.reason)} |\n"
    return text


def short(reason: str) -> str:
    """Returns the first thing that an error says."""
    said = re.sub(r"^\w+(Error|Exception): ", "", reason)
    said = re.split(r": |; | \(the first|, which hf_sirius|, from which", said)[0]
    return said.replace("|", "/")[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="names of families or mappings; without them the page is written")
    wanted = parser.parse_args().families
    rows = sweep(place for place in all_families() if not wanted or {*place} & {*wanted})
    for row in rows:
        print(f"{row.mapping} {row.family} {row.seconds:.1f}s {row.reason}")
        for name, draft in row.drafts.items():
            density = "" if draft.density is None else f" {draft.density:.3f}"
            print(f"    {name}: {draft.verdict}{density} {draft.reason}")
    if not wanted:
        PAGE.write_text(page_of(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
