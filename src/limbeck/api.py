"""``limbeck.distill``: a whole run in one call from Python."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.config import DistillConfig, load_mapping
from limbeck.config.schema import DataArgs, StudentConfig, StudentModelArgs, TrainingArgs
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from limbeck.train.result import RunResult

_SECTIONS = (
    ("", DistillConfig),
    ("student.", StudentConfig),
    ("student.training_args.", TrainingArgs),
    ("student.model_args.", StudentModelArgs),
    ("student.data_args.", DataArgs),
)
_OF_BOTH = ("dtype", "attn_implementation")  # without a path, these are set for both models


def distill(
    student: str | Path,
    teacher: str | Path | None,
    data: str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]],
    **overrides: Any,
) -> RunResult:
    """Distil ``teacher`` into ``student`` on ``data``.

    Args:
        student: folder or hub id of the checkpoint that the student starts from.
        teacher: folder or hub id of the teacher; None trains with cross-entropy only, unless ``teacher.source`` is set.
        data: a file, several files, or the rows as dicts.
        overrides: keys of ``DistillConfig``, by name (``max_steps=200``; the sections of the student are searched) or by
            path (``**{"teacher.model_args.dtype": "bf16"}``). ``dtype`` and ``attn_implementation`` are set for both models.

    Returns:
        The result of the run; ``result.student`` is the folder of the trained student.

    Raises:
        LimbeckError: with one line per mistake.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, str | Path | None):
            raise LimbeckError(
                f"distill({name}=…) takes the folder or the hub id of a checkpoint, not a {type(model).__name__}; save the "
                "model, or use DistillTrainer, which takes models."
            )
    values: dict[str, Any] = {}
    _set(values, "student_pretrain", str(student))
    if teacher is not None:
        _set(values, "teacher_pretrain", str(teacher))
    elif not overrides.keys() & {"distill_loss_weight", "teacher.source"}:
        _set(values, "distill_loss_weight", 0.0)
    for key, value in overrides.items():
        _set(values, _path(key), value)
        if key in _OF_BOTH and f"teacher.model_args.{key}" not in overrides:
            _set(values, f"teacher.model_args.{key}", value)
    _set(values, "student.data_args.file_name", _files(data, Path(values.get("output_dir", "output"))))
    loaded = load_mapping(values, "distill()")

    from limbeck.plan.adapt import adapt
    from limbeck.train.loop import DistillPipeline

    return DistillPipeline(loaded.config, adapt, loaded.notices).run()


def _path(key: str) -> str:
    return next((place + key for place, section in _SECTIONS if key in section.model_fields), key)


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


def _files(data: Any, output_dir: Path) -> list[str]:
    given: list[Any] = [data] if isinstance(data, (str, Path)) else list(data)
    if not given:
        raise LimbeckError("distill(data=…) is empty; give a file, several files, or rows as dicts.")
    if not isinstance(given[0], Mapping):
        return [str(file) for file in given]
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in given)
    # Named by its content and renamed when complete: other calls and other ranks never find other rows under the name.
    path = output_dir / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return [str(path)]
