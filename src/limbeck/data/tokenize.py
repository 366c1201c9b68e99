"""Reads and tokenises files into token ids and shifted labels, with a cache on disk.

Reading, tokenising in several processes, and writing overlap, a few batches of rows at a time, so memory use does not depend
on the size of the data.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from limbeck.data import cache
from limbeck.data.concatenated import concatenate, is_concatenated
from limbeck.data.encode import TOKENS, Encoded, Encoder, TokenizeSettings, make_encoder
from limbeck.data.examples import ArrayFile, DataReport, Examples, FileReport
from limbeck.data.masks import IGNORE
from limbeck.data.rows import FORMATS, check_columns, detect, shown_format
from limbeck.data.sources import (
    BadRow,
    Document,
    Input,
    Item,
    Line,
    Record,
    RowError,
    Source,
    decoded,
    inputs_of,
    with_columns,
)
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int], None]

_BATCH_ROWS = 1024  # rows tokenised together
_BATCH_SIZE = 1 << 21  # characters tokenised together, at least one row
_PARALLEL_SIZE = 1 << 25  # bytes of data above which several processes are faster
_MAX_WORKERS = 8
_PEEKED = 1000


class _Batch(NamedTuple):
    """Rows of one input. source, file: the numbers of the source and of the input."""

    items: list[Item]
    form: str
    source: int
    file: int


def tokenize_files(
    files: Sequence[str | Path | Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    settings: TokenizeSettings | None = None,
    **changes: Any,
) -> tuple[Examples, DataReport]:
    """Reads, checks, renders and tokenises every row of ``files``.

    files:     names, globs or ``Source`` objects.
    cache_dir: folder in which the result is kept under a hash of everything it depends on, and memory-mapped; None keeps the
               result in memory.
    progress:  called with the number of rows done so far.
    settings:  see ``TokenizeSettings``; ``changes`` replaces single fields.

    A row is supervised on its assistant turns and the tokens that end them or, with ``distill_on_prompt``, on every token. A
    row without a supervised token is dropped. With ``prompts`` nothing is supervised: each row is the prompt of its last
    answer, which may be missing. With ``prompts_only`` that applies to the rows that lack it.

    Sources with ``concatenate`` or ``mock`` are not tokenised; see ``limbeck.data.concatenated``.

    Raises LimbeckError for the first row with an error, unless ``on_bad_row`` is ``skip``.
    """
    settings = replace(settings or TokenizeSettings(), **changes)
    named = [one if isinstance(one, Source) else Source.named(one) for one in files]
    if is_concatenated(named):
        return concatenate(named, tokenizer, settings.sequence_length, cache_dir)
    encoder = make_encoder(tokenizer, settings)
    sources = [(source, inputs_of(source)) for source in named or [Source()]]
    if cache_dir is None:
        return _tokenize(sources, encoder, progress, None).in_memory()
    folder = cache_dir / cache.cache_key(sources, encoder, cache_dir)
    with cache.entry(folder) as unfinished:
        if unfinished is not None:
            _tokenize(sources, encoder, progress, unfinished).on_disk()
    return cache.load(folder, [one.name for _, inputs in sources for one in inputs])


def tokenize_rows(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> tuple[Examples, DataReport]:
    """Like ``tokenize_files`` for rows in memory. Runs in this process; errors name a row as ``rows:<index>``."""
    encoder = make_encoder(tokenizer, TokenizeSettings(**{"workers": 1, **changes}))
    records = Input("rows", (), "", lambda: (Record(row, "rows", index) for index, row in enumerate(rows)))
    return _tokenize([(Source(), [records])], encoder, progress, None).in_memory()


def _tokenize(
    sources: Sequence[tuple[Source, Sequence[Input]]], encoder: Encoder, progress: Progress | None, folder: Path | None
) -> _Tally:
    tally = _Tally(sources, encoder, folder)
    with ExitStack() as stack:
        stack.callback(tally.close)
        batches = _batches(sources, encoder, tally)
        workers = _worker_count(sources, encoder.settings)
        results: Iterable[tuple[_Batch, Encoded]]
        if workers > 1:
            from limbeck.data.parallel import encode_in_parallel

            encoded_batches = encode_in_parallel(encoder, batches, lambda batch: (batch.items, batch.form), workers)
            results = stack.enter_context(closing(encoded_batches))
        else:
            results = ((batch, encoder.encode(batch.items, batch.form)) for batch in batches)
        for batch, encoded in results:
            tally.add(batch, encoded)
            if progress:
                progress(tally.rows)
    return tally


def _worker_count(sources: Sequence[tuple[Source, Sequence[Input]]], settings: TokenizeSettings) -> int:
    if settings.workers is not None:
        return settings.workers
    size = sum(file.stat().st_size for _, inputs in sources for one in inputs for file in one.files)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MAX_WORKERS) if size >= _PARALLEL_SIZE else 1


def _batches(sources: Sequence[tuple[Source, Sequence[Input]]], encoder: Encoder, tally: _Tally) -> Iterator[_Batch]:
    """Yields all rows in batches, each of one input."""
    file = 0
    for number, (source, inputs) in enumerate(sources):
        for one in inputs:
            form, items = read_input(one, source, encoder.settings)
            tally.formats.append(TOKENS if form == TOKENS else shown_format(form, encoder.settings.keys))
            portion: list[Item] = []
            size = 0
            for item in items:
                portion.append(item)
                size += _size(item)
                if len(portion) == _BATCH_ROWS or size >= _BATCH_SIZE:
                    yield _Batch(portion, form, number, file)
                    portion, size = [], 0
            if portion:
                yield _Batch(portion, form, number, file)
            file += 1


def read_input(one: Input, source: Source, settings: TokenizeSettings) -> tuple[str, Iterator[Item]]:
    """Returns the format of an input, from the source's setting or the first readable row, and all its rows."""
    items = one.read()
    keys = settings.keys
    own_columns = ((keys.question, source.question_key), (keys.answer, source.answer_key))
    columns = {name: column for name, column in own_columns if column is not None and column != name}
    if columns:
        items = with_columns(items, columns)
    peeked: list[Item] = []
    form = source.format
    without_answer: LimbeckError | None = None
    for item in items:
        peeked.append(item)
        if isinstance(item, Document):
            form = TOKENS
            break
        if isinstance(item, (Line, Record)):
            try:
                form = form or detect(decoded(item), keys, settings.prompts or settings.prompts_only)
                break
            except RowError:
                pass
            except LimbeckError as error:  # a prompt without an answer: a bad row, unless every row is one
                if settings.on_bad_row == "error":
                    raise
                without_answer = without_answer or error
        if len(peeked) == _PEEKED:
            break
    if form is None and without_answer is not None:
        raise without_answer
    if not peeked:
        raise LimbeckError(f"{one.name} holds no rows; remove it from data_args.file_name, or fill it.")
    form = form or "question_answer"
    if form != TOKENS:
        if form not in FORMATS:
            raise LimbeckError(f"format: {form} is unknown; use {', '.join(FORMATS)}.")
        check_columns(form, keys, one.name)
    return form, chain(peeked, items)


