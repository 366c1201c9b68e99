"""Encodes rows into token ids and shifted labels. Every tokenising process does this work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.data.masks import IGNORE, last_answer, shift, supervise
from limbeck.data.rows import Conversation, RowKeys, check_characters, reader
from limbeck.data.sources import MAX_ROW, BadRow, Document, Item, Line, Record, RowError, decoded, place
from limbeck.data.sources.items import too_long
from limbeck.data.teacher_prompts import TeacherPrompt
from limbeck.data.templates import Rendered, Template, check_template_kwargs, render, resolve_template
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = "tokens"
"""The format of pretokenised rows."""

OVERLONG = ("truncate", "drop", "split")


@dataclass(frozen=True)
class TokenizeSettings:
    """How rows are tokenised.

    template, template_kwargs, default_system, prompt_file, train_on: see ``templates.resolve_template``.
    question_key, answer_key, prompt_key, system_key: columns of a question-and-answer row.
    weight_key:        column with the factor of a row's loss.
    domain_key:        column with the domain of a row.
    sequence_length:   maximum number of tokens in a row.
    overlong:          handling of longer rows: ``truncate`` (from the right), ``drop``, or ``split`` (into consecutive rows).
    reads_answers:     whether the answers of the rows are used. If not, ``drop`` leaves out rows whose prompt is too long, and
                       cuts longer answers.
    on_bad_row:        ``error`` or ``skip``.
    distill_on_prompt: supervise every token.
    prompts_only:      a row may lack its answer. It is then a prompt, as with ``prompts``; other rows are not changed.
    prompts:           render each row up to its last answer, followed by the generation prompt. Nothing is supervised, and
                       longer rows are dropped.
    keep_columns:      keep the columns of each row as well; see ``Examples.columns_of``.
    teacher_prompt:    the prompt that the teacher reads instead of the student's, or None if they read the same.
    workers:           number of processes; None chooses it by the size of the data.
    """

    template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    default_system: str | None = None
    prompt_file: str | None = None
    train_on: str = "all"
    question_key: str = "question"
    answer_key: str = "answer"
    prompt_key: str | None = None
    system_key: str | None = None
    weight_key: str | None = "weight"
    domain_key: str | None = None
    sequence_length: int = 1024
    overlong: str = "truncate"
    reads_answers: bool = True
    on_bad_row: str = "error"
    distill_on_prompt: bool = False
    prompts_only: bool = False
    prompts: bool = False
    keep_columns: bool = False
    teacher_prompt: TeacherPrompt | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise LimbeckError(f"sequence_length = {self.sequence_length} leaves no token to predict; use 2 or more.")
        for name, allowed in (("overlong", OVERLONG), ("on_bad_row", ("error", "skip"))):
            if getattr(self, name) not in allowed:
                raise LimbeckError(f"{name} = {getattr(self, name)} is not one of {', '.join(allowed)}.")
        if self.teacher_prompt is not None and self.overlong == "split":
            raise LimbeckError(
                "overlong = split cuts answers from their prompts, which teacher.prompt needs; use drop."
            )

    def truncates(self, supervised: NDArray[np.bool_]) -> bool:
        """Whether a row longer than ``sequence_length`` with these supervised tokens [n] is cut, not dropped or split."""
        if self.overlong == "drop" and not self.reads_answers:
            return last_answer(supervised) < self.sequence_length
        return self.overlong == "truncate"

    @cached_property
    def keys(self) -> RowKeys:
        """The columns of a row."""
        return RowKeys(
            self.question_key, self.answer_key, self.prompt_key, self.system_key, self.weight_key, self.domain_key
        )


@dataclass(frozen=True)
class Encoded:
    """An encoded batch of rows: its part of ``Examples``, and counts for the report.

    lengths, supervised: [rows]. domains: of each row, if a column names it. columns: of each row, as UTF-8 JSON, if they are
    kept. teacher_prompts: token ids of each row's prompt for the teacher, if it has its own. bad: unusable rows, in order.
    counts: see the fields of ``DataReport``. dropped: number of rows, by reason.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32] | None
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int32]
    domains: list[str] | None
    columns: list[bytes] | None
    teacher_prompts: list[NDArray[np.int32]] | None
    bad: list[BadRow]
    counts: Counter[str]
    dropped: Counter[str]


