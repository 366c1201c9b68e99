"""The checkpoints that Megatron-LM's flags name: where they are, of which format, and what they store about their model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.config.dialects import megatron_table as table
from limbeck.config.schema.path_rules import path_fault
from limbeck.config.translation import Translation
from limbeck.errors import LimbeckError
from limbeck.folders import is_megatron_checkpoint, list_checkpoints, megatron_iterations, run_weights, stored_config

NAME = "student.model_args.model_name_or_path"
ARGUMENTS = "megatron_arguments"


@dataclass(frozen=True)
class Start:
    """What the student starts from.

    name: the checkpoint with its weights, a folder or an id on the hub; None for random weights. flag: which names it.
    resumed: the checkpoint of the run that goes on; None for a new run. arguments: of Megatron, with which that run described
    its student.
    """

    name: str | None
    flag: str = "--load"
    resumed: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def is_hugging_face(name: str) -> bool:
    """Whether a folder has a Hugging Face checkpoint, or the name can only be one on the hub: OWNER/NAME."""
    folder = Path(name)
    of_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.exists()
    return (folder / "config.json").is_file() or of_hub


def find_checkpoint(name: str, step: str | None = None, *, may_be_new: bool = False) -> str | None:
    """The checkpoint that ``name`` stands for: the newest of a run or the one of ``step``, or ``name`` itself.

    may_be_new: ``name`` is ``--save`` without a checkpoint of the run, and only a checkpoint of another program in it counts.
    """
    folder = Path(name)
    if step is not None:
        found = _steps(folder, of_runs=not may_be_new).get(step)
        return None if found is None else str(found)
    if not may_be_new and (weights := run_weights(folder)) is not None:
        return str(weights)
    is_one = is_megatron_checkpoint(name) or (is_hugging_face(name) and (folder.exists() or not may_be_new))
    return name if is_one else None


def _steps(folder: Path, *, of_runs: bool = True) -> dict[str, Path]:
    """The checkpoints in ``folder`` by step: of a run, or else of Megatron-LM."""
    found = [path for path in list_checkpoints(folder) if (path / "config.json").is_file()] if of_runs else []
    by_step = {path.name.rpartition("-")[2]: path for path in found}
    return by_step or {str(step): path for step, path in megatron_iterations(folder).items()}


def layers_and_experts(name: str | None, arguments: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The numbers of layers, and of experts of a layer, of the model of a checkpoint; None where they are not known.

    arguments: of Megatron, which replace those in the checkpoint.
    """
    stored = {} if name is None else _description(name)
    found = {**stored, **arguments}
    layers, experts = (
        next((found[key] for key in keys if isinstance(found.get(key), int)), None)
        for keys in (("num_hidden_layers", "num_layers"), ("num_local_experts", "num_experts"))
    )
    return layers, 0 if experts is None and stored else experts


def _description(name: str) -> dict[str, Any]:
    """The ``config.json`` or Megatron's arguments of a checkpoint; empty if they cannot be read, which is an error when the
    model is loaded.
    """
    try:
        if is_megatron_checkpoint(name):
            from limbeck.megatron_files.arguments import stored_arguments  # imports PyTorch

            return stored_arguments(name)
        found = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, LimbeckError):
        return {}
    return found if isinstance(found, dict) else {}


def resumes(given: Mapping[str, Any]) -> bool:
    """Whether ``--load`` is ``--save``, in any spelling, and the run in that folder goes on."""
    load, save = given.get("load"), given.get("save")
    if not load or not save:
        return False
    return os.path.realpath(load) == os.path.realpath(save) and "finetune" not in given


def _resumed(result: Translation, given: Mapping[str, Any]) -> Path | None:
    """The checkpoint that a run resumes: of ``resume_from_checkpoint``, of ``--ckpt-step``, or the newest in ``--save``."""
    setting = result.get("resume_from_checkpoint")
    if setting in (False, "false", "") or (setting is None and not resumes(given)):
        return None
    if setting not in (None, True, "true", "latest"):
        if path_fault(str(setting)):
            return None
        path = Path(str(setting))
        return next(reversed(list_checkpoints(path)), path)
    folder = result.get("checkpoint_config.output_dir") or given.get("save") or result.get("output_dir") or "output"
    found = list_checkpoints(Path(str(folder)))
    if setting is None and "ckpt-step" in given:
        return next((path for path in found if path.name == f"checkpoint-{given['ckpt-step']}"), None)
    return found[-1] if found else None


