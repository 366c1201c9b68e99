"""Whether data, student and teacher agree on how a conversation is written and how an answer ends.

Where they do not, the teacher gives the student's last token a low probability, and the student learns not to stop.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from limbeck.config import DistillConfig
from limbeck.models import ModelSource, end_token_ids
from limbeck.train.build.data import teacher_tokenizer

_CONVERSATION = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]


def disagreements(config: DistillConfig, tokenizer: Any, last_tokens: Collection[int]) -> Iterator[str]:
    """A sentence for each disagreement.

    Args:
        config: of the run.
        tokenizer: of the student.
        last_tokens: those with which the answers of the data end; empty if they have no such token in common.
    """
    student = str(config.student.model_args.model_name_or_path)
    ends = {tokenizer.eos_token_id} | end_token_ids(ModelSource.from_args(config.student.model_args, "student"))
    in_data = _names(last_tokens, tokenizer)
    if not last_tokens:
        yield (
            f"The answers of the data end with different tokens, so they do not show how to end; {student} ends an answer with "
            f"{_names(ends, tokenizer)}. Use a template that ends each answer with it."
        )
    elif not ends & set(last_tokens):
        yield (
            f"The answers of the data end with {in_data}, and {student} with {_names(ends, tokenizer)}. The student's answers "
            f"end with either here; add {in_data} to the eos_token_id of the trained student, or use another template."
        )
    if not config.has_teacher or config.cross_tokenizer != "off":
        return
    other = teacher_tokenizer(config.teacher)
    if other is None:
        return
    teacher = str(config.teacher.model_args.model_name_or_path)
    ends = {other.eos_token_id} | end_token_ids(ModelSource.from_args(config.teacher.model_args, "teacher"))
    if last_tokens and not ends & set(last_tokens):
        yield (
            f"The answers of the data, and so the student's, end with {in_data}, and the teacher {teacher} ends an answer with "
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
    ours, theirs = (one.apply_chat_template(_CONVERSATION, tokenize=False) for one in (tokenizer, other))
    if ours != theirs:
        yield (
            f"The data is written with the chat template of {student} ({ours!r}), and the teacher {teacher} has another one "
            f"({theirs!r}); use a teacher with the same template, or set student.data_args.template to the teacher's."
        )


def _names(tokens: Collection[int], tokenizer: Any) -> str:
    return " or ".join(sorted(str(tokenizer.convert_ids_to_tokens(token)) for token in tokens))