@dataclass
class Encoder:
    """Encodes batches of items; every process holds a copy."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    settings: TokenizeSettings

    def encode(self, items: Sequence[Item], form: str) -> Encoded:
        """Encodes ``items``, whose rows have the format ``form``. Bad rows are returned, not raised."""
        batch = _Batch(self.settings)
        texts: list[Rendered] = []
        domains: list[str] = []  # of each text
        columns: list[bytes] = []
        of_teacher: list[Rendered] = []
        for item in items:
            if isinstance(item, BadRow):
                batch.bad.append(item)
            elif isinstance(item, Document):
                try:
                    if self.settings.prompts:
                        raise RowError("no question", f"{item.where} is pretokenised text, which has no question.")
                    if self.settings.teacher_prompt is not None:
                        raise RowError(
                            "no teacher prompt",
                            f"{item.where} is pretokenised text, to which teacher.prompt does not apply.",
                        )
                    ids = document_ids(item)
                except RowError as error:
                    batch.bad.append(BadRow(item.file, 0, item.number, error.kind, str(error)))
                else:
                    batch.add(ids, np.ones(len(ids), dtype=bool), None, "", b"{}")
            else:
                found, domain, row, prompt = self._texts(item, form, batch)
                texts += found
                of_teacher += prompt
                domains += [domain] * len(found)
                columns += [row] * len(found)
        prompts = [rendered.is_prompt for rendered in texts]
        teacher_ids = (ids for ids, _, _ in self._encode(of_teacher))
        for domain, row, is_prompt, encoded in zip(domains, columns, prompts, self._encode(texts), strict=True):
            batch.add(*encoded, domain, row, is_prompt, next(teacher_ids, None))
        batch.counts["rows"] = len(items)
        return batch.done()

    def texts_of(self, record: Record, form: str) -> tuple[Conversation, tuple[Rendered, ...]]:
        """Returns the conversation and the rendered texts of a row with the format ``form``.

        Raises LimbeckError for a bad row.
        """
        conversation = reader(form, self.settings.keys, self.settings.prompts, self.settings.prompts_only)(record)
        return conversation, self._rendered(conversation, record)

    def teacher_prompt_of(
        self, record: Record, conversation: Conversation, texts: Sequence[Rendered]
    ) -> tuple[Rendered, ...]:
        """Returns the teacher's prompt for a row; empty if it reads that of the student.

        Raises LimbeckError for a row without one.
        """
        if self.settings.teacher_prompt is None or self.settings.prompts:
            return ()
        return self._rendered(self.settings.teacher_prompt.conversation(record, conversation, texts), record)

    def _rendered(self, conversation: Conversation, record: Record) -> tuple[Rendered, ...]:
        texts = render(conversation, self.template, self.tokenizer, self.settings.template_kwargs, record.where)
        for one in texts:
            if len(one.text) > MAX_ROW:
                raise RowError("too long", too_long(record.where))
            if not one.text.isascii():
                check_characters(one.text, record.where)
        return texts

    def domain_of(self, record: Record) -> str:
        """Returns the value of the row's ``domain_key`` column; empty if none is configured."""
        key = self.settings.domain_key
        if key is None:
            return ""
        value = record.row.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise RowError("no domain", f'{record.where}: "{key}" must name the row\'s domain; correct domain_key.')
        return str(value)

    def _texts(
        self, item: Record | Line, form: str, batch: _Batch
    ) -> tuple[tuple[Rendered, ...], str, bytes, tuple[Rendered, ...]]:
        """Returns the texts of an item, its domain, its columns if they are kept, and the teacher's prompt if it has its own.
        A bad row has no text and is added to ``batch.bad``.
        """
        number = item.number if isinstance(item, Record) else None
        where = place(item.file, item.line, number)
        try:
            record = decoded(item)
            domain = self.domain_of(record)
            conversation, texts = self.texts_of(record, form)
            of_teacher = self.teacher_prompt_of(record, conversation, texts)
        except RowError as error:
            batch.bad.append(BadRow(item.file, item.line, number, error.kind, str(error)))
        except LimbeckError as error:
            batch.bad.append(BadRow(item.file, item.line, number, "refused by the template", str(error)))
        except (ArithmeticError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
            # A chat template may raise any of these for a row that it does not expect.
            message = " ".join(str(error).split()) or type(error).__name__
            reason = f"{where}: the chat template ({self.template.name}) cannot render this row: {message}"
            batch.bad.append(BadRow(item.file, item.line, number, "refused by the template", reason))
        else:
            if len(texts) > 1:
                batch.counts.update(rewritten=1, texts=len(texts))
            return texts, domain, columns_json(record.row) if self.settings.keep_columns else b"", of_teacher
        return (), "", b"", ()

    def _encode(
        self, rendered: Sequence[Rendered]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float32] | None]]:
        """Yields, for each text, token ids [n], which of them are supervised [n], and their weights [n] or None."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # earlier calls may have enabled these
        backend.no_padding()
        encodings = backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        encodings.reverse()
        everything = self.settings.distill_on_prompt and not self.settings.prompts
        for r in rendered:
            encoding = encodings.pop()  # freed one by one, because an encoding is many times larger than its text
            ids = np.array(encoding.ids, dtype=np.int32)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            yield ids, *supervise(offsets, r.spans, everything, r.weight)


def make_encoder(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> Encoder:
    """Returns the encoder of the settings. Raises LimbeckError for an unusable template or tokenizer."""
    if not tokenizer.is_fast:
        raise LimbeckError(
            f"The tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) is not a fast one, so the tokens "
            "of an answer are unknown; use a checkpoint that holds a tokenizer.json."
        )
    template = resolve_template(
        settings.template,
        tokenizer,
        default_system=settings.default_system,
        prompt_file=settings.prompt_file,
        train_on=settings.train_on,
    )
    check_template_kwargs(settings.template_kwargs, template)
    return Encoder(tokenizer, template, settings)


def columns_json(row: Mapping[str, Any]) -> bytes:
    """Returns a row as UTF-8 JSON; values without a JSON form, such as dates, become text."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def document_ids(document: Document) -> NDArray[np.int32]:
    """Returns the token ids [n] of a document. Raises RowError for a number outside of the range of token ids."""
    ids = document.ids
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**31):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise RowError(
            "token id out of range",
            f"{document.where} holds the token id {wrong}; ids are whole numbers from 0, below 2^31.",
        )
    return ids.astype(np.int32)


