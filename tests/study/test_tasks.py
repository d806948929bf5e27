"""What an evaluation asks: problems and their answers, and windows of plain text."""

import json
import math

import pytest
import torch
from tiny import build_model, build_tokenizer, make_prompt, shared_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_sirius import SiriusConfig, make_sparse, reasoner_path, reasoner_problems
from hf_sirius.study.tasks import ProblemTask, TextTask, load_task


PROBLEM = {"question": "w1 w2 w3", "answer": "w4 w5 #### 42"}
SHOT = {"question": "w6 w7", "answer": "w8 #### 1"}
CHAT = "{% for m in messages %}{{ 'w11 ' if m['role'] == 'user' else 'w12 ' }}{{ m['content'] }} {% endfor %}w13"


def write_lines(path, *lines: str):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Answers


def test_an_answer_without_a_number_counts_as_wrong():
    task = ProblemTask("mine", [PROBLEM], build_tokenizer(), max_new_tokens=5)
    record = task.run(0, shared_model())
    assert record["answer"] is None and record["is_correct"] is False and record["num_tokens"] == 5
    assert task.measures([record])["accuracy"] == 0


def test_a_right_answer_counts():
    tokenizer = build_tokenizer()
    task = ProblemTask("mine", [PROBLEM], tokenizer, max_new_tokens=3)
    tokenizer.decode = lambda ids, **options: " #### 42.0" if len(ids) == 3 else ""
    assert task.run(0, shared_model())["is_correct"] is True


# Problems


def test_few_shot_examples_come_before_the_question_as_text():
    tokenizer = build_tokenizer()
    task = ProblemTask("mine", [PROBLEM], tokenizer, [SHOT])
    text = "Question: w6 w7\nAnswer: w8 #### 1\n\nQuestion: w1 w2 w3\nAnswer:"
    assert torch.equal(task.inputs("w1 w2 w3")["input_ids"], tokenizer(text, return_tensors="pt")["input_ids"])


def test_few_shot_examples_are_turns_of_a_chat():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    task = ProblemTask("mine", [PROBLEM], tokenizer, [{"question": "w6 w7", "answer": "w8"}])
    assert task.chat and task.inputs("w1 w2")["input_ids"][0].tolist() == [11, 6, 7, 12, 8, 11, 1, 2, 13]
    plain = ProblemTask("mine", [PROBLEM], tokenizer, chat=False).inputs("w1")["input_ids"]
    assert 11 not in plain


def test_chat_without_a_template_is_refused():
    with pytest.raises(ValueError, match="has no chat template"):
        ProblemTask("mine", [PROBLEM], build_tokenizer(), chat=True)


def test_without_a_chat_answers_end_where_a_new_question_begins():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_bytes = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    by_bytes.pre_tokenizer, by_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_bytes)
    (stop,) = ProblemTask("mine", [PROBLEM], tokenizer)._stops
    ids = tokenizer("4 #### 4\n\nQuestion:", return_tensors="pt")["input_ids"]
    assert stop(ids, None).all() and not stop(ids[:, :-1], None).any()
    assert ProblemTask("mine", [PROBLEM], build_tokenizer())._stops == []  # it cannot


def test_tasks_by_name(tmp_path):
    tokenizer = build_tokenizer()
    problems = write_lines(tmp_path / "p.jsonl", *[json.dumps(PROBLEM)] * 3)
    text = write_lines(tmp_path / "t.txt", "w1 w2 w3 w4 " * 10)
    assert len(load_task("reasoner", tokenizer)) == 500 and len(load_task("reasoner-long", tokenizer)) == 20
    task = load_task(str(problems), tokenizer, few_shot=problems, num_items=2, max_new_tokens=7)
    assert (len(task), len(task.few_shot), task.max_new_tokens) == (2, 3, 7)
    assert len(load_task(str(text), tokenizer, window=8)) == 5
    with pytest.raises(FileNotFoundError, match="there is no task 'none'"):
        load_task("none", tokenizer)
    with pytest.raises(ValueError, match="a task of plain text, for which max_new_tokens, few_shot means nothing"):
        load_task(str(text), tokenizer, few_shot=problems, max_new_tokens=3)
    with pytest.raises(ValueError, match="a task of problems, for which window means nothing"):
        load_task("reasoner", tokenizer, window=8)


def test_a_byte_order_mark_changes_no_task(tmp_path):
    tokenizer = build_tokenizer()
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    for file, encoding in ((plain, "utf-8"), (marked, "utf-8-sig")):
        file.write_text("w1 w2 w3 w4 " * 10, encoding=encoding)
    windows = [load_task(str(file), tokenizer, window=8).windows for file in (plain, marked)]
    assert windows[0] == windows[1]
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps(SHOT), encoding="utf-8-sig")
    assert load_task("reasoner", tokenizer, few_shot=shots).few_shot == [SHOT]
    marked.write_bytes(b"w1\nw2 \xff")
    with pytest.raises(ValueError, match=r"marked\.txt, line 2: not valid UTF-8"):
        load_task(str(marked), tokenizer)


