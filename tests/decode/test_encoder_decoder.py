"""Encoder-decoders: the decoder drafts, and at threshold=1.0 the output is the dense model's, token for token."""

import pytest
import torch
from accelerate import cpu_offload
from encoder_decoders import FAMILIES, tiny_encoder_decoder, tiny_source
from transformers import GenerationMixin

from hf_sirius import calibrate, make_sparse
from hf_sirius.decode.candidates import NUM_OBSERVED
from hf_sirius.model.positions import Positions


OPTIONS = {"max_new_tokens": 24, "do_sample": False}
OFTEN = ("bart", "marian", "mt5", "t5", "whisper")  # the others are slow tests
METHODS = {
    "cats": {"method": "cats"},
    "cats-topk": {"method": "cats", "selection": "topk"},
    "griffin": {"method": "griffin"},
    "teal": {"method": "teal"},
    "teal-column": {"method": "teal", "weighting": "column"},
}
CASTS = {
    "bfloat16": {"method": "griffin", "draft_dtype": "bfloat16", "draft_scope": "all"},
    "int8": {"method": "griffin", "draft_dtype": "int8"},
    "int4": {"density": 1.0, "draft_dtype": "int4", "draft_scope": "all"},
    "shortlist": {"density": 1.0, "draft_dtype": "int8", "draft_scope": "all", "draft_head": "shortlist"},
}


def generate(model, **kwargs):
    """As `generate` of all models; Whisper's own is tested in its own place."""
    return GenerationMixin.generate(model, **tiny_source(model), **OPTIONS, **kwargs)


def make_twin(model, **fields):
    return make_sparse(model, **{"density": 0.5, "kernel_size": 6, "threshold": 1.0, **fields})


