"""From rows to token ids and shifted labels: the work that every process of a tokenisation does alike.

Files, caches and processes are not known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.data.masks import IGNORE, shift, supervise
from limbeck.data.rows import Conversation, RowKeys, check_characters, reader
from limbeck.data.sources import MAX_ROW, BadRow, Document, Item, Line, Record, RowError, decoded, place
from limbeck.data.sources.items import too_long
from limbeck.data.templates import Rendered, Template, check_template_kwargs, render, resolve_template
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = "tokens"
"""The format of rows that are token ids already."""

OVERLONG = ("truncate", "drop", "split")


@dataclass(frozen=True)
class TokenizeSettings:
    """What the tokens of a row depend on, beside the row and the tokenizer.

    template, template_kwargs, default_system, prompt_file, train_on: see ``templates.resolve_template``. question_key,
    answer_key, prompt_key, system_key: columns of a question-and-answer row. weight_key: the column that multiplies a row's
    loss. domain_key: the column that says to which domain a row belongs. sequence_length: tokens that a row may have.
    overlong: what happens to longer ones: ``truncate`` (cut from the right), ``drop``, or ``split`` (into consecutive rows
    of that length). on_bad_row: ``error`` or ``skip``. distill_on_prompt: learn every token. prompts: write each row up to its
    last answer and ask for that, for a model that is to write it; nothing is learned, and longer rows are dropped. workers:
    processes; None for as many as the data is worth.
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
    on_bad_row: str = "error"
    distill_on_prompt: bool = False
    prompts: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise LimbeckError(f"sequence_length = {self.sequence_length} leaves no token to predict; use 2 or more.")
        for name, allowed in (("overlong", OVERLONG), ("on_bad_row", ("error", "skip"))):
            if getattr(self, name) not in allowed:
                raise LimbeckError(f"{name} = {getattr(self, name)} is not one of {', '.join(allowed)}.")

    @cached_property
    def keys(self) -> RowKeys:
        """The columns of a row."""
        return RowKeys(
            self.question_key, self.answer_key, self.prompt_key, self.system_key, self.weight_key, self.domain_key
        )


