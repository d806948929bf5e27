"""Problems and prompts: what is read, what the answer is, and what is told of a file that holds none."""

import json
import unicodedata
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tasks import PROBLEM, SHOT, write_lines

from hf_sirius.study.problems import final_answer, load_problems, problem_prompt, read_prompts, read_text


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
        ("#### 1 000 000 apples", "1000000"),
        ("#### 1\u00a0234.5", "1234.5"),
        ("#### 12\u202f000", "12000"),
        ("#### 12\u2009000\u2009000", "12000000"),
        ("####\u00a042", "42"),
        ("#### ¥500", "500"),
        ("#### -₹1,500", "-1500"),
        ('#### "42"', "42"),
        ("#### “42”.", "42"),
        ("#### «42»", "42"),
        ("#### $42$", "42"),
        ("#### \\$42", "42"),
        ("#### $1,234.50.", "1234.5"),
        ("#### 42%", "42"),
        ("#### 42 km/h", "42"),
        ("##### 42", "42"),
        ("#### 1) Add 3 and 4\n#### 7", "7"),
        ("#### 42\n3 more", "42"),
        ("#### 12,5", None),
        ("#### 0,125", None),
        ("#### 1,2345", None),
        ("#### 12,34,567", None),
        ("#### 1.234,56", None),
        ("#### 1,000 000", None),
        ("#### 1\u00a0000\u202f000", None),
        ("#### 1'000", None),
        ("#### 1\t000", None),
        ("#### 42 1000", None),
        ("#### 12 3/4", None),
        ("#### 12½", None),
        ("#### 5²", None),
        ("#### 5 + 3", None),
        ("#### 5 + 3\n#### 4", None),  # of the next question
        ("#### 2 million", None),
        ("#### **2** million", None),
        ("#### $2$ million", None),
        ("#### \\boxed{2} million", None),
        ("#### 10 k", None),
        ("#### (18) dollars", "18"),
        ("#### 10k", None),
        ("#### - 5", None),
        ("#### 1e3", None),
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


SEPARATORS = ("", ",", " ", "\u00a0", "\u2009", "\u202f")
CURRENCIES = ("", *(char for char in map(chr, range(0x110000)) if unicodedata.category(char) == "Sc"))
NUMBERS = st.decimals(-(10**12), 10**12, allow_nan=False, places=4) | st.integers(-(10**12), 10**12).map(Decimal)


@given(
    number=NUMBERS,
    separator=st.sampled_from(SEPARATORS),
    currency=st.sampled_from(CURRENCIES),
    around=st.sampled_from(["{}", "{}.", '"{}"', "“{}”", "**{}**", "\\boxed{{{}}}", "{} apples", "{}%"]),
    minus=st.sampled_from(["-", "−"]),
)
def test_numbers_read_back_as_they_were(number, separator, currency, around, minus):
    sign = minus if number < 0 else ""
    written = around.format(f"{sign}{currency}{abs(number):,f}".replace(",", separator))
    assert Decimal(final_answer(f"so #### {written}")) == number


@given(st.decimals(0, 10**9, allow_nan=False, places=2))
def test_a_decimal_comma_is_never_read_as_another_number(number):
    for separator in (".", " ", ""):
        written = f"{number:,f}".replace(",", "s").replace(".", ",").replace("s", separator)
        assert final_answer(f"#### {written}") is None


@given(NUMBERS, st.sampled_from(["+", "-", "/", ":", "x", " + ", " 1/", "e", "^", ", "]), st.integers(0, 10**6))
def test_two_numbers_are_none(number, between, other):
    assert final_answer(f"#### {number:f}{between}{other}") is None


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
        ('{"question": "q", "answer": "#### 12,5"}', "a comma or space before each three digits.*got '#### 12,5'"),
        ('{"question": "q", "answer": "#### 5 + 3"}', "a number, and one alone"),
        ('{"question": "q \\ud800", "answer": "#### 4"}', r"'\\ud800' is half of a character"),
        ('{"question": "q", "answer": "\\udc00 #### 4"}', r"'\\udc00' is half of a character"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    file = write_lines(tmp_path / "p.jsonl", json.dumps(PROBLEM), "", line, json.dumps(PROBLEM))
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 3: .*{message}"):
        load_problems(file)


def test_a_line_that_is_no_unicode_is_named(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(json.dumps(PROBLEM).encode() + b'\n{"question": "\xff"}\n')
    for read in (load_problems, read_prompts, read_text):
        with pytest.raises(ValueError, match=r"p\.jsonl, line 2: not valid UTF-8 .*: save the file as UTF-8"):
            read(file)


def test_a_byte_order_mark_is_part_of_no_text(tmp_path):
    problem, prompts = tmp_path / "p.jsonl", tmp_path / "prompts.txt"
    problem.write_text(json.dumps(PROBLEM), encoding="utf-8-sig")
    prompts.write_text("one\ntwo", encoding="utf-8-sig")
    assert load_problems(problem) == [PROBLEM]
    assert read_prompts(problem) == [problem_prompt(PROBLEM["question"])]
    assert read_prompts(prompts) == ["one", "two"] and read_text(prompts) == "one\ntwo"


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
        (b'{"prompt": "a \\ud800"}', "line 1: .*half of a character"),
        (b"\n\n", "has no prompt"),
    ],
)
def test_a_broken_line_of_prompts_is_told_by_its_number(content, told, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_prompts(file)
