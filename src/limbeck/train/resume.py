"""What a run resumes from: a checkpoint and no mere model, and the settings that have changed since."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.config.locations import leaves
from limbeck.config.schema import StudentModelArgs
from limbeck.errors import LimbeckError
from limbeck.folders import TRAINING, stored_config
from limbeck.train.checkpoint import MANIFEST

_NOT_COMPARED = "resume_from_checkpoint"


def refuse_model(path: Path) -> None:
    """Raise LimbeckError if the folder that ``resume_from_checkpoint`` names is a model without the state of a run."""
    if (path / "config.json").is_file() and not (path / TRAINING).exists():
        what = f"the folder {TRAINING}/" if (path / MANIFEST).exists() else f"{MANIFEST} and the folder {TRAINING}/"
        raise LimbeckError(
            f"resume_from_checkpoint = {str(path)!r} is a model and no checkpoint: it does not have {what}, from which a run "
            "resumes. To start a new run from its weights, set student_pretrain to this folder and remove "
            "resume_from_checkpoint."
        )


def refuse_other_model(path: Path, config: Any) -> None:
    """Raise LimbeckError if the ``config.json`` of the checkpoint ``path`` describes another model than the one to train.

    config: the ``PretrainedConfig`` of that model. Parameters of equal names and shapes may belong to another function, for
    example with another base of rotary positions.
    """
    stored = json.loads((path / "config.json").read_text())
    written, writes = dict(leaves(stored)), dict(leaves(json.loads(config.to_json_string())))
    if stored.get("model_type") == config.model_type:  # built again, it has the defaults of the installed Transformers
        stored = json.loads(type(config).from_pretrained(path).to_json_string(use_diff=False))
    before, now = dict(leaves(stored)), dict(leaves(json.loads(config.to_json_string(use_diff=False))))
    # Lists last: they follow from numbers, such as a kind for each layer.
    for key in sorted({**before, **now}, key=lambda key: (key != "model_type", isinstance(now.get(key), list))):
        of_model = not any(name.startswith(_NO_MODEL) or name.endswith(_ENDS) for name in key.split("."))
        # Some models change their configuration, so that reading it again gives another one.
        differs = before.get(key) != now.get(key) and written.get(key) != writes.get(key)
        if not (of_model and differs):
            continue
        raise LimbeckError(
            f"{path} is of another student: {key} is {_shown(before.get(key))} in its config.json and {_shown(now.get(key))} "
            "in the model of this run; resume with the configuration of the checkpoint, or set another output_dir."
        )


def refuse_other_adapters(path: Path, args: StudentModelArgs, *, warns: bool) -> None:
    """Raise LimbeckError if the LoRA adapters of the checkpoint ``path`` have another rank or scale than those of ``args``.

    warns: about another ``model_name_or_path``, because the weights beside the adapters are not in the state of a run.
    """
    model = stored_config(path).get("student", {}).get("model_args", {})
    if args.lora_target is None or model.get("lora_target") is None:
        return
    stored = args.model_copy(update={key: model.get(key) for key in ("lora_rank", "lora_alpha", "model_name_or_path")})
    for key, before, now in (("rank", stored.lora_rank, args.lora_rank), ("alpha", _alpha(stored), _alpha(args))):
        if before != now:
            raise LimbeckError(
                f"{path} has LoRA adapters with {key} = {before}, and student.model_args.lora_{key} gives {now}; set lora_rank "
                "and lora_alpha as in the checkpoint, or set another output_dir."
            )
    if warns and stored.model_name_or_path != args.model_name_or_path:
        warnings.warn(
            f"The LoRA adapters in {path} belong to the weights of {stored.model_name_or_path}, and the student now has "
            f"those of {args.model_name_or_path}. Unless both are the same weights, this is another student.",
            stacklevel=2,
        )


def _alpha(args: StudentModelArgs) -> int:
    return 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha


_NO_MODEL = (
    *("_", "architectures", "dtype", "id2label", "initializer_range", "label2id", "name_or_path", "output_"),
    *(
        "problem_type",
        "quantization_config",
        "return_dict",
        "router_aux_loss_coef",
        "transformers_version",
        "use_cache",
    ),
)
_ENDS = ("_token_id", "dropout")
"""Beginnings and ends of the keys of ``config.json`` that do not change what a model computes when it is evaluated."""


def changed_settings(path: Path, config: Mapping[str, Any]) -> list[str]:
    """The differences between the configuration of the checkpoint ``path`` and ``config``, as "key: was → now".

    config: in the form in which a checkpoint stores it, without secrets.

    A damaged checkpoint has none; loading it is an error.
    """
    stored = stored_config(path)
    if not stored:
        return []
    before, now = dict(leaves(stored)), dict(leaves(json.loads(json.dumps(config))))
    shown = {key: (_shown(before.get(key)), _shown(now.get(key))) for key in {**before, **now} if key != _NOT_COMPARED}
    return [f"{key}: {was} → {will_be}" for key, (was, will_be) in shown.items() if was != will_be]


def _shown(value: Any) -> str:
    return "unset" if value is None or value == {} else json.dumps(value, ensure_ascii=False)
