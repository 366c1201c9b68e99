"""The data of Megatron-LM's command line: blends of ``.bin``/``.idx`` corpora, splits, and mock data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from limbeck.config.dialects.megatron_models import whole
from limbeck.config.translation import Translation

TRAIN, VALID = "student.data_args.sources", "validation.data_args.sources"

SPLIT = "969,30,1"
"""Megatron's default of ``--split``."""

MOCK_ROWS = 1024
"""Rows of mock data; a run repeats them."""

_WAYS = (
    ("train-data-path", "valid-data-path", "test-data-path"),
    ("per-split-data-args-path",),
    ("mock-data",),
    ("data-path",),
    ("data-args-path",),
)
"""Flags that name the data; only those of one line go together."""

Blend = list[tuple[float | None, str]]
"""The weight, if it has one, and the path of each corpus."""


def translate_data(result: Translation, given: Mapping[str, Any], batch: int, eval_iters: int) -> None:
    """Set the sources of training and validation.

    Args:
        batch: rows of a step.
        eval_iters: Megatron's default of ``--eval-iters``.
    """
    if any(result.get(key) for key in (TRAIN, "student.data_args.file_name")):
        return
    count = whole(result, given, "eval-iters", eval_iters)
    chosen = [flags for flags in _WAYS if any(flag in given for flag in flags)]
    if len(chosen) > 1:
        one, other = (next(flag for flag in flags if flag in given) for flags in chosen[:2])
        result.refuse(f"--{one}", f"cannot be combined with --{other}; keep one of them")
        result.put(TRAIN, [{"mock": 1}], f"--{one}")  # one error is enough
        return
    rows = None if "full-validation" in given else count * batch
    if given.get("mock-data"):
        result.ignored.extend(["--split"] if "split" in given else [])
        result.put(TRAIN, [{"mock": max(MOCK_ROWS, batch)}], "--mock-data")
        if rows != 0:
            result.put(VALID, [{"mock": min(rows or MOCK_ROWS, MOCK_ROWS)}], "--mock-data")
        return
    blends = _blends(result, given)
    if blends is None or not blends[0]:
        result.put(TRAIN, [{"mock": 1}], "--data-path")  # one error is enough
        return
    train, valid, flags = blends
    result.put(TRAIN, [_source(weight, path, part) for weight, path, part in train], flags[0])
    if valid and rows != 0:
        sources = [_source(None, path, part) for _, path, part in valid]
        if rows is not None:
            total = sum(1.0 if weight is None else weight for weight, *_ in valid)
            for source, (weight, *_) in zip(sources, valid, strict=True):
                source["max_samples"] = max(math.ceil(rows * (1.0 if weight is None else weight) / total), 1)
        result.put(VALID, sources, flags[1])


Parts = list[tuple[float | None, str, tuple[float, float] | None]]
"""Weight, path, and part of the documents (None for all) of each corpus."""


