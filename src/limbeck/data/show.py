"""One row on the screen, token by token: what is prompt, what is learned, what is masked, and what is cut off.

The row goes through the same rendering and masks as in training. Configurations are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from limbeck.data.masks import supervise
from limbeck.data.rows import Conversation, RowKeys, detect_format
from limbeck.data.sources import Record, expand, read_records
from limbeck.data.templates import Rendered, Template, render, resolve_template
from limbeck.data.tokenizers import check_same_tokenizer
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STYLES = {"prompt": "cyan", "learned": "green", "masked": "yellow", "cut": "red"}
_MEANINGS = {
    "prompt": "read, not learned",
    "learned": "predicted, and part of the loss",
    "masked": "an answer of weight 0: read, not learned",
    "cut": "beyond sequence_length: never read",
}
_INDENT = 10


@dataclass(frozen=True)
class ShownToken:
    """A token, what becomes of it (a key of the legend), and the weight of its loss."""

    id: int
    text: str
    kind: str
    special: bool
    weight: float


@dataclass(frozen=True)
class FoundRow:
    """A row of the data with its format and its conversation."""

    record: Record
    format: str
    conversation: Conversation


def find_row(files: Sequence[str | Path], index: int, keys: RowKeys) -> FoundRow:
    """Row ``index`` (from 0) of the files, counted through them in order; raises LimbeckError if there are fewer."""
    seen = 0
    for path in expand(files):
        to_conversation, shape = None, ""
        for record in read_records(path):
            if to_conversation is None:
                shape, to_conversation = detect_format(record, keys)
            if seen == index:
                return FoundRow(record, shape, to_conversation(record))
            seen += 1
    raise LimbeckError(f"--row {index} does not exist: the data has {seen:,} rows, counted from 0.")


def tokens_of(
    rendered: Rendered, tokenizer: PreTrainedTokenizerBase, sequence_length: int, everything: bool
) -> list[ShownToken]:
    """The tokens of one text as training would see them. The first is always prompt, as nothing stands before it."""
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    supervised, weights = supervise(places, rendered.spans, everything, rendered.weight)
    answers, _ = supervise(places, [(start, end, 1.0) for start, end, _ in rendered.spans])
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    shown, reached = [], 0
    for at, (token, (start, end)) in enumerate(zip(encoded["input_ids"], places.tolist(), strict=True)):
        kind = "cut"
        if at < sequence_length:
            kind = "learned" if at and supervised[at] else "masked" if at and answers[at] else "prompt"
        weight = float(1.0 if weights is None else weights[at]) if kind == "learned" else 0.0
        text = rendered.text[min(start, reached) : end]
        if "\ufffd" in tokenizer.decode([token]):
            text = "\ufffd"  # a part of a character
        shown.append(ShownToken(token, text, kind, token in special, weight))
        reached = max(reached, end)
    return shown


def print_row(
    console: Console,
    found: FoundRow,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    template_kwargs: dict[str, Any],
    sequence_length: int,
    distill_on_prompt: bool,
    teacher: PreTrainedTokenizerBase | None,
    ids: bool = False,
) -> None:
    """Print a row as the student learns it and, as far as that differs, as the teacher reads it."""
    texts = render(found.conversation, template, tokenizer, template_kwargs, found.record.where)
    _line(console, f"row       {found.record.where} ({found.format}), weight {found.conversation.weight:g}")
    _line(console, f"template  {template.name}" + (", on running text: not used" if found.conversation.plain else ""))
    legend = Text("legend    ")
    for kind, meaning in _MEANINGS.items():
        legend.append(kind, _STYLES[kind]).append(f": {meaning}; ")
    console.print(legend.append("‹special›", "bold").append(", tokens parted by │"), soft_wrap=True)
    for number, rendered in enumerate(texts, 1):
        tokens = tokens_of(rendered, tokenizer, sequence_length, distill_on_prompt)
        learned = sum(token.kind == "learned" for token in tokens)
        of_several = f" {number} of {len(texts)}" if len(texts) > 1 else ""
        fate = f"{learned:,} learned" if learned else "none learned, so it is dropped"
        _line(console, f"\nstudent, text{of_several}: {len(tokens):,} tokens, {fate}")
        _print_tokens(console, tokens, ids)
        if teacher is not None:
            _print_teacher(console, tokens, tokenizer, teacher)
    if teacher is not None:
        _print_agreement(console, found, texts, template, template_kwargs, tokenizer, teacher)


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
    """The same ids in the teacher's words, if those are others."""
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


def _print_agreement(
    console: Console,
    found: FoundRow,
    texts: Sequence[Rendered],
    template: Template,
    template_kwargs: dict[str, Any],
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
) -> None:
    """Whether the teacher's tokenizer is the student's, and whether its own template would have written the same."""
    try:
        check_same_tokenizer(student, teacher)
        _line(console, "\ntokenizer the teacher's agrees with the student's")
    except LimbeckError as error:
        _line(console, f"\ntokenizer {error}", "red")
    if not teacher.chat_template or found.conversation.plain:
        return
    try:
        native = resolve_template("native", teacher)
        native = replace(native, system=template.system, question=template.question, last_only=template.last_only)
        own = render(found.conversation, native, teacher, template_kwargs, found.record.where)
    except LimbeckError as error:
        _line(console, f"template  the teacher's own is of no use for this row: {error}", "yellow")
        return
    ours, theirs = "".join(one.text for one in texts), "".join(one.text for one in own)
    if ours == theirs:
        _line(console, "template  the teacher's own writes the same text")
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    begin = max(0, at - 20)
    _line(console, f"template  the teacher's own writes another text from character {at} on:", "yellow")
    _line(console, f"          here    …{_visible(ours[begin : at + 40])}")
    _line(console, f"          its own …{_visible(theirs[begin : at + 40])}")


def _visible(text: str) -> str:
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == "\ufffd" else f"\\u{ord(c):04x}" for c in text)


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)