@pytest.mark.parametrize(
    "family", [family if family in OFTEN else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_output_equals_dense_greedy_in_float64(family):
    model = tiny_encoder_decoder(family)
    dense = generate(model)
    for fields in ({"method": "cats"}, {"method": "griffin"}):
        with make_twin(model, **fields) as sparse:
            assert len(sparse._twin.sites) == 2, "those of the decoder"
            assert torch.equal(generate(model, assistant_model=sparse), dense), fields
            assert sparse.stats.num_drafted > 0
            assert 0 < sparse.stats.draft_density < 1
    assert torch.equal(generate(model), dense)


@pytest.mark.parametrize("family", [pytest.param("bart", marks=pytest.mark.slow), "t5"])
@pytest.mark.parametrize("fields", [*METHODS.values(), *CASTS.values()], ids=[*METHODS, *CASTS])
def test_every_kind_of_draft_leaves_the_output_dense(fields, family):
    model = tiny_encoder_decoder(family)
    dense = generate(model)
    with make_twin(model, **fields) as sparse:
        assert torch.equal(generate(model, assistant_model=sparse), dense)
        assert sparse.stats.num_drafted > 0


@pytest.mark.parametrize("family", OFTEN)
@pytest.mark.parametrize("fields", METHODS.values(), ids=list(METHODS))
def test_a_draft_differs_from_dense_and_is_as_dense_as_asked_for(fields, family):
    model = tiny_encoder_decoder(family)
    source = tiny_source(model)
    tokens = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(5))
    encoder_outputs = model.get_encoder()(**source)
    with torch.no_grad(), make_twin(model, **fields) as sparse, sparse.new_call() as call:
        with call.draft.observing(None):
            dense = model(encoder_outputs=encoder_outputs, decoder_input_ids=tokens)
        call.draft.select()
        method = call.draft.method
        cache = dense.past_key_values  # which has the encoder's keys and values as well
        with call.draft.drafting():
            for length in reversed(range(1, tokens.shape[1])):
                cache.crop(length - cache.get_seq_length())
                step = {"decoder_input_ids": tokens[:, length : length + 1], "past_key_values": cache}
                logits = sparse(encoder_outputs=encoder_outputs, **step).logits[0, -1]
                assert not torch.allclose(logits, dense.logits[0, length])
        measured = method.draft_density(model)
        in_full = {"gate_in_full": fields["method"] == "cats"} if method.acts_on == "mlps" else {}
        method.num_parameters_read = lambda site: site.num_parameters_read(0.5, **in_full)
        assert measured == pytest.approx(method.draft_density(model), rel=0.05)


@pytest.mark.parametrize("method", ["cats", "teal"])
def test_is_calibrated_by_pairs(method):
    model = tiny_encoder_decoder("bart")
    pair = {**tiny_source(model), "decoder_input_ids": [[2, 5, 6, 7, 8, 9]]}
    calibration = calibrate(model, None, [pair], method=method, progress=False)
    assert calibration.metadata["num_tokens"] == 6
    dense = generate(model)
    with make_twin(model, method=method, calibration=calibration) as sparse:
        assert torch.equal(generate(model, assistant_model=sparse), dense)
        assert not sparse.stats.cycles[0].is_dense_step, "nothing has to be seen before"
    with pytest.raises(TypeError, match=r"encoder-decoder.*decoder_input_ids.*got str"):
        calibrate(model, None, ["text"], method=method, progress=False)
    with pytest.raises(ValueError, match="budget='greedy' is for decoder-only"):
        calibrate(model, None, [pair], method="teal", budget="greedy", progress=False)


def test_the_method_sees_some_of_the_text_before_it_chooses():
    model = tiny_encoder_decoder("bart")
    with make_twin(model, method="griffin") as sparse:
        generate(model, assistant_model=sparse)
        num_dense = NUM_OBSERVED - 1  # beside the start token
        assert [cycle.is_dense_step for cycle in sparse.stats.cycles[: num_dense + 1]] == [True] * num_dense + [False]
        generate(model, assistant_model=sparse, decoder_input_ids=torch.arange(2, 2 + NUM_OBSERVED)[None])
        assert not sparse.stats.cycles[0].is_dense_step


def test_padded_sources_and_texts_are_read_as_by_the_dense_model():
    model = tiny_encoder_decoder("bart")
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, :3] = 0
    masks = {"attention_mask": mask, "decoder_attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    masks["decoder_input_ids"] = torch.tensor([[0, 0, 2, 5, 6]])
    dense = generate(model, **masks)
    with make_twin(model, method="griffin") as sparse:
        assert torch.equal(generate(model, **masks, assistant_model=sparse), dense)
        assert sparse.stats.num_drafted > 0


def test_no_draft_goes_past_the_last_position():
    model = tiny_encoder_decoder("whisper", max_target_positions=20)
    text = torch.full((1, 15), 5)
    cache = GenerationMixin.generate(
        model, **tiny_source(model), decoder_input_ids=text, max_new_tokens=1, return_dict_in_generate=True
    ).past_key_values
    assert cache.get_seq_length() == 15
    assert Positions(model.config).most_drafted({}, cache) == 4, "behind a token that is read at place 15"


@pytest.mark.parametrize("family, tree_width", [("bart", 1), ("whisper", 3)])
def test_the_outputs_beside_tokens_are_the_dense_models(family, tree_width):
    model = tiny_encoder_decoder(family)
    model.set_attn_implementation("eager")
    asked = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    dense = generate(model, **asked)
    with make_twin(model, method="griffin", density=0.7, tree_width=tree_width) as sparse:
        found = generate(model, **asked, assistant_model=sparse)
        assert sparse.stats.num_accepted > 0
    assert torch.equal(found.sequences, dense.sequences)
    for name in ("decoder_attentions", "cross_attentions", "decoder_hidden_states"):
        for ours, theirs in zip(found[name], dense[name], strict=True):
            assert all(map(torch.allclose, ours, theirs)), name


@pytest.mark.parametrize("fields", [{"method": "griffin"}, {"density": 1.0, "draft_dtype": "int8"}])
def test_an_offloaded_one_drafts(fields):
    model = tiny_encoder_decoder("t5", torch.float32)
    dense = generate(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with make_twin(model, **fields) as sparse:
        assert torch.equal(generate(model, assistant_model=sparse), dense)
        assert sparse.stats.num_drafted > 0


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_what_counts_its_own_positions_takes_no_tree(family):
    with pytest.raises(ValueError, match=r"counts the positions of its text by itself.*use tree_width=1"):
        make_twin(tiny_encoder_decoder(family), method="griffin", tree_width=3)


def test_is_not_compiled():
    with pytest.raises(ValueError, match="encoder-decoder's draft cannot be compiled"):
        make_twin(tiny_encoder_decoder("bart"), method="griffin", compile_draft=True)


def test_runs_by_itself_as_the_baseline_without_correction():
    model = tiny_encoder_decoder("bart")
    with make_twin(model, method="griffin") as sparse:
        assert not torch.equal(sparse.generate(**tiny_source(model), **OPTIONS), generate(model))
        assert 0 < sparse.stats.draft_density < 1


def test_is_drafted_for_where_nothing_is_set():
    model = tiny_encoder_decoder("mt5", torch.float32)
    dense = generate(model)
    with make_sparse(model) as sparse:
        assert torch.equal(generate(model, assistant_model=sparse), dense)