def _blends(result: Translation, given: Mapping[str, Any]) -> tuple[Parts, Parts, tuple[str, str]] | None:
    """What is trained on, what is validated on, and their flags; None after an error."""
    per_split = {name: given.get(f"{name}-data-path") for name in ("train", "valid", "test")}
    words, flag = given.get("data-path"), "--data-path"
    if "data-args-path" in given:
        text, flag = _text(result, given, "data-args-path"), "--data-args-path"
        if text is None:
            return None
        words = text.split()
    if "per-split-data-args-path" in given:
        flag = "--per-split-data-args-path"
        text = _text(result, given, "per-split-data-args-path")
        if text is None:
            return None
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            result.refuse(flag, f"= {given[flag[2:]]} is not JSON: {error}")
            return None
        if not isinstance(content, dict) or not all(map(_is_blend, content.values())):
            result.refuse(flag, f"= {given[flag[2:]]} must have a list of paths and weights for train, valid and test")
            return None
        per_split = {name: content.get(name) for name in ("train", "valid", "test")}
    if per_split["train"]:
        if "split" in given:
            result.refuse("--train-data-path", "cannot be combined with --data-path or --split; keep one of them")
            return None
        own = flag == "--per-split-data-args-path"
        train, valid = (
            _parts(result, per_split[name], flag if own else f"--{name}-data-path") if per_split[name] else []
            for name in ("train", "valid")
        )
        if per_split["test"]:
            result.ignored.append(flag if own else "--test-data-path")
        return train, valid, (flag, flag) if own else ("--train-data-path", "--valid-data-path")
    if not words:
        result.refuse(
            "student.data_args.file_name",
            "is not set; give --data-path CORPUS, --mock-data, or this key with any other data",
        )
        return None
    if "split" not in given:
        result.notices.append(f"--split is not given, and is {SPLIT} as in Megatron-LM: training, validation and test.")
    parts = split_parts(str(given.get("split", SPLIT)))
    if parts is None:
        result.refuse(
            "--split", f"= {given['split']} must be the shares of training, validation and test, such as 99,1,0"
        )
        return None
    if parts[0] is None:
        result.refuse("--split", f"= {given['split']} leaves no documents for training")
        return None
    blend = _parts(result, words, flag)

    def taken(part: tuple[float, float] | None) -> Parts:
        return [] if part is None else [(weight, path, part) for weight, path, _ in blend]

    train, valid = taken(parts[0]), taken(parts[1])
    return train, valid, (flag, "--split")


def split_parts(text: str) -> list[tuple[float, float] | None] | None:
    """The parts of the documents for training, validation and test, as fractions; None instead of an empty part.

    None if ``text`` is no list of one to three numbers that are not all 0.
    """
    if not re.fullmatch(r"\s*[\d.]+(\s*,\s*[\d.]+){0,2}\s*", text):
        return None
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        return None
    if not 0 < (total := sum(shares)) < math.inf:
        return None
    ends = [end / total for end in accumulate([0.0, *shares, *([0.0] * (3 - len(shares)))])]
    return [(round(first, 9), round(min(last, 1.0), 9)) if last > first else None for first, last in pairwise(ends)]


def read_blend(words: Sequence[str]) -> Blend | None:
    """The blend that a list of paths, or of weights and paths in turn, describes; None if only some paths have a weight."""
    pairs = [(_weight(weight), path) for weight, path in zip(words[::2], words[1::2], strict=False)]
    weighted = [weight is not None for weight, _ in pairs]
    if len(words) % 2 or not any(weighted):
        return [(None, path) for path in words]
    return list(pairs) if all(weighted) else None


def _is_blend(value: Any) -> bool:
    """Whether a value of JSON can be a blend, or none."""
    is_list = isinstance(value, list) and all(isinstance(word, (str, int, float)) for word in value)
    return is_list or value is None or isinstance(value, str)


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parts(result: Translation, words: Any, flag: str) -> Parts:
    words = words.split() if isinstance(words, str) else [word for text in words for word in str(text).split()]
    blend = read_blend(words)
    if not blend:
        result.refuse(flag, f"= {' '.join(words)} must be paths, or a weight before each path")
        return []
    weights = [1.0 if weight is None else weight for weight, _ in blend]
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        result.refuse(flag, f"= {' '.join(words)} must have weights of 0 or more that are not all 0")
        return []
    return [(weight, path, None) for weight, path in blend]


def _source(weight: float | None, path: str, part: tuple[float, float] | None) -> dict[str, Any]:
    source: dict[str, Any] = {"path": path, "concatenate": True}
    if part not in (None, (0.0, 1.0)):
        source["documents"] = list(part or ())
    return source if weight is None else {**source, "weight": weight}


def _text(result: Translation, given: Mapping[str, Any], name: str) -> str | None:
    """The text of the file that a flag names; None after an error."""
    try:
        return Path(given[name]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        result.refuse(f"--{name}", f"= {given[name]} cannot be read ({error}); check the path")
        return None