def _size(item: Item) -> int:
    """Approximate number of characters in an item."""
    if isinstance(item, Line):
        return len(item.raw)
    if isinstance(item, Document):
        return len(item.ids)
    return _characters(item.row) if isinstance(item, Record) else 0


def _characters(value: Any, levels: int = 6) -> int:
    """Approximate number of characters in a value; below ``levels``, only the number of parts counts."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (dict, list)):
        return 16
    if not levels:
        return 16 * len(value)
    return 16 + sum(_characters(part, levels - 1) for part in (value.values() if isinstance(value, dict) else value))


class _Tally:
    """Collects the encoded batches: the arrays, in memory or in ``folder``, and the report."""

    def __init__(
        self, sources: Sequence[tuple[Source, Sequence[Input]]], encoder: Encoder, folder: Path | None
    ) -> None:
        self._encoder = encoder
        self._sources = [source for source, _ in sources]
        self._names = [one.name for _, inputs in sources for one in inputs]
        self._folder = folder
        self._arrays: dict[str, list[NDArray[Any]]] = {}
        self._files: dict[str, ArrayFile] = {}
        self._group_numbers: dict[tuple[int, str], int] = {}
        self._weighted = False
        self._bad_file: Any = None
        self._rows_of = Counter[int]()
        self._bad_of = Counter[int]()
        self._counts = Counter[str]()
        self._dropped = Counter[str]()
        self._bad = Counter[str]()
        self._tokens = self._supervised = self._largest = self._column_bytes = self._prompt_tokens = 0
        self.formats: list[str] = []

    @property
    def rows(self) -> int:
        """Rows done so far."""
        return self._counts["rows"]

    def add(self, batch: _Batch, encoded: Encoded) -> None:
        for bad in encoded.bad:
            if self._encoder.settings.on_bad_row == "error":
                raise LimbeckError(bad.reason)
            self._write_bad(bad)
        self._rows_of[batch.file] += encoded.counts["rows"]
        self._bad_of[batch.file] += len(encoded.bad)
        self._counts.update(encoded.counts)
        self._dropped.update(encoded.dropped)
        self._bad.update(bad.kind for bad in encoded.bad)
        if not len(encoded.tokens):
            return
        if encoded.weights is not None and not self._weighted:
            self._weighted = True
            self._write_earlier_weights()
        if self._weighted:
            plain = (encoded.labels != IGNORE).astype(np.float32)
            self._put("weights", plain if encoded.weights is None else encoded.weights)
        self._put("tokens", encoded.tokens)
        self._put("labels", encoded.labels)
        ends = self._tokens + np.cumsum(encoded.lengths)
        self._put("offsets", ends if self._tokens else np.concatenate(([0], ends)))
        self._put("supervised", encoded.supervised)
        self._put("groups", self._group(batch.source, encoded))
        if encoded.columns is not None:
            self._put("columns", np.frombuffer(b"".join(encoded.columns), dtype=np.uint8))
            self._put("column_ends", self._column_bytes + np.cumsum([len(row) for row in encoded.columns]))
            self._column_bytes += sum(map(len, encoded.columns))
        if encoded.teacher_prompts is not None:
            self._put("teacher_prompts", np.concatenate(encoded.teacher_prompts))
            of_teacher = self._prompt_tokens + np.cumsum([len(prompt) for prompt in encoded.teacher_prompts])
            self._put("teacher_prompt_ends", of_teacher)
            self._prompt_tokens = int(of_teacher[-1])
            self._largest = max(self._largest, *(int(prompt.max()) for prompt in encoded.teacher_prompts))
        self._tokens = int(ends[-1])
        self._supervised += int(encoded.supervised.sum(dtype=np.int64))
        self._largest = max(self._largest, int(encoded.tokens.max()))

    def in_memory(self) -> tuple[Examples, DataReport]:
        """Returns the result that was collected in memory."""
        report, needed = self._report(), self._needed()
        return Examples(
            **{name: np.concatenate(parts) for name, parts in self._arrays.items() if name in needed}
        ), report

    def on_disk(self) -> None:
        """Completes the folder for ``cache.load``."""
        assert self._folder is not None
        report = self._report()
        for name in self._files.keys() - self._needed():
            (self._folder / f"{name}.npy").unlink()
        (self._folder / "report.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")

    def _report(self) -> DataReport:
        files = tuple(
            FileReport(name, form, self._rows_of[i], self._bad_of[i])
            for i, (name, form) in enumerate(zip(self._names, self.formats, strict=True))
        )
        if not self._tokens:
            bad = [f"{count:,} bad rows: {kind}" for kind, count in self._bad.items()]
            advice = (
                "set on_bad_row: error to see the first" if bad else "raise sequence_length, or give rows with answers"
            )
            raise LimbeckError(
                f"None of the {self.rows} rows of {', '.join(file.path for file in files)} has a supervised token "
                f"({'; '.join([*self._dropped, *bad]) or 'there are none'}); {advice}."
            )
        return DataReport(
            files=files,
            template=self._encoder.template.name,
            sequence_length=self._encoder.settings.sequence_length,
            rows=self.rows,
            rewritten=self._counts["rewritten"],
            texts=self._counts["texts"],
            truncated=self._counts["truncated"],
            dropped=dict(self._dropped),
            tokens=self._tokens,
            supervised_tokens=self._supervised,
            cut_answers=self._counts["cut_answers"],
            split=self._counts["split"],
            bad=dict(self._bad),
            groups=tuple(self._group_numbers),
            largest_token=self._largest,
            note=self._encoder.template.note,
        )

    def close(self) -> None:
        for file in (*self._files.values(), self._bad_file):
            if file is not None:
                file.close()

    def _needed(self) -> set[str]:
        """The arrays to keep; ``groups`` is left out if there is only one group."""
        return {*cache.ARRAYS, *cache.OPTIONAL_ARRAYS} - ({"groups"} if len(self._group_numbers) == 1 else set())

    def _put(self, name: str, values: NDArray[Any]) -> None:
        if self._folder is None:
            self._arrays.setdefault(name, []).append(values)
            return
        if name not in self._files:
            self._files[name] = ArrayFile(self._folder / f"{name}.npy", values.dtype.type)
        self._files[name].append(values)

    def _write_earlier_weights(self) -> None:
        """Writes the weights of earlier rows, which were all 1, when the first other weight occurs."""
        if self._folder is None:
            earlier: Iterable[NDArray[Any]] = list(self._arrays.get("labels", ()))
        elif "labels" in self._files:
            labels = self._files["labels"]
            earlier = (labels.read(start, stop) for start, stop in labels.blocks())
        else:
            earlier = ()
        for labels_of in earlier:
            self._put("weights", (labels_of != IGNORE).astype(np.float32))

    def _group(self, source: int, encoded: Encoded) -> NDArray[np.int32]:
        numbers = self._group_numbers
        if encoded.domains is None:
            key = (source, self._sources[source].name)
            return np.full(len(encoded.lengths), numbers.setdefault(key, len(numbers)), dtype=np.int32)
        return np.array(
            [numbers.setdefault((source, domain), len(numbers)) for domain in encoded.domains], dtype=np.int32
        )

    def _write_bad(self, bad: BadRow) -> None:
        if self._folder is None:
            return
        if self._bad_file is None:
            self._bad_file = (self._folder / "bad_rows.jsonl").open("w", encoding="utf-8")
        line = {"file": bad.file, "line": bad.line, "row": bad.number, "kind": bad.kind, "reason": bad.reason}
        self._bad_file.write(json.dumps(line) + "\n")
