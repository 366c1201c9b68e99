"""From files to token ids and shifted labels, kept on disk so that the second run starts at once.

The one place where labels are shifted and where the loss mask is made. Batches and order are not known here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from limbeck.data.batch import IGNORE
from limbeck.data.masks import shift, supervise
from limbeck.data.rows import Conversation, RowKeys, detect_format
from limbeck.data.sources import Record, expand, read_records
from limbeck.data.templates import Rendered, Template, check_template_kwargs, render, resolve_template
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHE_VERSION = 2  # raise it whenever the same input would give other arrays
_CHUNK = 1024  # rows tokenised together: enough to use every core, little enough to forget


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised rows, one after another.

    tokens:  [total] int32.
    labels:  [total] int32; already shifted: the token that each position must predict, or ``IGNORE``.
    offsets: [rows + 1] int64; row i is ``tokens[offsets[i] : offsets[i + 1]]``. No row is empty.
    weights: [total] float32, what multiplies the loss of each position, 0 where nothing is learned; None when all count alike.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tokens and labels of one row, as views."""
        here = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[here], self.labels[here]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] tokens per row."""
        return np.diff(self.offsets)

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """[rows] supervised positions per row."""
        return np.add.reduceat(self.labels != IGNORE, self.offsets[:-1], dtype=np.int64)


@dataclass(frozen=True)
class FileReport:
    """What was found in one file."""

    path: str
    format: str
    rows: int


@dataclass(frozen=True)
class DataReport:
    """What became of the rows: ``rows`` were read; ``dropped`` says how many are left out, by reason."""

    files: tuple[FileReport, ...]
    template: str
    sequence_length: int
    rows: int
    truncated: int
    dropped: Mapping[str, int]
    tokens: int
    supervised_tokens: int

    def __str__(self) -> str:
        files = ", ".join(f"{file.path} ({file.rows:,} rows of {file.format})" for file in self.files[:3])
        if len(self.files) > 3:
            files += f" and {len(self.files) - 3} more files"
        dropped = "; ".join(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()) or "none dropped"
        return (
            f"{self.rows:,} rows from {files}; template: {self.template}; "
            f"{self.tokens:,} tokens, of which {self.supervised_tokens:,} supervised; "
            f"{self.truncated:,} rows truncated to {self.sequence_length} tokens; {dropped}."
        )


@dataclass(frozen=True)
class _Settings:
    template: Template
    template_kwargs: Mapping[str, Any]
    keys: RowKeys
    sequence_length: int
    distill_on_prompt: bool


def tokenize_files(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    default_system: str | None = None,
    prompt_file: str | None = None,
    train_on: str = "all",
    question_key: str = "question",
    answer_key: str = "answer",
    prompt_key: str | None = None,
    system_key: str | None = None,
    sequence_length: int = 1024,
    distill_on_prompt: bool = False,
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Examples, DataReport]:
    """Read, check, render and tokenise every row of ``files``.

    A row is supervised on its assistant turns, each with the token that ends it (with ``train_on="last"`` on the last one),
    or, with ``distill_on_prompt``, on every token. A row that a template cannot show as one text becomes several. Rows are
    cut to ``sequence_length`` tokens, and dropped if nothing supervised is left. With ``cache_dir`` the result is kept there
    under a hash of everything it depends on. ``progress`` is told the number of rows done.

    Raises LimbeckError for anything wrong in any row, before a single row is trained on.
    """
    paths = expand(files)
    settings = _settings(
        tokenizer,
        template,
        template_kwargs,
        {"default_system": default_system, "prompt_file": prompt_file, "train_on": train_on},
        RowKeys(question_key, answer_key, prompt_key, system_key),
        sequence_length,
        distill_on_prompt,
    )
    sources = [(str(path), read_records(path)) for path in paths]
    if cache_dir is None:
        return _tokenize(sources, tokenizer, settings, progress)
    folder = cache_dir / _cache_key(paths, tokenizer, settings)
    if not folder.exists():
        _store(folder, *_tokenize(sources, tokenizer, settings, progress))
    return _load(folder, paths)


def tokenize_rows(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    default_system: str | None = None,
    prompt_file: str | None = None,
    train_on: str = "all",
    question_key: str = "question",
    answer_key: str = "answer",
    prompt_key: str | None = None,
    system_key: str | None = None,
    sequence_length: int = 1024,
    distill_on_prompt: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Examples, DataReport]:
    """The same for rows in memory; errors name a row as ``rows:<index>``."""
    settings = _settings(
        tokenizer,
        template,
        template_kwargs,
        {"default_system": default_system, "prompt_file": prompt_file, "train_on": train_on},
        RowKeys(question_key, answer_key, prompt_key, system_key),
        sequence_length,
        distill_on_prompt,
    )
    records = (Record(row, "rows", index) for index, row in enumerate(rows))
    return _tokenize([("rows", records)], tokenizer, settings, progress)


def _settings(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    template_kwargs: Mapping[str, Any] | None,
    around: Mapping[str, Any],
    keys: RowKeys,
    sequence_length: int,
    distill_on_prompt: bool,
) -> _Settings:
    if not tokenizer.is_fast:
        raise LimbeckError(
            f"The tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) is not a fast one, so the place of "
            "an answer among its tokens is unknown; use a checkpoint that holds a tokenizer.json."
        )
    if sequence_length < 2:
        raise LimbeckError(f"sequence_length = {sequence_length} leaves no token to predict; use 2 or more.")
    check_template_kwargs(template_kwargs or {})
    resolved = resolve_template(template, tokenizer, **around)
    return _Settings(resolved, dict(template_kwargs or {}), keys, sequence_length, distill_on_prompt)


def _tokenize(
    sources: Iterable[tuple[str, Iterator[Record]]],
    tokenizer: PreTrainedTokenizerBase,
    settings: _Settings,
    progress: Callable[[int], None] | None,
) -> tuple[Examples, DataReport]:
    tokens: list[NDArray[np.int32]] = []
    labels: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float32] | None] = []
    files: list[FileReport] = []
    rows = truncated = 0
    dropped: dict[str, int] = {}
    for name, records in sources:
        rows_before = rows
        shape, conversations = _conversations(name, records, settings.keys)
        while chunk := list(islice(conversations, _CHUNK)):
            rendered = [
                text
                for record, conversation in chunk
                for text in render(conversation, settings.template, tokenizer, settings.template_kwargs, record.where)
            ]
            for ids, supervised, importance in _encode(rendered, tokenizer, settings.distill_on_prompt):
                kept = ids[: settings.sequence_length]
                cut = len(kept) < len(ids)
                targets, factors = shift(kept, supervised, importance)
                if (targets == IGNORE).all():
                    reason = (
                        f"no supervised token in the first {settings.sequence_length}" if cut else "no token to learn"
                    )
                    dropped[reason] = dropped.get(reason, 0) + 1
                    continue
                truncated += cut
                tokens.append(kept)
                labels.append(targets)
                weights.append(factors)
            rows += len(chunk)
            if progress:
                progress(rows)
        files.append(FileReport(name, shape, rows - rows_before))
    if not tokens:
        raise LimbeckError(
            f"None of the {rows} rows of {', '.join(file.path for file in files)} can be learnt from "
            f"({'; '.join(dropped) or 'there are none'}); raise sequence_length, or give rows with answers."
        )
    examples = Examples(
        np.concatenate(tokens),
        np.concatenate(labels),
        np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        _joined(weights, labels),
    )
    report = DataReport(
        files=tuple(files),
        template=settings.template.name,
        sequence_length=settings.sequence_length,
        rows=rows,
        truncated=truncated,
        dropped=dropped,
        tokens=len(examples.tokens),
        supervised_tokens=int(examples.num_supervised.sum()),
    )
    return examples, report


def _conversations(
    name: str, records: Iterator[Record], keys: RowKeys
) -> tuple[str, Iterator[tuple[Record, Conversation]]]:
    """The shape of one file, judged by its first row, and all its rows as conversations."""
    first = next(records, None)
    if first is None:
        raise LimbeckError(f"{name} holds no rows; remove it from data_args.file_name, or fill it.")
    shape, to_conversation = detect_format(first, keys)
    return shape, ((record, to_conversation(record)) for record in chain([first], records))


def _joined(
    weights: Sequence[NDArray[np.float32] | None], labels: Sequence[NDArray[np.int32]]
) -> NDArray[np.float32] | None:
    """The weights of all rows, or None when all count alike."""
    if all(of_row is None for of_row in weights):
        return None
    rows = zip(weights, labels, strict=True)
    return np.concatenate([(row != IGNORE).astype(np.float32) if own is None else own for own, row in rows])


def _encode(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, everything: bool
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float32] | None]]:
    """Token ids [n], which of them are supervised [n], and their weights [n] unless all are 1, for each text."""
    encoded = tokenizer(
        [r.text for r in rendered],
        add_special_tokens=False,  # the template has written BOS and EOS
        return_offsets_mapping=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    for r, ids, places in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # Several times faster than asarray, which looks at each pair before it takes it.
        where = np.fromiter(chain.from_iterable(places), np.int64, 2 * len(places)).reshape(-1, 2)
        yield np.asarray(ids, dtype=np.int32), *supervise(where, r.spans, everything, r.weight)


def _cache_key(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, settings: _Settings) -> str:
    contents = []
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        contents.append([path.suffix, digest.hexdigest()])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]  # traces of earlier calls
    everything = [_CACHE_VERSION, contents, backend, tokenizer.special_tokens_map, asdict(settings)]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()


def _store(folder: Path, examples: Examples, report: DataReport) -> None:
    """Write under another name, then rename: a folder with the final name is whole."""
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        arrays: dict[str, NDArray[Any]] = {
            "tokens": examples.tokens,
            "labels": examples.labels,
            "offsets": examples.offsets,
        }
        if examples.weights is not None:
            arrays["weights"] = examples.weights
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
        (unfinished / "report.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
        unfinished.rename(folder)
    except OSError as error:
        if not folder.exists():  # it exists if another process was first, with the same content
            raise LimbeckError(
                f"The tokenised data cannot be kept in {folder.parent} ({error}); "
                "free some space, or choose another folder."
            ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _load(folder: Path, paths: Sequence[Path]) -> tuple[Examples, DataReport]:
    try:
        tokens, labels, offsets = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "labels", "offsets")
        )
        weighted = folder / "weights.npy"
        weights = np.load(weighted, mmap_mode="r", allow_pickle=False) if weighted.exists() else None
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LimbeckError(f"The cached data in {folder} is damaged ({error}); delete that folder.") from error
    # The same content may by now lie in files of other names.
    files = [FileReport(**{**file, "path": str(path)}) for file, path in zip(report.pop("files"), paths, strict=True)]
    return Examples(tokens, labels, offsets, weights), DataReport(files=tuple(files), **report)
