"""Reads rows from Parquet and Arrow files, and from folders and hub datasets of the ``datasets`` library.

Tables are read in slices, so a file may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.data.sources.items import BadRow, Item, Record, place
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    import pyarrow

_ROWS = 512
"""Rows converted to Python objects at once."""


def read_parquet(path: Path) -> Iterator[Item]:
    """Yields the rows of a Parquet file."""
    with _pyarrow(path):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            yield from rows_of(file.iter_batches(batch_size=_ROWS), str(path))


def read_arrow(path: Path) -> Iterator[Item]:
    """Yields the rows of an Arrow IPC file or stream."""
    with _pyarrow(path):
        import pyarrow as pa

        with pa.memory_map(str(path)) as memory:
            try:
                file = pa.ipc.open_file(memory)
                batches: Iterable[pyarrow.RecordBatch] = (file.get_batch(i) for i in range(file.num_record_batches))
            except pa.ArrowInvalid:
                memory.seek(0)
                batches = pa.ipc.open_stream(memory)
            yield from rows_of(batches, str(path))


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """Returns the Arrow files of a folder written by ``save_to_disk``; of one split, if the folder has several.

    Raises LimbeckError if the folder was not written by ``save_to_disk``, or does not have the split.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _json(splits).get("splits", [])
        if split is None and len(names) != 1 and "train" not in names:
            raise LimbeckError(f"{folder} holds the splits {', '.join(names)}; choose one with `split`.")
        chosen = split or ("train" if "train" in names else names[0])
        if chosen not in names:
            raise LimbeckError(f"{folder} has no split {chosen}; it holds {', '.join(names)}.")
        folder = folder / chosen
    elif split is not None:
        raise LimbeckError(f"{folder} holds one dataset without splits; leave `split: {split}` out.")
    files = [folder / str(file["filename"]) for file in _json(folder / "state.json").get("_data_files", [])]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise LimbeckError(f"{folder} lacks its file {file.name}; save the dataset again.")
    return files


def is_saved_dataset(folder: Path) -> bool:
    """Returns whether ``datasets`` wrote this folder with ``save_to_disk``."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_hub(name: str, config: str | None, split: str, revision: str | None) -> Any:
    """Loads a ``datasets.Dataset`` from the hub, its cache, or a local folder with the layout of a hub repository."""
    try:
        import datasets
    except ImportError as error:
        raise LimbeckError(
            f"the hub dataset {name} needs the datasets library; pip install 'limbeck[data]'."
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the library raises many different types
        named = ", ".join(f"{key} {value}" for key, value in (("config", config), ("revision", revision)) if value)
        raise LimbeckError(
            f"the hub dataset {name} (split {split}{', ' + named if named else ''}) cannot be loaded: "
            f"{' '.join(str(error).split())}; check its name, config, split and revision, and the network."
        ) from error


def read_dataset(dataset: Any, name: str) -> Iterator[Item]:
    """Yields the rows of a ``datasets.Dataset``."""
    tables = dataset.with_format("arrow").iter(batch_size=_ROWS)
    yield from rows_of((batch for table in tables for batch in table.to_batches()), name)


def rows_of(batches: Iterable[pyarrow.RecordBatch], name: str) -> Iterator[Item]:
    """Yields rows, numbered from 0. Only a row that cannot be converted (text that is not UTF-8) is bad."""
    index = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            part = batch.slice(start, _ROWS)
            try:
                rows = part.to_pylist()
            except ValueError:
                rows = [_row(part.slice(i, 1)) for i in range(part.num_rows)]
            for row in rows:
                if isinstance(row, dict):
                    yield Record(row, name, 0, index)
                else:
                    where = place(name, 0, index)
                    yield BadRow(name, 0, index, "not UTF-8", f"{where} holds text that is not UTF-8; convert it.")
                index += 1


def _row(batch: pyarrow.RecordBatch) -> dict[str, Any] | None:
    try:
        return batch.to_pylist()[0]
    except ValueError:
        return None


@contextmanager
def _pyarrow(path: Path) -> Iterator[None]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise LimbeckError(f"{path} needs pyarrow to be read; pip install 'limbeck[data]'.") from error
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise LimbeckError(f"{path} cannot be read ({error}); it may be damaged or of another format.") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LimbeckError(f"{path} cannot be read ({error}); save the dataset again.") from error
    return found if isinstance(found, dict) else {}
