"""Prints one row token by token: prompt, learned, masked and cut tokens.

The row is read, rendered and masked as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from limbeck.data.encode import TOKENS, Encoder, TokenizeSettings, document_ids
from limbeck.data.masks import supervise
from limbeck.data.rows import Conversation, shown_format
from limbeck.data.sources import BadRow, Document, Record, Source, decoded, inputs_of
from limbeck.data.templates import Rendered, render, resolve_template
from limbeck.data.tokenize import read_input
from limbeck.data.tokenizers import check_same_tokenizer
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from limbeck.data.alignment import TokenText, Translator

_STYLES = {
    "prompt": "cyan", "learned": "green", "masked": "yellow", "cut": "red", "read": "cyan", "compared": "green"
}  # fmt: skip
_MEANINGS = {
    "prompt": "read, not learned",
    "learned": "predicted, part of the loss",
    "masked": "an answer of weight 0: read, not learned",
    "cut": "beyond sequence_length: never read",
}
_TEACHER_MEANINGS = {"read": "read by the teacher", "compared": "aligned with the student's tokens of the same text"}
_INDENT = 10
_MAX_SPANS = 8


@dataclass(frozen=True)
class ShownToken:
    """A token, its kind (a key of the legend), and the weight of its loss."""

    id: int
    text: str
    kind: str
    special: bool
    weight: float


@dataclass(frozen=True)
class FoundRow:
    """A row of the data, the format of its file, and its domain if it has a name."""

    item: Record | Document
    form: str
    domain: str | None


def find_row(sources: Sequence[Source], index: int, encoder: Encoder) -> FoundRow:
    """Returns row ``index`` (from 0) of the sources, counted in order and including bad rows.

    Raises LimbeckError if there are fewer rows, or if that row cannot be read.
    """
    seen = 0
    for source in sources:
        for one in inputs_of(source):
            form, items = read_input(one, source, encoder.settings)
            for item in items:
                if seen < index:
                    seen += 1
                    continue
                if isinstance(item, BadRow):
                    raise LimbeckError(item.reason)
                if isinstance(item, Document):
                    return FoundRow(item, form, source.domain)
                record = decoded(item)
                return FoundRow(record, form, encoder.domain_of(record) or source.domain)
    raise LimbeckError(f"--row {index} does not exist: the data has {seen:,} rows, counted from 0.")


def tokens_of(rendered: Rendered, encoder: Encoder) -> list[ShownToken]:
    """Returns the tokens of one text as in training. The first is always prompt, because no position predicts it."""
    tokenizer, settings = encoder.tokenizer, encoder.settings
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    supervised, weights = supervise(offsets, rendered.spans, settings.distill_on_prompt, rendered.weight)
    answers, _ = supervise(offsets, [(start, end, 1.0) for start, end, _ in rendered.spans])
    special, end_of_row = _special_ids(tokenizer), _end_of_row(supervised, settings)
    shown, reached = [], 0
    for at, (token, (start, end)) in enumerate(zip(encoded["input_ids"], offsets.tolist(), strict=True)):
        kind = "learned" if at and supervised[at] else "masked" if at and answers[at] else "prompt"
        if at >= end_of_row:
            kind = "cut"
        weight = float(1.0 if weights is None else weights[at]) if kind == "learned" else 0.0
        text = rendered.text[min(start, reached) : end]
        if "\ufffd" in tokenizer.decode([token]):
            text = "\ufffd"  # part of a character
        shown.append(ShownToken(token, text, kind, token in special, weight))
        reached = max(reached, end)
    return shown


def tokens_of_document(document: Document, encoder: Encoder) -> list[ShownToken]:
    """Returns the decoded tokens of a pretokenised row; all except the first are learned."""
    special, known = _special_ids(encoder.tokenizer), set(encoder.tokenizer.get_vocab().values())
    ids = document_ids(document)
    shown, end_of_row = [], _end_of_row(np.ones(len(ids), dtype=bool), encoder.settings)
    for at, token in enumerate(ids.tolist()):
        text = encoder.tokenizer.decode([token]) if token in known else f"(unknown: {token})"
        kind = "cut" if at >= end_of_row else "learned" if at else "prompt"
        shown.append(ShownToken(token, text, kind, token in special, float(kind == "learned")))
    return shown


def print_row(
    console: Console,
    found: FoundRow,
    encoder: Encoder,
    *,
    teacher: PreTrainedTokenizerBase | None,
    translator: Translator | None = None,
    ids: bool = False,
) -> None:
    """Prints a row as the student learns it and, where it differs, as the teacher reads it.

    teacher: the teacher's tokenizer, if it must equal the student's. translator: for a teacher with another tokenizer.
    """
    if isinstance(found.item, Document):
        texts, template, weight = None, "not used on tokens", 1.0
        of_texts = [tokens_of_document(found.item, encoder)]
    else:
        conversation, texts = encoder.texts_of(found.item, found.form)
        template = encoder.template.name + (", on running text: not used" if conversation.plain else "")
        weight = conversation.weight
        of_texts = [tokens_of(rendered, encoder) for rendered in texts]
    domain = f", domain {found.domain}" if found.domain else ""
    shape = TOKENS if found.form == TOKENS else shown_format(found.form, encoder.settings.keys)
    _line(console, f"row       {found.item.where} ({shape}), weight {weight:g}{domain}")
    _line(console, f"template  {template}")
    if texts is not None and encoder.template.note:
        _line(console, f"note      {encoder.template.note}", "yellow")
    legend = Text("legend    ")
    meanings = {**_MEANINGS, **(_TEACHER_MEANINGS if translator is not None else {})}
    for kind, meaning in meanings.items():
        legend.append(kind, _STYLES[kind]).append(f": {meaning}; ")
    console.print(legend.append("‹special›", "bold").append(", tokens separated by │"), soft_wrap=True)
    for number, tokens in enumerate(of_texts, 1):
        of_several = f" {number} of {len(of_texts)}" if len(of_texts) > 1 else ""
        _line(console, f"\nstudent, text{of_several}: {len(tokens):,} tokens, {_fate(tokens, encoder.settings)}")
        _print_tokens(console, tokens, ids)
        if teacher is not None:
            _print_teacher(console, tokens, encoder.tokenizer, teacher)
    if texts is not None and not isinstance(found.item, Document):
        for prompt in encoder.teacher_prompt_of(found.item, conversation, texts):
            tokens = tokens_of(prompt, encoder)
            _line(console, f"\nteacher, in place of the text before the answer: {len(tokens):,} tokens")
            _print_tokens(console, tokens, ids)
    if translator is not None:
        _print_translations(console, found, encoder, translator, ids)
    if teacher is not None:
        _print_same_tokenizer(console, encoder.tokenizer, teacher)
        if texts is not None and not conversation.plain:
            _print_same_template(console, conversation, texts, found.item.where, encoder, teacher)


def _end_of_row(supervised: NDArray[np.bool_], settings: TokenizeSettings) -> int:
    """Returns the number of tokens after which a text is cut: all, if it is not."""
    return settings.sequence_length if settings.truncates(supervised) else len(supervised)


def _fate(tokens: Sequence[ShownToken], settings: TokenizeSettings) -> str:
    """Returns how a text is used in training."""
    learned, limit = sum(token.kind == "learned" for token in tokens), settings.sequence_length
    if len(tokens) > limit and settings.overlong == "drop" and tokens[-1].kind != "cut":
        return f"more than {limit:,}, so it is dropped"
    if not learned:
        return "none learned, so it is dropped"
    pieces = -(-len(tokens) // limit)
    return f"{learned:,} learned" + (f", in {pieces} pieces" if pieces > 1 and settings.overlong == "split" else "")


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _print_tokens(console: Console, tokens: Sequence[ShownToken], ids: bool) -> None:
    for (kind, weight), group in groupby(tokens, key=lambda token: (token.kind, token.weight)):
        label = kind if weight in (0, 1) else f"×{weight:g}"
        out, line_begins = Text(label.ljust(_INDENT), _STYLES[kind]), True
        for token in group:
            if not line_begins:
                out.append("│", "dim")
            piece = _visible(token.text)
            out.append(f"‹{piece}›" if token.special else piece, f"{_STYLES[kind]} {'bold' if token.special else ''}")
            if ids:
                out.append(f":{token.id}", "dim")
            line_begins = token.text.endswith("\n")
            if line_begins:
                out.append("\n" + " " * _INDENT)
        out.rstrip()
        console.print(out, soft_wrap=True)


def _print_teacher(
    console: Console, tokens: Sequence[ShownToken], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Prints the ids that the teacher decodes to other tokens."""
    known = set(teacher.get_vocab().values())
    read = {token.id: teacher.decode([token.id]) if token.id in known else "(unknown)" for token in tokens}
    differing = {index: word for index, word in read.items() if word != student.decode([index])}
    if not differing:
        _line(console, "teacher   reads the same tokens")
        return
    count = sum(token.id in differing for token in tokens)
    _line(console, f"teacher   reads {count:,} of the {len(tokens):,} tokens differently:", "red")
    for index, word in list(differing.items())[:8]:
        _line(console, f"          {index}: {_visible(student.decode([index]))} is {_visible(word)}")


