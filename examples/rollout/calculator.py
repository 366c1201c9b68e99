"""An environment with a tool: the student writes <calc>12*7</calc> and gets the result as the next turn.

Set ``rollout.environment: calculator``, its environment_kwargs and ``max_turns``. The prompts must describe the tool.
"""

import ast
import operator
import re

from limbeck.registry import ENVIRONMENTS
from limbeck.rollout import EnvironmentStep, make_environment

CALL = re.compile(r"<calc>(.{1,200}?)</calc>")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(node):
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("only numbers, + - * / and parentheses are allowed")


def calculate(expression):
    try:
        return str(value(ast.parse(expression.strip(), mode="eval").body))
    except (ArithmeticError, SyntaxError, ValueError) as error:
        return f"error: {error}"


class Calculator:
    def __init__(self, max_calls=4, **arguments):
        self.max_calls, self.answers = max_calls, make_environment("exact", **arguments)

    def reset(self, row):
        return {"answer": self.answers.reset(row), "calls": 0}

    def step(self, episodes, completions):
        return [self._step(episode, completion) for episode, completion in zip(episodes, completions, strict=True)]

    def _step(self, episode, completion):
        call = CALL.search(completion)
        if call is None or episode["calls"] == self.max_calls:
            return self.answers.step([episode["answer"]], [completion])[0]  # the last turn is rewarded
        episode["calls"] += 1
        return EnvironmentStep(reply=calculate(call[1]))


ENVIRONMENTS.register("calculator")(Calculator)
