"""What became of each token: their texts, their order, and what the full model thought of them."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import METHODS, VOCAB_SIZE, build_tokenizer, make_prompt, shared_model
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.generation.streamers import BaseStreamer

import hf_sirius
from hf_sirius import make_sparse, trace
from hf_sirius.decode.stats import Branches, Cycle, GenerationStats
from hf_sirius.study.tracing import FATES, TokenTracer


EOS = 0
WORDS = (" a", " ", "b", "  ", "\n", "\ufffd", "é")
CHARACTERS = "é€😀ñ"  # of two to four bytes, which are tokens
BYTE_IDS = ([1, 2], [3, 4, 5], [6, 7, 8, 9], [1, 10])


@functools.cache
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def spelled(text: str) -> str:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]

    return _tokenizer([*spelled(CHARACTERS), *map(spelled, WORDS)], decoders.ByteLevel(), Tokenizer, models)


@functools.cache
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models

    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    byte_tokens = [f"<0x{byte:02X}>" for byte in CHARACTERS.encode()]
    words = [word.replace(" ", "▁") for word in WORDS]
    return _tokenizer([*byte_tokens, *words], decoders.Sequence(steps), Tokenizer, models)


def _tokenizer(pieces, decoder, tokenizer_class, models) -> PreTrainedTokenizerFast:
    names = list(dict.fromkeys(["</s>", *pieces]))
    names += [f"w{i}" for i in range(len(names), VOCAB_SIZE)]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizer_class(models.BPE(vocab, [], unk_token=f"w{VOCAB_SIZE - 1}"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "word-level": functools.cache(build_tokenizer),
}
token_ids = st.integers(0, VOCAB_SIZE - 1) | st.integers(0, 20)  # those of bytes above all


def runs(max_size: int):
    """Token ids, with some whole characters among them."""
    parts = st.lists(token_ids.map(lambda token_id: [token_id]) | st.sampled_from(BYTE_IDS), max_size=max_size)
    return parts.map(lambda parts: tuple(itertools.chain(*parts)))


@st.composite
def cycles(draw) -> Cycle:
    """A cycle with or without a tree, whose continuations share a first part or not."""
    drafted_ids = draw(runs(5))
    num_accepted, bonus_id = draw(st.integers(0, len(drafted_ids))), draw(token_ids)
    branches = None
    if draw(st.booleans()):
        leaves = [drafted_ids]
        for _ in range(draw(st.integers(0, 3))):
            stem = draw(st.sampled_from(leaves))
            leaves.append(stem[: draw(st.integers(0, len(stem)))] + draw(runs(3)))
        leaves = draw(st.permutations(leaves))
        likelihoods = tuple((0.25,) * len(ids) for ids in leaves)
        branches = Branches(tuple(leaves), likelihoods, leaves.index(drafted_ids), 9, 9, 1)
    likelihoods = (0.5,) * len(drafted_ids)
    return Cycle(drafted_ids, num_accepted, bonus_id, True, likelihoods, 0.75, num_accepted, branches=branches)


def make_stats(first_id: int, of_call: list[Cycle]) -> GenerationStats:
    stats = GenerationStats(6)
    stats.record_first(first_id, 0.125)
    for cycle in of_call:
        stats.record_cycle(cycle)
    return stats


def texts(tokens) -> str:
    return "".join(token.text for token in tokens)


def output_of(tokens) -> list[int]:
    return [token.token_id for token in tokens if token.is_output]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(first_id=token_ids, of_call=st.lists(cycles(), max_size=4))
@settings(max_examples=150, deadline=None)
def test_texts_are_those_of_the_whole(name, first_id, of_call):
    """Of the output, and of each draft and branch behind what came before it."""
    tokenizer = TOKENIZERS[name]()

    def check(text: str, ids: list[int]) -> None:
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        if name == "sentencepiece" and "\ufffd" in expected:  # one wrong byte spoils its neighbours
            assert text.startswith(expected.split("\ufffd")[0])
        else:
            assert text == expected

    tokens = list(TokenTracer(tokenizer).tokens(make_stats(first_id, of_call)))
    check(texts(token for token in tokens if token.is_output), output_of(tokens))
    for number, cycle in enumerate(of_call, 1):
        before = [token for token in tokens if token.is_output and token.cycle < number]
        parts = [token for token in tokens if token.cycle == number]
        drafted = [token for token in parts if token.fate in ("kept", "rolled_back")]
        assert tuple(token.token_id for token in drafted) == cycle.drafted_ids
        # Where the output ends within a draft, it may do so within a character.
        ends_within = number == len(of_call) and all(token.fate != "own" for token in parts)
        if drafted and drafted[-1].fate == "rolled_back" and not ends_within:
            check(texts(before + drafted), output_of(before) + list(cycle.drafted_ids))
        for leaf, leaf_ids in enumerate(cycle.branches.leaf_ids if cycle.branches else ()):
            branch = [token for token in parts if token.branch == leaf]
            if branch:
                whole = texts(before) + branch[0].after + texts(branch)
                check(whole, output_of(before) + list(leaf_ids))


@given(first_id=token_ids, of_call=st.lists(cycles(), max_size=4))
@settings(deadline=None)
def test_a_running_call_is_told_as_a_finished_one(first_id, of_call):
    tokenizer = byte_level_tokenizer()
    tracer, stats, told = TokenTracer(tokenizer), GenerationStats(6), []
    assert list(tracer.tokens(stats, is_running=True)) == []
    stats.record_first(first_id, 0.125)
    for cycle in of_call:
        told += tracer.tokens(stats, is_running=True)
        assert list(tracer.tokens(stats, is_running=True)) == []
        stats.record_cycle(cycle)
    told += tracer.tokens(stats)
    assert told == list(TokenTracer(tokenizer).tokens(make_stats(first_id, of_call)))


@given(first_id=token_ids, of_call=st.lists(cycles(), max_size=4))
@settings(deadline=None)
def test_a_tree_is_shown_once(first_id, of_call):
    """Each node of it is, whether shared by continuations or not."""
    tokens = list(TokenTracer(build_tokenizer()).tokens(make_stats(first_id, of_call)))
    for number, cycle in enumerate(of_call, 1):
        leaves = cycle.branches.leaf_ids if cycle.branches else (cycle.drafted_ids,)
        nodes = {ids[: i + 1] for ids in leaves for i in range(len(ids))}
        shown = [token for token in tokens if token.cycle == number and token.fate != "own"]
        assert len(shown) == len(nodes)
        assert all(token.likelihood == (0.25 if token.fate == "branch" else 0.5) for token in shown)
        start = sum(token.is_output for token in tokens if token.cycle < number)
        for token in shown:
            if token.fate == "branch":
                assert leaves[token.branch][token.position - start] == token.token_id
    outputs = [token for token in tokens if token.is_output]
    assert [token.position for token in outputs] == list(range(len(outputs)))
    assert [token.cycle for token in tokens] == sorted(token.cycle for token in tokens)


def test_a_character_goes_to_its_last_token():
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.convert_tokens_to_ids([*"âĤ¬", "Ġa", "</s>"])
    cycle = Cycle(tuple(ids[1:4]), 2, ids[3], True, (0.5,) * 3, 0.75, 2)
    *shown, end = TokenTracer(tokenizer).tokens(make_stats(ids[0], [cycle, Cycle((), 0, ids[4], False, (), 1.0, 0)]))
    assert [(token.text, token.fate) for token in shown] == [
        ("", "own"), ("", "kept"), ("€", "kept"), (" a", "kept")
    ]  # fmt: skip
    assert (end.text, end.name, end.fate, end.likelihood) == ("", "</s>", "own", 1.0)
    assert all(token.name == "" for token in shown)


def test_a_wrong_byte_leaves_sentencepieces_characters_alone():
    tokenizer = sentencepiece_tokenizer()
    cycle = Cycle((), 0, 2, True, (), 0.75, 0)
    wrong = tokenizer.convert_tokens_to_ids(["<0x82>", "▁a"])
    stats = make_stats(1, [cycle, *(Cycle((), 0, token_id, True, (), 0.5, 0) for token_id in wrong)])
    assert [token.text for token in TokenTracer(tokenizer).tokens(stats)] == ["", "é", "", "\ufffd a"]


def test_an_unfinished_character_is_told_at_the_end():
    tokenizer = byte_level_tokenizer()
    first, second = tokenizer.convert_tokens_to_ids(["â", "Ĥ"])
    stats = make_stats(first, [Cycle((), 0, second, True, (), 1.0, 0)])
    assert [token.text for token in TokenTracer(tokenizer).tokens(stats)] == ["", tokenizer.decode([first, second])]
    assert [token.text for token in TokenTracer(tokenizer).tokens(make_stats(first, []))] == ["\ufffd"]


# Of real calls


def likelihoods_along(model, prompt_ids: torch.Tensor, ids: tuple[int, ...], temperature: float) -> list[float]:
    """The full model's likelihood of each of `ids` behind the prompt, long [1, length], and those before it."""
    whole = torch.cat([prompt_ids, torch.tensor([ids])], dim=-1)
    with torch.no_grad():
        logits = model(whole).logits[0, prompt_ids.shape[1] - 1 : -1].float()
    return (logits / temperature).softmax(dim=-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


class Streamed(BaseStreamer):
    """Keeps what the stock loop puts out, the prompt included."""

    def __init__(self):
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    method=st.sampled_from(sorted(METHODS)),
    threshold=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    kernel_size=st.integers(2, 7),
    way=st.sampled_from(["greedy", "sampled", "tree"]),
    eos=st.none() | token_ids,
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_a_trace_tells_what_happened(name, method, threshold, kernel_size, way, eos, seed):
    model, tokenizer, prompt_ids = shared_model(), TOKENIZERS[name](), make_prompt(seed=seed)
    fields = {**METHODS[method], "density": 0.4, "threshold": threshold, "kernel_size": kernel_size}
    options = {"max_new_tokens": 14, "do_sample": way == "sampled", "eos_token_id": eos, "top_k": 0}
    with make_sparse(model, **fields, tree_width=4 if way == "tree" else 1, branch_cutoff=1.0) as sparse:
        set_seed(seed)
        traced = trace(sparse, tokenizer, {"input_ids": prompt_ids}, streamer=(streamed := Streamed()), **options)
        stats, temperature = sparse.stats, sparse.sirius_config.temperature
        assert traced.config == sparse.sirius_config.to_dict()
    output = tuple(streamed.ids[prompt_ids.shape[1] :])
    assert tuple(output_of(traced.tokens)) == output
    if name != "sentencepiece":  # of which random bytes are no characters
        assert traced.text == tokenizer.decode(output, skip_special_tokens=True)
    assert traced.measures == stats.as_dict() and traced.seconds == stats.seconds()
    assert json.loads(json.dumps(traced.to_dict(), allow_nan=False))["text"] == traced.text
    counts = {fate: sum(token.fate == fate for token in traced.tokens) for fate in FATES}
    # A draft that ends the output counts its last token as the bonus token.
    num_ended = stats.num_cycles + 1 - counts["own"]
    assert num_ended == 0 or (num_ended == 1 and way == "sampled" and traced.tokens[-1].token_id == eos)
    assert counts["kept"] - num_ended == stats.num_accepted
    assert counts["rolled_back"] + num_ended == stats.num_rolled_back
    assert counts["branch"] == 0 or way == "tree"
    along = functools.cache(lambda ids: likelihoods_along(model, prompt_ids, ids, temperature))
    for token in traced.tokens:
        path = output
        if not token.is_output:
            cycle = stats.cycles[token.cycle - 1]
            before = output[: sum(t.is_output for t in traced.tokens if t.cycle < token.cycle)]
            path = before + (cycle.drafted_ids if token.branch is None else cycle.branches.leaf_ids[token.branch])
        assert path[token.position] == token.token_id
        if token.likelihood is None:
            assert way == "tree" and not token.is_output
        else:
            assert token.likelihood == pytest.approx(along(path)[token.position], abs=1e-5)


def test_branches_are_traced():
    """Else the above would not test them."""
    with make_sparse(shared_model(), method="griffin", density=0.4, kernel_size=5, tree_width=4) as sparse:
        traced = trace(sparse, build_tokenizer(), {"input_ids": make_prompt()}, max_new_tokens=30, do_sample=False)
    branches = [token for token in traced.tokens if token.fate == "branch"]
    assert any(token.likelihood is not None for token in branches) and any(token.after for token in branches)


def test_a_trace_has_the_summary_of_its_call():
    with make_sparse(shared_model(), method="griffin", density=0.4, kernel_size=5) as sparse:
        traced = trace(sparse, build_tokenizer(), {"input_ids": make_prompt()}, max_new_tokens=30, do_sample=False)
        told = str(sparse.stats)
    told_of_trace = str(dataclasses.replace(traced, model_name="<b>m</b>"))
    assert told_of_trace.splitlines()[0] == told.splitlines()[0] and "<b>m</b>, griffin 0.4" in told_of_trace
    assert {line.strip() for line in told.splitlines()} <= {line.strip() for line in told_of_trace.splitlines()}
    assert "&lt;b&gt;m&lt;/b&gt;" in (page := dataclasses.replace(traced, model_name="<b>m</b>")._repr_html_())
    assert "<b>" not in page and traced.text.split()[0] in page
    # One that was made of plain values has no times, and tells of none.
    assert "ms" not in str(dataclasses.replace(traced, seconds={}))


def test_a_sampled_draft_that_ends_with_eos_was_kept():
    model, tokenizer = shared_model(), byte_level_tokenizer()
    with make_sparse(model, method="griffin", threshold=0.0, kernel_size=8) as sparse:
        for seed in range(20):
            set_seed(seed)
            ends = [EOS, *range(1, VOCAB_SIZE, 6)]
            traced = trace(
                sparse, tokenizer, {"input_ids": make_prompt()}, max_new_tokens=60, do_sample=True, eos_token_id=ends
            )
            assert all(token.fate in ("kept", "own") for token in traced.tokens)
            if traced.tokens[-1].fate == "kept":
                return
    raise AssertionError("no draft ended with EOS")


def test_a_prompt_may_be_a_text_or_tensors():
    model, tokenizer = shared_model(), build_tokenizer()
    with make_sparse(model, method="griffin") as sparse:
        options = {"max_new_tokens": 9, "do_sample": False}
        of_text = trace(sparse, tokenizer, "w3 w9 w4", **options)
        inputs = tokenizer("w3 w9 w4", return_tensors="pt")
        assert trace(sparse, tokenizer, inputs, **options) == of_text
        padded = {
            "input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.long), inputs["input_ids"]], dim=1),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        }
        assert trace(sparse, tokenizer, padded, **options).prompt == "w3 w9 w4"
    assert of_text.prompt == "w3 w9 w4" and of_text.model_name == "LlamaForCausalLM"


def test_wrong_arguments_are_told():
    model, tokenizer = shared_model(), build_tokenizer()
    with pytest.raises(TypeError, match=r"sparse twin, which make_sparse.* got LlamaForCausalLM"):
        trace(model, tokenizer, "w3")
    with make_sparse(model) as sparse:
        with pytest.raises(TypeError, match=r"prompt must be a text or .* got int"):
            trace(sparse, tokenizer, 3)
        with pytest.raises(ValueError, match=r"must have input_ids, got \['attention_mask'\]"):
            trace(sparse, tokenizer, {"attention_mask": torch.ones(1, 3)})
        with pytest.raises(ValueError, match="assistant_model was given to trace"):
            trace(sparse, tokenizer, "w3", assistant_model=sparse)
        with pytest.raises(ValueError, match="a batch of 2"):
            trace(sparse, tokenizer, {"input_ids": make_prompt().expand(2, -1)})
    with pytest.raises(ValueError, match="not attached"):
        trace(sparse, tokenizer, "w3", max_new_tokens=3)


def test_names_are_exported():
    assert hf_sirius.trace is trace and hf_sirius.Trace.__module__ == "hf_sirius.study.tracing"
