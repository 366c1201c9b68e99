"""The section ``data`` of NeMo-RL: datasets by name, local files, and prompt files."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.config.dialects.nemo_rl_spellings import Setting, choose_spelling, ignore_once
from limbeck.config.dialects.nemo_rl_table import READ
from limbeck.config.locations import SourceLocation
from limbeck.config.schema import NAMED_DATASETS
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value

Entry = dict[str, Setting]
"""A dataset: each key with its value and where it is written. ``prompt_template`` is under ``prompt_file``."""


_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
_GENERIC = {
    "ResponseDataset": {"question_key": "input", "answer_key": "output"},
    "openai_format": {"format": "messages"},
}
"""Names of NeMo-RL that stand for any file or hub dataset, and the columns that they assume."""

_OF_ONE_DATASET = ("data_path", "input_key", "output_key", "subset", "split")
_REPOSITORY = Path(__file__).resolve().parents[4]
_PROMPT_FOLDERS = (".", "examples/prompts", "prompts")


@dataclass(frozen=True)
class Datasets:
    """The datasets of training and of validation."""

    train: list[Entry]
    validation: list[Entry]

    @property
    def all(self) -> list[Entry]:
        return [*self.train, *self.validation]


def read_datasets(result: Translation, data: Mapping[str, Any], locations: Mapping[str, SourceLocation]) -> Datasets:
    """The datasets of ``data.train`` and ``data.validation``, with the keys of ``data.default`` and of ``data`` itself.

    A key of ``data`` itself is the fork's spelling of the same key of ``data.default``, and of the only training dataset.
    """

    def meaning(key: str, value: Any) -> Any:
        return (_find_prompt(str(value), locations) if key == "prompt_file" else None) or value

    def choose(key: str, *given: Setting | None) -> Setting:
        return choose_spelling(
            result, [one for one in given if one is not None], locations, lambda value: meaning(key, value)
        )

    def keys_of(section: object, path: str) -> Entry:
        given = section if isinstance(section, Mapping) else {}
        entry: Entry = {key: (given[key], f"{path}.{key}") for key in READ["dataset"] if key in given}
        if "prompt_template" in entry:
            entry["prompt_file"] = choose("prompt_file", entry.get("prompt_file"), entry.pop("prompt_template"))
        return entry

    own, default = keys_of(data, "data"), keys_of(data.get("default"), "data.default")
    shared = default | {key: choose(key, default.get(key), one) for key, one in own.items()}

    def entries(part: str) -> Iterator[Entry]:
        given = data.get(part)
        if given is None and part == "train" and ("dataset_name" in shared or "data_path" in shared):
            given = {}
        single = part == "train" and not isinstance(given, list)
        for one in given if isinstance(given, list) else [] if given is None else [given]:
            if isinstance(one, Mapping):
                yield complete(keys_of(one, f"data.{part}"), own if single else {})

    def complete(entry: Entry, same: Entry) -> Entry:
        """``entry`` with the keys of the other sections; those of ``same`` are spellings of its own."""
        if "dataset_name" in entry and "dataset_name" in same:
            entry["dataset_name"] = choose("dataset_name", entry["dataset_name"], same["dataset_name"])
        # What `data` itself says of its dataset does not hold for another one.
        names = [found["dataset_name"][0] for found in (entry, own) if "dataset_name" in found]
        other = len(names) == 2 and not (same and names[0] == names[1])
        unrelated = {own[key][1] for key in _OF_ONE_DATASET if other and key in own}
        for key in same:
            if key in entry and key != "dataset_name" and same[key][1] not in unrelated:
                entry[key] = choose(key, entry[key], same[key])
        return {key: found for key, found in shared.items() if found[1] not in unrelated} | entry

    datasets = Datasets(list(entries("train")), list(entries("validation")))
    for key, (value, path) in (*own.items(), *default.items()):
        read = [meaning(key, entry[key][0]) for entry in datasets.all if key in entry]
        if value is not None and meaning(key, value) not in read:
            ignore_once(result, path)
    return datasets


def translate_data(result: Translation, datasets: Datasets, locations: Mapping[str, SourceLocation]) -> None:
    """Set the training data, the validation data, and the text around a question."""
    train, validation = datasets.train, datasets.validation
    if not train:
        result.refuse("data.train", "is not set; name a dataset in data.train.dataset_name, or data.dataset_name")
        result.put("student.data_args.sources", [{"hub": "data.train"}], "data.train")  # one error is enough
    for entry in train:
        repeat, path = entry.get("repeat", (1, ""))
        if repeat not in (None, 1):
            result.refuse(path, f"= {repeat} repeats training data, which is not supported; set max_num_epochs instead")
    _put_sources(result, "student.data_args.sources", train)
    if validation:
        _put_sources(result, "validation.data_args.sources", validation)
        _put_repeat(result, validation)
    for key in ("prompt_file", "system_prompt_file"):
        if (found := _common(result, key, datasets.all)) is None:
            continue
        name, path = found
        file = _find_prompt(name, locations)
        if file is None:
            example = f"examples/prompts/{Path(name).stem}.txt"
            result.refuse(path, f"= {name} is not a text file; write it, for example as {example}")
        elif key == "prompt_file":
            result.put("student.data_args.prompt_file", str(file), path)
        else:
            result.put("student.data_args.default_system", file.read_text(encoding="utf-8").strip(), path)


def environment_of(result: Translation, datasets: Datasets) -> tuple[str, str] | None:
    """The ``env_name`` of the datasets and where it is written; None if there is none."""
    named = [entry for entry in datasets.all if entry.get("env_name", (None, ""))[0] is not None]
    return _common(result, "env_name", named)


def _put_repeat(result: Translation, validation: list[Entry]) -> None:
    """Several answers to each validation question; NeMo-RL limits the number of answers, Limbeck that of questions."""
    repeats = {entry["repeat"] for entry in validation if entry.get("repeat", (None, ""))[0] is not None}
    if len({repeat for repeat, _ in repeats}) > 1:
        result.refuse("data.validation", "has datasets with different values of repeat; use one value")
    elif repeats:
        repeat, path = repeats.pop()
        result.put("validation.rollout.num_generations", repeat, path)
        answers = result.get("validation.rollout.max_samples")
        if type(answers) is int and type(repeat) is int and repeat > 0:
            result.put("validation.rollout.max_samples", -(-answers // repeat), "distillation.max_val_samples")


def _put_sources(result: Translation, target: str, entries: list[Entry]) -> None:
    sources = [_source(result, entry) for entry in entries]
    if sources:
        name = "data_path" if "data_path" in entries[0] else "dataset_name"
        result.put(target, sources, entries[0].get(name, (None, "data"))[1])


def _source(result: Translation, entry: Entry) -> dict[str, Any]:
    """The entry of ``data_args.sources`` for a dataset; one by its name alone if it is refused."""

    def value(key: str) -> Any:
        return entry.get(key, (None, ""))[0]

    name, file = value("dataset_name"), value("data_path")
    by_hub = {part["hub"]: named for named, parts in NAMED_DATASETS.items() for part in parts}
    known = by_hub.get(name, name)
    # A file that stands in for a dataset has its columns, as a copy of it does.
    columns = NAMED_DATASETS[known][0] if file is not None and known in NAMED_DATASETS else _GENERIC.get(name, {})
    source: dict[str, Any] = {"hub": str(name)}
    if file is not None and not isinstance(file, str):
        result.refuse(entry["data_path"][1], f"= {format_value(file)} is not text: the name of a file or of a dataset")
    elif file is not None:
        source = {"path": [file]} if _is_file(file) else {"hub": file}
    elif name in NAMED_DATASETS or name in by_hub:
        source = {"hub": known}
    elif isinstance(name, str) and _is_file(name):
        source = {"path": [name]}
    elif name is None or name in _GENERIC:
        path = entry.get("dataset_name", (None, "data.train"))[1]
        if path not in {one.path for one in result.contradictions}:  # nor a value of the wrong kind
            result.refuse(path, "needs data_path, a file; set it")
    else:
        near = difflib.get_close_matches(str(name), NAMED_DATASETS, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"use one of {', '.join(NAMED_DATASETS)}, or set data_path to a file"
        )
        result.refuse(entry["dataset_name"][1], f"= {name} is not a dataset that Limbeck knows by name; {hint}")
    more = {
        "format": columns.get("format"),
        "question_key": value("input_key") or columns.get("question_key"),
        "answer_key": value("output_key") or columns.get("answer_key"),
        "config": value("subset") if "hub" in source else None,
        "split": value("split") if "hub" in source else None,
        "max_samples": value("max_samples"),
    }
    return {**source, **{key: one for key, one in more.items() if one is not None}}


def _is_file(name: str) -> bool:
    return name.endswith(_FILES) or name.startswith(("/", "./", "../", "~")) or Path(name).is_file()


def _common(result: Translation, key: str, entries: list[Entry]) -> tuple[str, str] | None:
    """The value of ``key`` that all datasets have, and where it is written."""
    found = dict.fromkeys(entry.get(key, (None, "")) for entry in entries)
    values = {value for value, _ in found}
    if len(values) > 1:
        path = next(path for value, path in found if value is not None)
        result.refuse(path, "is not the same for all datasets, which is not supported; set it in data.default only")
    value, path = next(iter(found), (None, ""))
    return None if value is None or len(values) > 1 else (str(value), path)


def _find_prompt(name: str, locations: Mapping[str, SourceLocation]) -> Path | None:
    """The text file ``name``, or ``name.txt`` in a folder of prompts.

    It is searched for in the working directory, in the folders of the configuration and those around them, and in Limbeck's
    own repository.
    """
    files = dict.fromkeys(Path(location.file).resolve() for location in locations.values() if location.line)
    bases = dict.fromkeys([Path.cwd(), *(folder for file in files for folder in file.parents), _REPOSITORY])
    candidates = (
        base / folder / Path(candidate).expanduser()
        for base in bases
        for folder in _PROMPT_FOLDERS
        for candidate in (name, f"{name}.txt")
    )
    return next((file for file in candidates if file.is_file()), None)
