"""Whether data, student and teacher agree on how a conversation is written and how an answer ends.

Where they do not, the teacher gives the student's last token a low probability, and the student learns not to stop.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from typing import Any

from limbeck.config import DistillConfig
from limbeck.data import tokenize_rows
from limbeck.data.masks import IGNORE
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, end_token_ids
from limbeck.train.build.data import teacher_tokenizer, token_settings

_CONVERSATION = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]


def end_of_template(config: DistillConfig, tokenizer: Any, **changes: Any) -> set[int]:
    """The token with which the template of the data ends an answer; empty if it refuses the conversation.

    changes: replace settings of the data, such as the template.
    """
    settings = replace(
        token_settings(config),
        weight_key=None,
        domain_key=None,
        overlong="drop",
        reads_answers=True,
        on_bad_row="error",
        prompts_only=False,
        keep_columns=False,
        teacher_prompt=None,
        **changes,
    )
    try:
        examples, _ = tokenize_rows([{"messages": _CONVERSATION}], tokenizer, **{**asdict(settings), "workers": 1})
    except LimbeckError:  # the template refuses such a conversation, or the system message fills sequence_length
        return set()
    labels = examples.row(0)[1]
    return {int(labels[labels != IGNORE][-1])}


def disagreements(
    config: DistillConfig, tokenizer: Any, last_tokens: Collection[int], has_answers: bool = True
) -> Iterator[str]:
    """A sentence for each disagreement.

    Args:
        config: of the run.
        tokenizer: of the student.
        last_tokens: those with which the answers of the data end; empty if they have no such token in common.
        has_answers: whether the data has whole answers. Else ``last_tokens`` are those of its template.
    """
    answers = "The answers of the data" if has_answers else "Answers in the template of the data"
    student = str(config.student.model_args.model_name_or_path)
    ends = {tokenizer.eos_token_id} | end_token_ids(ModelSource.from_args(config.student.model_args, "student"))
    in_data = _names(last_tokens, tokenizer)
    if not last_tokens and has_answers:
        yield (
            f"The answers of the data end with different tokens, so they do not show how to end; {student} ends an answer with "
            f"{_names(ends, tokenizer)}. Use a template that ends each answer with it."
        )
    elif last_tokens and not ends & set(last_tokens):
        yield (
            f"{answers} end with {in_data}, and {student} with {_names(ends, tokenizer)}. The student's answers "
            f"end with either here; add {in_data} to the eos_token_id of the trained student, or use another template."
        )
    other = teacher_tokenizer(config.teacher) if config.has_teacher else None
    if other is None:
        return
    teacher = str(config.teacher.model_args.model_name_or_path)
    if config.cross_tokenizer != "off":
        own: dict[str, Any] = {"template": None, "template_kwargs": {}, "default_system": None, "prompt_file": None}
        theirs = {other.decode([token]) for token in end_of_template(config, other, **own)}
        table = {tokenizer.eos_token: other.eos_token, **config.cross_tokenizer_tokens}
        read = {table.get(token, token) for token in map(tokenizer.decode, ([token] for token in last_tokens))}
        if read and theirs and not read & theirs:
            yield (
                f"{answers}, and so the student's, end with {in_data}, which the teacher {teacher} reads as "
                f"{' or '.join(sorted(read))}, and its own template ends an answer with {' or '.join(sorted(theirs))}. It may "
                "teach the student not to end; name both tokens in cross_tokenizer_tokens."
            )
        return
    ends = {other.eos_token_id} | end_token_ids(ModelSource.from_args(config.teacher.model_args, "teacher"))
    if last_tokens and not ends & set(last_tokens):
        yield (
            f"{answers} end with {in_data}, and the teacher {teacher} ends an answer with "
            f"{_names(ends, other)}. It may teach the student not to end; use a teacher or a template with the same end."
        )
    if config.student.data_args.template not in (None, "native") or not (
        tokenizer.chat_template or other.chat_template
    ):
        return
    if not tokenizer.chat_template:
        yield (
            f"{student} has no chat template, so that the data is written without one, and the teacher {teacher} has one; set "
            "student.data_args.template to the teacher's."
        )
        return
    if not other.chat_template:
        yield (
            f"The teacher {teacher} has no chat template, and the data is written with that of {student}, which the teacher "
            "may never have seen; use a teacher that was trained on conversations, or set student.data_args.template."
        )
        return
    try:
        ours, of_teacher = _rendered(tokenizer, student), _rendered(other, f"the teacher {teacher}")
    except LimbeckError as error:
        yield str(error)
        return
    if ours != of_teacher:
        yield (
            f"The data is written with the chat template of {student} ({ours!r}), and the teacher {teacher} has another one "
            f"({of_teacher!r}); use a teacher with the same template, or set student.data_args.template to the teacher's."
        )


def _rendered(tokenizer: Any, name: str) -> str:
    """A conversation in the tokenizer's own template. Raises LimbeckError if the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(_CONVERSATION, tokenize=False))
    except Exception as error:  # a template is a program and may raise anything
        raise LimbeckError(
            f"The chat template of {name} cannot render a question with its answer ({error}), so the templates of student and "
            "teacher were not compared; set student.data_args.template to one that both models know."
        ) from error


def _names(tokens: Collection[int], tokenizer: Any) -> str:
    return " or ".join(sorted(str(tokenizer.convert_ids_to_tokens(token)) for token in tokens))
