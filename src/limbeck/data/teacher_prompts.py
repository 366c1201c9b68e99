"""Prompts that only the teacher reads, such as one that contains the reference answer.

The teacher computes the distribution of the same answer tokens after its own prompt. A text takes the place of the row's last
question; a list of messages takes the place of the whole conversation before the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE
from limbeck.data.rows import Conversation, Message, checked_text, listed, turns_of
from limbeck.data.sources import Record, RowError
from limbeck.data.templates import Rendered
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from jinja2 import Template

_KIND = "no teacher prompt"


@dataclass(frozen=True)
class TeacherPrompt:
    """Where the teacher's prompt of a row comes from.

    key:        column with a text or a list of messages; or None.
    template:   Jinja template of a text, whose variables are the columns of the row; or None.
    max_length: maximum number of tokens of the whole prompt. Rows with a longer one are left out.

    Raises LimbeckError for a template that is not valid Jinja.
    """

    key: str | None
    template: str | None
    max_length: int

    def __post_init__(self) -> None:
        if self.template is not None:
            _compiled(self.template)

    def conversation(self, record: Record, student: Conversation, texts: Sequence[Rendered]) -> Conversation:
        """Returns the teacher's prompt for a row.

        record: the row. student: its conversation. texts: what the student is trained on.

        Raises RowError if the row lacks the column, or if it is not clear which answer follows the prompt.
        """
        answers = sum(weight > 0 for text in texts for _, _, weight in text.spans)
        if student.plain or answers + student.is_prompt != 1:
            found = "is plain text" if student.plain else f"has {answers} answers that are trained"
            raise RowError(
                _KIND,
                f"{record.where} {found}, and teacher.prompt takes the place of the text before one answer; give rows with one "
                "answer, or set student.data_args.train_on: last.",
            )
        given = self._value(record)
        if isinstance(given, list):
            return Conversation(given, student.tools, is_prompt=True)
        messages = student.messages if student.is_prompt else student.messages[: _last_answer(student.messages)]
        last = max(turn for turn, message in enumerate(messages) if message["role"] == "user")
        return replace(
            student,
            messages=[*messages[:last], {**messages[last], "content": given}, *messages[last + 1 :]],
            is_prompt=True,
        )

    def _value(self, record: Record) -> str | list[Message]:
        if self.template is not None:
            return checked_text(_rendered(self.template, record), f"{record.where}: teacher.prompt.template")
        assert self.key is not None
        value = record.row.get(self.key)
        if value is None:
            raise RowError(
                _KIND, f'{record.where} has no "{self.key}" (it has {listed(record.row)}); correct teacher.prompt.key.'
            )
        if isinstance(value, (list, dict)):
            messages = turns_of(record, self.key)
            if not messages or messages[-1]["role"] == "assistant":
                raise RowError(
                    _KIND,
                    f'{record.where}: "{self.key}" must end before the answer, with a turn that is not assistant.',
                )
            return messages
        text = checked_text(value, f'{record.where}: "{self.key}"')
        if not text.strip():
            raise RowError(_KIND, f'{record.where}: "{self.key}" is empty; give every row a prompt of the teacher.')
        return text


def teacher_view(examples: Examples, rows: Sequence[int]) -> Examples:
    """Returns the ``rows`` as the teacher reads them: its own prompt, and the tokens from the first supervised one on.

    Each row has the same labels in the same order as in ``examples``, so the supervised positions correspond one to one.
    """
    tokens, labels, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int32)], [0]
    for row in rows:
        own, of_own = examples.row(row)
        prompt = teacher_prompt_of(examples, row)
        supervised = np.flatnonzero(of_own != IGNORE)
        first = int(supervised[0]) if len(supervised) else len(own) - 1
        tokens += [prompt, own[first + 1 :]]
        labels += [np.full(len(prompt) - 1, IGNORE, np.int32), of_own[first:]]
        lengths.append(len(prompt) + len(own) - first - 1)
    return Examples(np.concatenate(tokens), np.concatenate(labels), np.cumsum(lengths, dtype=np.int64))


def teacher_prompt_of(examples: Examples, row: int) -> NDArray[np.int32]:
    """Returns the token ids of the teacher's prompt of a row. They must have been kept."""
    assert examples.teacher_prompts is not None and examples.teacher_prompt_ends is not None
    start = examples.teacher_prompt_ends[row - 1] if row else 0
    return examples.teacher_prompts[start : examples.teacher_prompt_ends[row]]


def with_teacher_prompts(examples: Examples, source: Examples) -> Examples:
    """Returns ``examples`` with the teacher's prompts of the rows of ``source`` that ``examples.row_ids`` names."""
    assert examples.row_ids is not None
    prompts = [teacher_prompt_of(source, int(row)) for row in examples.row_ids]
    ends = np.cumsum([len(prompt) for prompt in prompts], dtype=np.int64)
    return replace(examples, teacher_prompts=np.concatenate(prompts), teacher_prompt_ends=ends)


def _last_answer(messages: Sequence[Message]) -> int:
    """Returns the number of the last assistant turn that is trained."""
    return max(
        turn
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1.0) > 0
    )


@lru_cache
def _compiled(template: str) -> Template:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template)
    except TemplateError as error:
        raise LimbeckError(f"teacher.prompt.template is not valid Jinja: {error}; correct it.") from error


def _rendered(template: str, record: Record) -> Any:
    from jinja2 import TemplateError, UndefinedError

    try:
        # Tables store missing values as nulls.
        return _compiled(template).render({name: value for name, value in record.row.items() if value is not None})
    except UndefinedError as error:
        raise RowError(
            _KIND,
            f"{record.where}: teacher.prompt.template reads what the row does not have ({error}; it has "
            f"{listed(record.row)}); correct the template.",
        ) from error
    except (TemplateError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise RowError(
            _KIND, f"{record.where}: teacher.prompt.template cannot be rendered: {error}; correct it."
        ) from error
