"""Accuracy on files of questions and reference answers: the model writes, and a verifier compares."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from limbeck.data.encode import Encoder
from limbeck.data.rows import reader
from limbeck.data.sources import BadRow, Document, Source, decoded, inputs_of
from limbeck.data.tokenize import read_input
from limbeck.errors import LimbeckError
from limbeck.evaluate.results import Result
from limbeck.evaluate.text_model import TextModel
from limbeck.rollout.generator import SamplingParams
from limbeck.rollout.verifiers import ExactVerifier, MathVerifier, Verifier

VERIFIERS: dict[str, type[ExactVerifier] | type[MathVerifier]] = {"exact": ExactVerifier, "math": MathVerifier}


@dataclass(frozen=True)
class Question:
    """text: the rendered prompt. reference: the right answer, alone or at the end of a solution."""

    text: str
    reference: str


def read_questions(file: str, encoder: Encoder, limit: int | None = None) -> list[Question]:
    """The first ``limit`` rows of ``file``, a name as in ``file_name``; the last answer of each is the reference.

    Raises:
        LimbeckError: if a row cannot be read or has no answer.
    """
    return list(islice(_questions(file, encoder), limit))


def _questions(file: str, encoder: Encoder) -> Iterator[Question]:
    source = Source.named(file)
    for one in inputs_of(source):
        form, items = read_input(one, source, encoder.settings)
        for item in items:
            if isinstance(item, BadRow):
                raise LimbeckError(item.reason)
            if isinstance(item, Document):
                raise LimbeckError(
                    f"{item.where} is pretokenised text, which has no question; give a file of questions."
                )
            record = decoded(item)
            _, (rendered,) = encoder.texts_of(record, form)
            answer = reader(form, encoder.settings.keys)(record).messages[-1]
            if answer["role"] != "assistant":
                raise LimbeckError(
                    f"{record.where} ends without an answer; give a reference answer to its last question."
                )
            yield Question(rendered.text, str(answer["content"]))


def measure_accuracy(
    model: TextModel, file: str, sampling: SamplingParams, *, verifier: str, limit: int | None = None, slots: int = 64
) -> Result:
    """The share of right answers to the questions of ``file``. An answer that cannot be compared counts as wrong.

    Args:
        sampling: with ``n`` above 1, the mean over the samples of a question.
        verifier: a key of ``VERIFIERS``.
        limit: most questions.
        slots: answers that are written at the same time.
    """
    begun = time.perf_counter()
    questions = read_questions(file, model.encoder, limit)
    if not questions:
        raise LimbeckError(f"{file} has no rows; give a file of questions and answers.")
    compare: Verifier = VERIFIERS[verifier]()
    try:
        completions = model.write([question.text for question in questions], sampling, slots)
        repeated = [question for question in questions for _ in range(sampling.n)]
        texts = [model.decode(completion) for completion in completions]
        scores = compare.scores(texts, [question.reference for question in repeated])
    finally:
        compare.close()
    answers: list[dict[str, Any]] = [
        {
            "prompt": question.text,
            "reference": question.reference,
            "answer": text,
            "correct": score.value == 1,
            "reason": score.reason,
        }
        for question, text, score in zip(repeated, texts, scores, strict=True)
    ]
    count = len(answers)
    metrics = {
        "accuracy": sum(answer["correct"] for answer in answers) / count,
        "unscored_share": sum(bool(score.reason) for score in scores) / count,
        "truncated_share": sum(not completion.finished for completion in completions) / count,
        "mean_length": sum(len(completion.token_ids) for completion in completions) / count,
    }
    settings = {
        "file": file, "questions": len(questions), "verifier": verifier, "samples": sampling.n,
        "max_new_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "top_k": sampling.top_k, "seed": sampling.seed,
    }  # fmt: skip
    seconds = time.perf_counter() - begun
    return Result(Path(file).stem, model.name, metrics, settings, seconds, answers)