def _print_translations(console: Console, found: FoundRow, encoder: Encoder, translator: Translator, ids: bool) -> None:
    """Prints the tokens of a teacher with another tokenizer, and their alignment with the student's."""
    import torch

    from limbeck.data.batch import Batch

    encoded = encoder.encode([found.item], found.form)
    student, teacher, texts = translator.student, translator.teacher, len(encoded.lengths)
    stops = np.cumsum(encoded.lengths)
    for number, stop in enumerate(stops.tolist(), 1):
        here = slice(stop - int(encoded.lengths[number - 1]), stop)
        row, labels = (torch.from_numpy(array[here].astype(np.int64)) for array in (encoded.tokens, encoded.labels))
        batch = translator.translate(Batch.of(row[None], labels[None], None, len(row)))
        view = batch.teacher_tokens
        assert view is not None
        read = [*view.input_ids[0].tolist(), *view.labels[-1:].tolist()]  # the last one is only predicted
        compared = set((view.supervised + 1).tolist())
        _line(
            console,
            f"\nteacher{f', text {number} of {texts}' if texts > 1 else ''}: {len(read):,} tokens of {teacher.name}; "
            f"{view.aligned_tokens:,} of the student's {len(batch.supervised):,} learned tokens are aligned with "
            f"{len(compared):,} of them, in {len(view.spans):,} spans",
        )
        words = _words(teacher, read)
        shown = [
            ShownToken(token, word, "compared" if at in compared else "read", token in teacher.special, 1.0)
            for at, (token, word) in enumerate(zip(read, words, strict=True))
        ]
        _print_tokens(console, shown, ids)
        spans = view.spans
        ours = _words_of_spans(
            spans.student_first,
            spans.student_rest,
            spans.student_rest_span,
            batch.supervised,
            _words(student, row.tolist()),
        )
        theirs = _words_of_spans(
            spans.teacher_first, spans.teacher_rest, spans.teacher_rest_span, view.supervised, words
        )
        several = [(mine, its) for mine, its in zip(ours, theirs, strict=True) if len(mine) > 1 or len(its) > 1]
        for mine, its in several[:_MAX_SPANS]:
            _line(console, f"{'span':{_INDENT}}{_visible('│'.join(mine))} = {_visible('│'.join(its))}")
        if len(several) > _MAX_SPANS:
            _line(console, f"{'':{_INDENT}}… and {len(several) - _MAX_SPANS:,} more spans of several tokens")


