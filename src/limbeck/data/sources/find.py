"""Resolves names to files and their readers. The reader is chosen by the file's suffix, not by its content."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from limbeck.data.sources.items import Item
from limbeck.data.sources.megatron import Corpus, open_corpus, read_megatron
from limbeck.data.sources.tables import (
    is_saved_dataset,
    load_hub,
    read_arrow,
    read_dataset,
    read_parquet,
    saved_files,
)
from limbeck.data.sources.text import read_csv, read_json, read_lines
from limbeck.errors import LimbeckError

_READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".json": read_json,
    ".jsonl": read_lines,
    ".csv": partial(read_csv, delimiter=","),
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_PACKED = (".gz", ".zst")
_PACKABLE = (".json", ".jsonl", ".csv", ".tsv")
_HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """One source of a configuration.

    path:             names and globs of files.
    hub:              name of a hub dataset, in place of ``path``.
    config, revision: of the hub dataset.
    split:            of the hub dataset, or of a folder saved by ``datasets``.
    format:           format of its rows; None to detect it from the first row.
    domain:           name under which it is mixed with other sources; None for its own name.
    question_key, answer_key: columns of its question and answer, if they are not those of the run.
    concatenate:      read its corpora as one text, which is cut into rows; see ``limbeck.data.concatenated``.
    documents:        the part of the documents of a concatenated corpus that is read, as fractions.
    mock:             number of rows of made-up tokens, in place of ``path``.
    """

    path: tuple[str, ...] = ()
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    format: str | None = None
    domain: str | None = None
    question_key: str | None = None
    answer_key: str | None = None
    concatenate: bool = False
    documents: tuple[float, float] = (0.0, 1.0)
    mock: int | None = None

    @property
    def name(self) -> str:
        """Its name in reports."""
        return self.domain or self.hub or ", ".join(self.path) or "mock data"

    @classmethod
    def named(cls, name: str | Path) -> Source:
        """Returns the source of one name in ``file_name``: ``hub:owner/name``, or files."""
        text = str(name)
        return cls(hub=text[len(_HUB) :]) if text.startswith(_HUB) else cls(path=(text,))


@dataclass(frozen=True)
class Input:
    """One file, folder or dataset that is read from start to end.

    name: for messages. files, detail: the files and other facts that its content depends on, for the cache. read: yields rows.
    """

    name: str
    files: tuple[Path, ...]
    detail: str
    read: Callable[[], Iterator[Item]]


def inputs_of(source: Source) -> list[Input]:
    """Returns the inputs of a source in a fixed order. Raises LimbeckError for a missing file or an unknown file type."""
    if source.mock is not None:
        raise LimbeckError("mock data is made up in memory and has no rows that can be shown; give a path or hub.")
    if source.hub is not None:
        split = source.split or "train"
        dataset = load_hub(source.hub, source.config, split, source.revision)
        files = tuple(Path(file["filename"]) for file in dataset.cache_files)
        parts = [source.hub, *([source.config] if source.config else []), split]
        name = f"{_HUB}{'/'.join(parts)}"
        return [Input(name, files, f"{split} {len(dataset)}", partial(read_dataset, dataset, name))]
    inputs = []
    for path in expand(source.path):
        if path.is_dir():
            files = tuple(saved_files(path, source.split))
            read = partial(_chained, files)
            inputs.append(Input(str(path), files, "saved", read))
        elif _is_megatron(path):
            index, tokens = _pair(path)
            inputs.append(Input(str(tokens), (index, tokens), "megatron", partial(read_megatron, index, tokens)))
        else:
            kind = _suffix(path)
            inputs.append(Input(str(path), (path,), path.name[path.name.rindex(kind) :], partial(_READERS[kind], path)))
    return inputs


def corpora_of(source: Source) -> list[Corpus]:
    """Opens the corpora of a source. Raises LimbeckError for a missing file, or one that is not a ``.bin``/``.idx`` pair."""
    paths = expand(source.path)
    for path in paths:
        if not _is_megatron(path):
            raise LimbeckError(f"{path} is not a .bin/.idx pair, which concatenate: true needs; remove that key.")
    return [open_corpus(*_pair(path)) for path in paths]


def expand(files: Sequence[str | Path]) -> list[Path]:
    """Returns the files that names and globs (``*``, ``?``, ``[…]``, ``**``) match, in a fixed order.

    Raises LimbeckError if a name matches nothing or has an unknown file type.
    """
    paths: list[Path] = []
    for name in files:
        path = Path(name).expanduser()
        if path.exists() or not glob.has_magic(str(name)):
            paths.append(_checked(path))
            continue
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        # A pattern matches both files of a Megatron corpus; keep one of them.
        matches = [match for match in matches if not (match.suffix == ".idx" and match.with_suffix(".bin") in matches)]
        if not matches:
            raise LimbeckError(f"No file matches {name}; check the pattern, which is relative to {Path.cwd()}.")
        paths.extend(_checked(match) for match in matches)
    if not paths:
        raise LimbeckError("No data files are given; name at least one in data_args.file_name or data_args.sources.")
    return paths


def _chained(files: Sequence[Path]) -> Iterator[Item]:
    for file in files:
        yield from read_arrow(file)


def _suffix(path: Path) -> str:
    """Returns the suffix that determines the reader, without the suffix of a compression."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _PACKED:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in _PACKABLE else ""
    return suffixes[-1] if suffixes else ""


def _is_megatron(path: Path) -> bool:
    return path.suffix in (".bin", ".idx") or all(half.is_file() for half in _pair(path))


def _pair(path: Path) -> tuple[Path, Path]:
    """Returns the index and token files of a Megatron corpus named by either file or by their common prefix."""
    stem = path.name[:-4] if path.suffix in (".bin", ".idx") else path.name
    return path.with_name(stem + ".idx"), path.with_name(stem + ".bin")


def _checked(path: Path) -> Path:
    if path.is_dir():
        if is_saved_dataset(path):
            return path
        raise LimbeckError(f"{path} is a folder; name its files, for example {path}/*.jsonl.")
    if not path.exists() and not _is_megatron(path):
        folder = path.parent
        names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(str(folder / name) for name in near)}?" if near else "check the path."
        missing = "does not exist" if folder.is_dir() else f"does not exist, nor does the folder {folder}"
        corpus = "" if _suffix(path) in _READERS else f", nor do {path}.bin and {path}.idx of a pretokenised corpus"
        raise LimbeckError(f"The data file {path} {missing} (looked from {Path.cwd()}){corpus}; {hint}")
    if _is_megatron(path):
        for half in _pair(path):
            if not half.is_file():
                raise LimbeckError(f"{half} does not exist; a pretokenised corpus is a pair of .bin and .idx.")
        return path
    if not os.access(path, os.R_OK):
        raise LimbeckError(f"{path} may not be read by this user; change its permissions.")
    if _suffix(path) not in _READERS:
        raise LimbeckError(
            f"{path} has an unknown file type ({', '.join(_READERS)}, the first four also with {' or '.join(_PACKED)}, or a "
            ".bin/.idx pair); convert it to one JSON object per line."
        )
    return path
