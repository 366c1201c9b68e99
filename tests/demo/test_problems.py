import json
import operator
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.demo.problems import final_answer, generate, write_jsonl

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
LINE = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+) \w+\.")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_line_of_every_answer_is_true_and_the_last_is_the_answer(seed):
    for problem in generate(60, seed):
        lines = LINE.findall(problem.answer)
        assert 1 <= len(lines) <= 3
        for left, sign, right, result in lines:
            assert OPERATORS[sign](int(left), int(right)) == int(result)
            assert sign != "/" or int(left) % int(right) == 0
        assert int(lines[-1][3]) == final_answer(problem.answer)
        assert LINE.sub("", problem.answer).strip() == f"#### {final_answer(problem.answer)}"


def test_numbers_stay_in_what_is_known_by_heart():
    for problem in generate(2000, seed=1):
        for left, sign, right, result in LINE.findall(problem.answer):
            assert 2 <= int(result) <= 99
            if sign == "*":
                assert max(int(left), int(right)) <= 9
            if sign == "/":
                assert max(int(right), int(result)) <= 9


def test_every_number_of_the_chain_comes_from_the_question_or_an_earlier_line():
    for problem in generate(500, seed=2):
        known = set(re.findall(r"\d+", problem.question))
        used = set()
        for left, _, right, result in LINE.findall(problem.answer):
            assert {left, right} <= known
            used |= {left, right}
            known.add(result)
        assert set(re.findall(r"\d+", problem.question)) <= used  # and no number of the question is idle


def test_no_hole_is_left_in_a_text():
    assert not any(re.search(r"[{}]", problem.question + problem.answer) for problem in generate(500, seed=3))


def test_problems_depend_on_the_seed_only():
    assert generate(50, seed=4) == generate(50, seed=4)
    assert generate(50, seed=4) != generate(50, seed=5)


def test_a_longer_set_begins_with_the_shorter_one():
    assert generate(100, seed=6)[:40] == generate(40, seed=6)


def test_questions_are_distinct_and_never_among_the_excluded():
    held_out = {problem.question for problem in generate(300, seed=7)}
    training = [problem.question for problem in generate(3000, seed=7, exclude=held_out)]
    assert len(set(training)) == 3000
    assert held_out.isdisjoint(training)


def test_slips_occur_at_about_their_share_and_later_steps_continue_from_them():
    wrong = 0
    for problem in generate(2000, seed=10, slips=0.3):
        lines = LINE.findall(problem.answer)
        errors = [int(result) - OPERATORS[sign](int(left), int(right)) for left, sign, right, result in lines]
        assert sorted(map(abs, errors))[:-1] == [0] * (len(lines) - 1), "at most one line is wrong"
        assert max(map(abs, errors)) <= 2
        assert final_answer(problem.answer) == int(lines[-1][3])
        known = set(re.findall(r"\d+", problem.question)) | {result for *_, result in lines[:-1]}
        assert {number for left, _, right, _ in lines for number in (left, right)} <= known
        wrong += any(errors)
    assert 500 < wrong < 700


def test_stories_are_many_and_about_equally_frequent():
    wordings = {}
    for problem in generate(3200, seed=8):
        signs = "".join(sign for _, sign, _, _ in LINE.findall(problem.answer))
        wordings[signs] = wordings.get(signs, 0) + 1
    assert len(wordings) >= 9
    assert min(wordings.values()) > 100


def test_written_lines_read_back_as_the_problems(tmp_path):
    problems = generate(20, seed=9)
    path = tmp_path / "deep" / "train.jsonl"
    write_jsonl(problems, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"question": problem.question, "answer": problem.answer} for problem in problems]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 = 3 cups. #### 3", 3),
        ("####-4", -4),
        ("#### 7 and then #### 9", 7),
        ("the answer is 3", None),
        ("#### x", None),
    ],
)
def test_the_final_answer_is_the_number_after_the_first_mark(text, expected):
    assert final_answer(text) == expected