@dataclass(frozen=True)
class Encoded:
    """A batch of rows as tokens: the fields of ``Examples`` that it adds, and what is to be counted.

    lengths, supervised: [rows]. domains: of each row, if a column names it. bad: rows that cannot be used, in order.
    counts: rows read, rewritten, texts of these, truncated, cut_answers, split; dropped: by reason.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32] | None
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int32]
    domains: list[str] | None
    bad: list[BadRow]
    counts: Counter[str]
    dropped: Counter[str]


@dataclass
class Encoder:
    """Turns batches of items into tokens; the same in every process."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    settings: TokenizeSettings

    def encode(self, items: Sequence[Item], form: str) -> Encoded:
        """The tokens of ``items``, whose rows have the shape ``form``. Bad rows are returned, not raised."""
        batch = _Batch(self.settings)
        texts: list[Rendered] = []
        domains: list[str] = []  # of each text
        for item in items:
            if isinstance(item, BadRow):
                batch.bad.append(item)
            elif isinstance(item, Document):
                try:
                    if self.settings.prompts:
                        raise RowError("no question", f"{item.where} is text in tokens, which asks nothing.")
                    ids = document_ids(item)
                except RowError as error:
                    batch.bad.append(BadRow(item.file, 0, item.number, error.kind, str(error)))
                else:
                    batch.add(ids, np.ones(len(ids), dtype=bool), None, "")
            else:
                found, domain = self._texts(item, form, batch)
                texts += found
                domains += [domain] * len(found)
        for domain, encoded in zip(domains, self._encode(texts), strict=True):
            batch.add(*encoded, domain)
        batch.counts["rows"] = len(items)
        return batch.done()

    def texts_of(self, record: Record, form: str) -> tuple[Conversation, tuple[Rendered, ...]]:
        """A row of the shape ``form`` as a conversation, and the texts it is written as; raises LimbeckError for a bad one."""
        conversation = reader(form, self.settings.keys, self.settings.prompts)(record)
        texts = render(conversation, self.template, self.tokenizer, self.settings.template_kwargs, record.where)
        for one in texts:
            if len(one.text) > MAX_ROW:
                raise RowError("too long", too_long(record.where))
            if not one.text.isascii():
                check_characters(one.text, record.where)
        return conversation, texts

    def domain_of(self, record: Record) -> str:
        """What the row says in the column of domains; empty if there is no such column."""
        key = self.settings.domain_key
        if key is None:
            return ""
        value = record.row.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise RowError("no domain", f'{record.where}: "{key}" must name the row\'s domain; correct domain_key.')
        return str(value)

    def _texts(self, item: Record | Line, form: str, batch: _Batch) -> tuple[tuple[Rendered, ...], str]:
        """The texts of an item and its domain; no text for a bad row, which the batch is told."""
        number = item.number if isinstance(item, Record) else None
        where = place(item.file, item.line, number)
        try:
            record = decoded(item)
            domain = self.domain_of(record)
            _, texts = self.texts_of(record, form)
        except RowError as error:
            batch.bad.append(BadRow(item.file, item.line, number, error.kind, str(error)))
        except LimbeckError as error:
            batch.bad.append(BadRow(item.file, item.line, number, "refused by the template", str(error)))
        except (ArithmeticError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
            # Whatever a chat template does with a row of an unforeseen shape; the row is at fault, not the run.
            said = " ".join(str(error).split()) or type(error).__name__
            reason = f"{where}: the chat template ({self.template.name}) cannot render this row: {said}"
            batch.bad.append(BadRow(item.file, item.line, number, "refused by the template", reason))
        else:
            if len(texts) > 1:
                batch.counts.update(rewritten=1, texts=len(texts))
            return texts, domain
        return (), ""

    def _encode(
        self, rendered: Sequence[Rendered]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float32] | None]]:
        """Token ids [n], which of them are supervised [n], and their weights [n] or None, for each text."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # traces of earlier calls
        backend.no_padding()
        encodings = backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        encodings.reverse()
        everything = self.settings.distill_on_prompt and not self.settings.prompts
        for r in rendered:
            encoding = encodings.pop()  # freed one by one: an encoding holds many times its text
            ids = np.array(encoding.ids, dtype=np.int32)
            places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            yield ids, *supervise(places, r.spans, everything, r.weight)


def make_encoder(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> Encoder:
    """The encoder that the settings ask for; raises LimbeckError for a template or tokenizer that cannot be used."""
    if not tokenizer.is_fast:
        raise LimbeckError(
            f"The tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) is not a fast one, so the place of "
            "an answer among its tokens is unknown; use a checkpoint that holds a tokenizer.json."
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


def document_ids(document: Document) -> NDArray[np.int32]:
    """[n] the tokens of a document; raises RowError if one is no token id."""
    ids = document.ids
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**31):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise RowError(
            "token id out of range",
            f"{document.where} holds the token id {wrong}; ids are whole numbers from 0, below 2^31.",
        )
    return ids.astype(np.int32)


class _Batch:
    """The rows of a batch as they are found, cut, split or dropped as the settings say."""

    def __init__(self, settings: TokenizeSettings) -> None:
        self._limit = settings.sequence_length
        self._overlong = settings.overlong
        self._prompts = settings.prompts
        self._domains: list[str] | None = None if settings.domain_key is None else []
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
    ) -> None:
        """One row, before it is cut."""
        limit, overlong = self._limit, len(ids) > self._limit
        if overlong and (self._prompts or self._overlong == "drop"):
            self.dropped[f"longer than {limit} tokens"] += 1
            return
        if overlong and self._overlong == "truncate":
            # The cut is inside a turn if it separates two neighbours that are both learned.
            inside = bool(supervised[limit] and supervised[limit - 1])
            ids = ids[:limit]
        labels, weights = shift(ids, supervised, weights)
        count = int(np.count_nonzero(labels != IGNORE))
        if not count and not self._prompts:
            cut = overlong and self._overlong == "truncate"
            self.dropped[f"no supervised token in the first {limit}" if cut else "no token to learn"] += 1
            return
        if not overlong or self._overlong == "truncate":
            if overlong:
                self.counts["truncated"] += 1
                self.counts["cut_answers"] += inside
            self._keep(ids, labels, weights, count, domain)
            return
        self.counts["split"] += 1
        for start in range(0, len(ids), limit):
            part = slice(start, start + limit)
            # The last position of a piece still knows what comes next, so no target is lost between two pieces.
            here = int(np.count_nonzero(labels[part] != IGNORE))
            if here:
                self._keep(ids[part], labels[part], None if weights is None else weights[part], here, domain)
            else:
                self.dropped["pieces of split rows without a supervised token"] += 1

    def _keep(
        self,
        ids: NDArray[np.int32],
        labels: NDArray[np.int32],
        weights: NDArray[np.float32] | None,
        count: int,
        domain: str,
    ) -> None:
        self._rows.append((ids, labels, weights, count))
        if self._domains is not None:
            self._domains.append(domain)

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
            bad=self.bad,
            counts=self.counts,
            dropped=self.dropped,
        )