def _words(text: TokenText, ids: Sequence[int]) -> list[str]:
    return [piece.decode("utf-8", "replace") for piece in text.pieces(ids)]


def _words_of_spans(
    first: Tensor, rest: Tensor, rest_span: Tensor, positions: Tensor, words: Sequence[str]
) -> list[list[str]]:
    """Returns the text of each span's tokens. ``positions`` predict the tokens, so they are one before them."""
    spans = [[words[position + 1]] for position in positions[first].tolist()]
    for position, span in zip(positions[rest].tolist(), rest_span.tolist(), strict=True):
        if span < len(spans):
            spans[span].append(words[position + 1])
    return spans


def _print_same_tokenizer(console: Console, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    try:
        check_same_tokenizer(student, teacher)
        _line(console, "\ntokenizer the teacher's equals the student's")
    except LimbeckError as error:
        _line(console, f"\ntokenizer {error}", "red")


def _print_same_template(
    console: Console,
    conversation: Conversation,
    texts: Sequence[Rendered],
    where: str,
    encoder: Encoder,
    teacher: PreTrainedTokenizerBase,
) -> None:
    """Prints whether the teacher's own template renders the same text."""
    if not teacher.chat_template:
        return
    template = encoder.template
    try:
        native = resolve_template("native", teacher)
        native = replace(native, system=template.system, question=template.question, last_only=template.last_only)
        own = render(conversation, native, teacher, encoder.settings.template_kwargs, where)
    except LimbeckError as error:
        _line(console, f"template  the teacher's own cannot render this row: {error}", "yellow")
        return
    ours, theirs = "".join(one.text for one in texts), "".join(one.text for one in own)
    if ours == theirs:
        _line(console, "template  the teacher's own renders the same text")
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    begin = max(0, at - 20)
    _line(console, f"template  the teacher's own renders another text from character {at} on:", "yellow")
    _line(console, f"          here    …{_visible(ours[begin : at + 40])}")
    _line(console, f"          its own …{_visible(theirs[begin : at + 40])}")


def _visible(text: str) -> str:
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == "\ufffd" else f"\\u{ord(c):04x}" for c in text)


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)