class _Batch:
    """Collects the rows of a batch, truncated, split or dropped as the settings require."""

    def __init__(self, settings: TokenizeSettings) -> None:
        self._limit = settings.sequence_length
        self._settings = settings
        self._continued = settings.prompts_only  # the answers to prompts are written in the same sequence
        self._domains: list[str] | None = None if settings.domain_key is None else []
        self._columns: list[bytes] | None = [] if settings.keep_columns else None
        self._teacher = None if settings.prompts else settings.teacher_prompt
        self._teacher_prompts: list[NDArray[np.int32]] | None = None if self._teacher is None else []
        self._rows: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32] | None, int]] = []
        self.bad: list[BadRow] = []
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def add(
        self,
        ids: NDArray[np.int32],
        supervised: NDArray[np.bool_],
        weights: NDArray[np.float32] | None,
        domain: str,
        columns: bytes,
        is_prompt: bool = False,
        teacher_prompt: NDArray[np.int32] | None = None,
    ) -> None:
        """Adds one row of any length."""
        if self._teacher is not None and teacher_prompt is not None and len(teacher_prompt) > self._teacher.max_length:
            self.dropped[f"prompt of the teacher longer than {self._teacher.max_length} tokens"] += 1
            return
        limit, overlong = self._limit, len(ids) > self._limit
        if is_prompt and self._continued and len(ids) == limit:
            self.dropped[f"prompt of {limit} tokens, which leaves no room for an answer"] += 1
            return
        truncated = overlong and self._settings.truncates(supervised)
        if overlong and (is_prompt or (self._settings.overlong == "drop" and not truncated)):
            self.dropped[f"longer than {limit} tokens"] += 1
            return
        if truncated:
            # The cut is inside a turn if the tokens on both sides of it are supervised.
            inside = bool(supervised[limit] and supervised[limit - 1])
            ids = ids[:limit]
        labels, weights = shift(ids, supervised, weights)
        count = int(np.count_nonzero(labels != IGNORE))
        if not count and not is_prompt:
            self.dropped[f"no supervised token in the first {limit}" if truncated else "no supervised token"] += 1
            return
        if not overlong or truncated:
            if truncated:
                self.counts["truncated"] += 1
                self.counts["cut_answers"] += inside
            self._keep(ids, labels, weights, count, domain, columns)
            if self._teacher_prompts is not None and teacher_prompt is not None:
                self._teacher_prompts.append(teacher_prompt)
            return
        self.counts["split"] += 1
        for start in range(0, len(ids), limit):
            part = slice(start, start + limit)
            # Labels are shifted before the split, so the last position of a piece keeps its target.
            here = int(np.count_nonzero(labels[part] != IGNORE))
            if here:
                self._keep(ids[part], labels[part], None if weights is None else weights[part], here, domain, columns)
            else:
                self.dropped["pieces of split rows without a supervised token"] += 1

    def _keep(
        self,
        ids: NDArray[np.int32],
        labels: NDArray[np.int32],
        weights: NDArray[np.float32] | None,
        count: int,
        domain: str,
        columns: bytes,
    ) -> None:
        self._rows.append((ids, labels, weights, count))
        if self._domains is not None:
            self._domains.append(domain)
        if self._columns is not None:
            self._columns.append(columns)

    def done(self) -> Encoded:
        rows = self._rows
        empty = np.zeros(0, dtype=np.int32)
        weights = None
        if any(row[2] is not None for row in rows):
            weights = np.concatenate(
                [(row[1] != IGNORE).astype(np.float32) if row[2] is None else row[2] for row in rows]
            )
        return Encoded(
            tokens=np.concatenate([row[0] for row in rows]) if rows else empty,
            labels=np.concatenate([row[1] for row in rows]) if rows else empty,
            weights=weights,
            lengths=np.array([len(row[0]) for row in rows], dtype=np.int64),
            supervised=np.array([row[3] for row in rows], dtype=np.int32),
            domains=self._domains,
            columns=self._columns,
            teacher_prompts=self._teacher_prompts,
            bad=self.bad,
            counts=self.counts,
            dropped=self.dropped,
        )