def find_start(result: Translation, given: Mapping[str, Any]) -> Start:
    """What the student starts from, with ``resume_from_checkpoint`` set if a run goes on.

    ``--load`` that is ``--save`` resumes the run in that folder. Until it has a checkpoint of Limbeck, one of another program
    there or ``--pretrained-checkpoint`` starts the student.
    """
    load, pretrained = (given.get(name) for name in ("load", "pretrained-checkpoint"))
    resumed, goes_on = _resumed(result, given), resumes(given)
    for flag, sentence in table.OF_RESUMED.items():
        if flag in given and resumed:
            result.refuse(f"--{flag}", sentence.format(resumed, flag=f"--{flag}"))
        elif flag in given:
            result.ignored.append(f"--{flag}")
    if goes_on:
        of_step = resumed is not None and "ckpt-step" in given
        result.default(
            "resume_from_checkpoint", str(resumed) if of_step else "latest", "--ckpt-step" if of_step else "--load"
        )
    start = None if resumed is None else _start_of_run(resumed)
    if start is not None:
        return start
    step = given.get("ckpt-step")
    for name, flag in ((load, "--load"), (pretrained, "--pretrained-checkpoint")):
        if name is None:
            continue
        may_be_new = flag == "--load" and goes_on
        found = None if may_be_new and resumed else find_checkpoint(name, step, may_be_new=may_be_new)
        if found is not None:
            return Start(found, flag, resumed)
        if step is not None and not resumed and (may_be_new or find_checkpoint(name) is not None):
            steps = ", ".join(_steps(Path(name)))
            others = f", which has {steps}; give one of these, or remove it for the newest" if steps else "; remove it"
            result.refuse("--ckpt-step", f"= {step} has no checkpoint in {name}{others}")
            return Start(name, flag)
        if not may_be_new and (flag != "--load" or pretrained is None):
            result.refuse(
                flag, f"= {name} has no checkpoint, neither of Megatron-LM nor of Hugging Face; check the path"
            )
            return Start(name, flag)
    if load is not None and resumed is None and "exit-on-missing-checkpoint" in given:
        result.refuse(
            "--load", f"= {load} has no checkpoint; check the path, or start without --exit-on-missing-checkpoint"
        )
    named = result.get(NAME) or result.get("student_pretrain")
    if not _has_layers(given) and not named:
        if resumed is not None:
            return Start(str(resumed), resumed=resumed)
        if load is None and pretrained is None:
            result.refuse(
                "student_pretrain",
                "is not set; give --load CHECKPOINT, or --num-layers and the other sizes of a new student",
            )
    result.ignored.extend(f"--{flag}" for flag in table.OF_LOADED if flag in given and not named)
    return Start(None, resumed=resumed)


def _start_of_run(checkpoint: Path) -> Start | None:
    """What the run of ``checkpoint`` began from, by the configuration that it stores, or ``checkpoint`` where that is gone.

    None if no configuration can be read, as in a damaged checkpoint.
    """
    student = stored_config(checkpoint).get("student")
    model = student.get("model_args") if isinstance(student, dict) else None
    if not isinstance(model, dict):
        return None
    name, arguments = model.get("model_name_or_path"), dict(model.get(ARGUMENTS) or {})
    arguments.pop("tokenizer_model", None)  # the tokenizer of the run
    gone = name is not None and not is_hugging_face(name) and not Path(name).exists()
    # Adapters are trained beside the weights of the start, and a checkpoint has the sum of both.
    if (gone and not model.get("lora_target")) or (name is None and not arguments):
        return Start(str(checkpoint), resumed=checkpoint)
    return Start(name, resumed=checkpoint, arguments=arguments)


def _has_layers(given: Mapping[str, Any]) -> bool:
    """Whether the number of the student's layers is given, which a pattern of a hybrid also says."""
    return any(name in given for name in ("num-layers", "hybrid-layer-pattern", "hybrid-override-pattern"))
