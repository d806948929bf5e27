"""Problems and prompts: what is read, what the answer is, and what is told of a file that holds none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tasks import PROBLEM, SHOT, write_lines

from hf_sirius.study.problems import final_answer, load_problems, read_prompts


# Answers


@pytest.mark.parametrize(
    "text, number",
    [
        ("3 + 4 = 7 . #### 7", "7"),
        ("#### 1,234.", "1234"),
        ("####$5.50 each", "5.5"),
        ("#### -3\n", "-3"),
        ("#### 0.0", "0"),
        ("#### -0", "0"),
        ("#### 18.00\nQuestion: #### 4", "18"),
        ("#### .5", "0.5"),
        ("#### 100", "100"),
        ("#### Step 1: add\nso\n#### 10", "10"),
        ("#### 1. Compute the sum\n#### 42", "42"),
        ("#### $-5", "-5"),
        ("#### −5", "-5"),
        ("#### **42**", "42"),
        ("#### \\boxed{42}", "42"),
        ("#### 13/4", None),
        ("#### 1.5e3", None),
        ("#### 10:30", None),
        ("#### none", None),
        ("####", None),
        ("42", None),
        ("", None),
    ],
)
def test_final_answer(text, number):
    assert final_answer(text) == number


@given(st.text())
def test_no_text_makes_final_answer_fail(text):
    assert final_answer(text) is None or "####" in text
    found = final_answer("#### " + text)
    assert found is None or final_answer(f"#### {found}") == found


@given(st.integers(-(10**12), 10**12))
def test_numbers_may_be_grouped(number):
    assert final_answer(f"so #### {number:,}") == str(number) == final_answer(f"#### {number}.00")


# Files


def test_problems_of_a_file(tmp_path):
    file = write_lines(tmp_path / "p.jsonl", json.dumps(PROBLEM), "", json.dumps({**SHOT, "more": 1}))
    assert load_problems(file) == [PROBLEM, {**SHOT, "more": 1}]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON"),
        ('{"question": "q"}', 'the texts "question" and "answer"'),
        ('{"question": "q", "answer": 4}', 'the texts "question" and "answer"'),
        ("[]", 'the texts "question" and "answer"'),
        ('{"question": "q", "answer": "so 4"}', 'must end in "#### " and a number'),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    file = write_lines(tmp_path / "p.jsonl", json.dumps(PROBLEM), "", line, json.dumps(PROBLEM))
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 3: .*{message}"):
        load_problems(file)


def test_a_line_that_is_no_unicode_is_named(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(json.dumps(PROBLEM).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        load_problems(file)


def test_a_file_without_problems_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no problem"):
        load_problems(write_lines(tmp_path / "p.jsonl", "", ""))


def test_prompts_of_a_file(tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text('one\n\n{"prompt": 2}\n')
    assert read_prompts(text) == ["one", '{"prompt": 2}']
    lines.write_text('{"prompt": "one\\ntwo"}\n\n{"question": "How many?", "answer": "#### 1"}\n')
    assert read_prompts(lines) == ["one\ntwo", "Question: How many?\nAnswer:"]
    assert read_prompts(lines, chat=True) == ["one\ntwo", "How many?"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"prompt": "a"}\n{"prompt": "b"\n', "line 2: not valid"),
        (b'{"prompt": "a"}\n\n[1]\n', 'line 3: a prompt is an object with the text "prompt"'),
        (b'{"prompt": 3}', "line 1: a prompt is an object"),
        (b"\xff", "line 1: not valid"),
        (b"\n\n", "has no prompt"),
    ],
)
def test_a_broken_line_of_prompts_is_told_by_its_number(content, told, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_prompts(file)
