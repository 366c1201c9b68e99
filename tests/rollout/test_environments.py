"""Environments reward completions, and may reply to them."""

import runpy
from pathlib import Path

import pytest

from limbeck.errors import LimbeckError
from limbeck.registry import ENVIRONMENTS
from limbeck.rollout import EnvironmentStep, MathEnvironment, count_reasons, make_environment, verifiers
from limbeck.rollout.environments import Environment
from limbeck.rollout.verifiers import TIMEOUT, Score

CALCULATOR = Path(__file__).parents[2] / "examples" / "rollout" / "calculator.py"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(ENVIRONMENTS, "_registered", {})
    return runpy.run_path(str(CALCULATOR))


def finish(environment, rows, completions):
    return environment.step([environment.reset(row) for row in rows], completions)


def test_a_math_answer_is_rewarded_and_ends_the_episode():
    environment = make_environment("exact")
    steps = finish(environment, [{"answer": "6 * 7\n#### 42"}, {"answer": 42}], [r"\boxed{42}", r"\boxed{41}"])
    assert steps == [EnvironmentStep(reward=1.0), EnvironmentStep(reward=0.0)]
    assert all(step.done for step in steps)


def test_no_answer_earns_nothing_but_is_counted():
    steps = finish(make_environment("exact"), [{"answer": "42"}], ["I do not know."])
    assert steps == [EnvironmentStep(reward=0.0, reason="no answer found")]
    assert count_reasons(steps) == {"no answer found": 1}


def test_an_answer_that_could_not_be_checked_has_no_reward():
    class Slow:
        def scores(self, answers, references):
            return [
                Score(None, TIMEOUT),
                Score(None, "error: ValueError: a"),
                Score(None, "error: ValueError: b"),
                Score(1),
            ]

        def close(self):
            pass

    steps = finish(MathEnvironment(Slow()), [{"answer": "1"}] * 4, ["1"] * 4)
    assert [step.reward for step in steps] == [None, None, None, 1.0]
    assert count_reasons(steps) == {"timeout": 1, "error": 2}


def test_a_row_without_the_answer_column_is_refused():
    environment = make_environment("exact", answer_key="solution")
    with pytest.raises(LimbeckError, match="column solution; its columns are question, answer; name the right one"):
        environment.reset({"question": "6 * 7?", "answer": "42"})


def test_an_unknown_environment_is_refused():
    with pytest.raises(LimbeckError, match=r"exacct is not a known environment; did you mean exact\?"):
        make_environment("exacct")


def test_math_without_math_verify_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr(verifiers, "find_spec", lambda name: None)
    with pytest.raises(LimbeckError, match=r"pip install 'limbeck\[math\]'"):
        make_environment("math")


def test_an_incomplete_environment_is_refused(monkeypatch):
    monkeypatch.setattr(ENVIRONMENTS, "_registered", {})
    ENVIRONMENTS.register("mine")(type("Mine", (), {"reset": None, "close": None}))
    with pytest.raises(LimbeckError, match="the environment mine lacks step; define it in the class Mine"):
        make_environment("mine")


def test_every_member_of_the_protocol_is_required(monkeypatch):
    monkeypatch.setattr(ENVIRONMENTS, "_registered", {})
    ENVIRONMENTS.register("empty")(type("Empty", (), {}))
    members = [member for member in vars(Environment) if not member.startswith("_")]
    with pytest.raises(LimbeckError, match=f"lacks {', '.join(members)}"):
        make_environment("empty")


def test_the_calculator_replies_and_rewards_the_last_turn(example):
    environment = make_environment("calculator", answer_key="answer")
    episodes = [environment.reset({"answer": "84"}) for _ in range(2)]
    turns = ["12 dozen sevens: <calc>12*7</calc>", r"\boxed{80}"]
    assert environment.step(episodes, turns) == [EnvironmentStep(reply="84"), EnvironmentStep(reward=0.0)]
    assert environment.step(episodes[:1], [r"\boxed{84}"]) == [EnvironmentStep(reward=1.0)]


def test_the_calculator_stops_replying(example):
    environment = make_environment("calculator", max_calls=2)
    episode = environment.reset({"answer": "1"})
    steps = [environment.step([episode], ["<calc>1+1</calc>"])[0] for _ in range(3)]
    assert [step.reply for step in steps] == ["2", "2", None]
    assert [step.reward for step in steps] == [None, None, 1.0]  # the last number of the text is 1


def test_the_example_is_at_most_forty_lines():
    assert len([line for line in CALCULATOR.read_text().splitlines() if line.strip()]) <= 40


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1 + 2 * 3", "7"),
        ("-(2 - 5) / 2", "1.5"),
        ("0.1 * 3", "0.30000000000000004"),
        ("1/0", "error: division by zero"),
    ],
)
def test_the_calculator_computes(example, expression, result):
    assert example["calculate"](expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9**9",
        "__import__('os').getcwd()",
        "x",
        "'a' * 9",
        "1 +",
        "(" * 150,
        "9e999999",
        "a = 1",
        "1\x00",
        "-" * 199 + "1",
    ],
)
def test_the_calculator_evaluates_nothing_but_arithmetic(example, expression):
    result = example["calculate"](expression)
    assert result.startswith("error: ") or float(result)