def test_what_records_depend_on_is_described(tmp_path):
    def description(*args, **options):
        return ProblemTask("mine", *args, **options).description(shared_model())

    tokenizer = build_tokenizer()
    base = description([PROBLEM], tokenizer)
    assert base == description([dict(PROBLEM)], tokenizer)
    for other in (
        description([SHOT], tokenizer),
        description([PROBLEM], tokenizer, [SHOT]),
        description([PROBLEM], tokenizer, max_new_tokens=3),
    ):
        assert other != base


# Plain text


def text_task(window: int = 16, num_windows: int = 3) -> TextTask:
    ids = make_prompt(window * num_windows + window // 2, seed=5)[0].tolist()
    return TextTask("text", [" ".join(f"w{i}" for i in ids if i < 46)], build_tokenizer(), window)


def test_windows_are_whole_and_in_order():
    tokenizer = build_tokenizer()
    words = [f"w{i}" for i in range(1, 24)]
    task = TextTask("text", [" ".join(words), "w1 w2"], tokenizer, window=5)
    assert [i for window in task.windows for i in window] == list(range(1, 21))
    with pytest.raises(ValueError, match="has no text of 64 tokens"):
        TextTask("text", ["w1"], tokenizer, window=64)
    with pytest.raises(ValueError, match="at least 4 tokens, got 3"):
        TextTask("text", ["w1"], tokenizer, window=3)


def test_dense_perplexity_is_that_of_the_second_half():
    model, task = shared_model(), text_task()
    records = [task.run(i, model) for i in range(len(task))]
    losses = []
    for window in task.windows:
        labels = torch.tensor([window])
        logits = model(labels).logits[0]
        losses += [torch.nn.functional.cross_entropy(logits[i - 1], labels[0, i]).item() for i in range(8, 16)]
    measures = task.measures(records)
    assert measures["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert measures["agreement"] is None


@pytest.mark.parametrize("fields", [{"method": "griffin"}, {"method": "cats"}, {"method": "cats", "selection": "topk"}])
def test_the_draft_reads_the_text_as_it_would_write_it(fields):
    model, task = build_model(), text_task()
    with make_sparse(model, **fields, density=0.3, threshold=0.05, temperature=1.0) as sparse, torch.no_grad():
        record = task.run(0, model, sparse)
        # The same token by token.
        ids = torch.tensor([task.windows[0]])
        loss = num_agreeing = num_accepted = 0
        with sparse.new_call() as call:
            with call.draft.observing(None):
                outputs = model(ids[:, :8], use_cache=True)
            call.draft.select()
            loss -= outputs.logits[0, -1].log_softmax(-1)[ids[0, 8]].item()
            with call.draft.drafting():
                for i in range(8, 15):
                    dense = model(ids[:, : i + 1]).logits[0, -1].float()
                    outputs = sparse(ids[:, i : i + 1], past_key_values=outputs.past_key_values)
                    scores = outputs.logits[0, -1].float()
                    loss -= scores.log_softmax(-1)[ids[0, i + 1]].item()
                    num_agreeing += int(scores.argmax() == dense.argmax())
                    likelihood = dense.softmax(-1)[scores.argmax()]
                    num_accepted += int(likelihood >= 0.05 or scores.argmax() == dense.argmax())
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert (record["num_agreeing"], record["num_accepted"]) == (num_agreeing, num_accepted)
    assert record["num_compared"] == 7 and 0 < num_agreeing < num_accepted
    assert 0 < task.measures([record])["draft_density"] < 1


def test_a_draft_of_all_neurons_agrees_everywhere():
    model, task = shared_model(), text_task()
    with make_sparse(model, method="griffin", density=1.0) as sparse:
        record = task.run(1, model, sparse)
    measures = task.measures([record])
    assert measures["agreement"] == measures["acceptance"] == 1
    assert record["loss"] == pytest.approx(task.run(1, model)["loss"], rel=1e-6)


def test_trees_are_refused_for_text():
    with pytest.raises(ValueError, match="use tree_width=1"):
        text_task().check(shared_model(), SiriusConfig(tree_width=2), corrected=False)


def test_text_is_not_corrected():
    with pytest.raises(ValueError, match="run its draft alone"):
        text_task().check(shared_model(), SiriusConfig())
    text_task().check(shared_model(), SiriusConfig(), corrected=False)
    text_task().check(shared_model())


def test_a_window_beyond_the_models_positions_is_refused():
    model = build_model("gpt2", max_position_embeddings=12, n_positions=12)
    with pytest.raises(ValueError, match="16 tokens is longer than the 12 positions"):
        text_task().check(model)


def test_every_window_begins_with_bos_where_the_tokenizer_writes_one():
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    text = " ".join(problem["question"] for problem in reasoner_problems()[:3])
    windows = TextTask("text", [text], tokenizer, window=16).windows
    assert len(windows) > 3 and {window[0] for window in windows} == {tokenizer.bos_token_id}
    assert {len(window) for window in windows} == {16}
    read = [i for window in windows for i in window[1:]]
    assert read == tokenizer(text, add_special_tokens=False)["input_ids"][: len(read)]
