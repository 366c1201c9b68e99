"""The dialect of Megatron-LM's command line with ModelOpt's distillation: ``pretrain_gpt.py`` and ``pretrain_mamba.py``.

``megatron_table`` says what becomes of each argument; this module translates those that need code. Limbeck's own keys may be
written among the arguments, as ``key=value``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.config.dialects import megatron_table as table
from limbeck.config.dialects.arguments import Parser, override
from limbeck.config.dialects.base import Source
from limbeck.config.dialects.megatron_checkpoints import Start, find_start
from limbeck.config.dialects.megatron_data import translate_data
from limbeck.config.dialects.megatron_models import (
    number,
    share_with_teacher,
    student_layers,
    translate_student,
    translate_teacher,
    whole,
)
from limbeck.config.dialects.megatron_yaml import read_arguments
from limbeck.config.launcher import launched_processes
from limbeck.config.locations import COMMAND_LINE, SourceLocation
from limbeck.config.schema import DistillConfig
from limbeck.config.schema.path_rules import path_fault
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value
from limbeck.errors import LimbeckError
from limbeck.folders import list_checkpoints

DEFAULT = "Megatron-LM's default"

DEFAULTS: dict[str, Any] = {
    "seed": 1234,
    "logging_steps": 100,
    "student.training_args.weight_decay": 0.01,
    "student.training_args.adam_beta1": 0.9,
    "student.training_args.adam_beta2": 0.999,
    "student.training_args.adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "save_steps": 0,
    "eval_steps": 1000,
    "exp_name": "megatron",
    "temperature_squared": False,
    # The loss of ModelOpt's documentation: LM + kd_loss_scale · KL, without the scaling of each micro-batch.
    "loss_balance": "weighted",
}
"""Megatron's defaults, under Limbeck's keys."""

EVAL_ITERS = 100

Values = dict[str, Any]
"""Each argument that is given, without dashes: its text, a list of texts, or True for a switch."""


class MegatronDialect:
    """The arguments of ``pretrain_gpt.py``."""

    name = "megatron"
    system = "Megatron-LM"

    def recognises(self, source: Source) -> bool:
        """Whether there is an argument that only Megatron's scripts have."""
        if isinstance(source, Mapping):
            return False
        own = {
            "--export-kd-teacher-load",
            "--micro-batch-size",
            "--train-iters",
            "--train-samples",
            "--mock-data",
            "--yaml-cfg",
        }
        return any(word.partition("=")[0] in own for word in source)

    def translate(self, source: Source, locations: dict[str, SourceLocation]) -> Translation:
        if isinstance(source, Mapping):
            raise LimbeckError(
                "the dialect megatron reads arguments, not YAML files; start examples/pretrain_gpt.py with them."
            )
        result = Translation({})
        given, overrides = parse(source)
        for key, value in overrides:
            result.put(key, value, key)
            del result.derived[key]
            locations[key] = COMMAND_LINE
        for name in given:
            locations.setdefault(f"--{name}", SourceLocation(f"--{name}"))
        if "yaml-cfg" in given:  # a flag takes precedence over the file
            given = read_arguments(result, given.pop("yaml-cfg"), locations) | given
        _check_text(given)
        _translate(result, given, locations)
        return result


DIALECT = MegatronDialect()


def parse(argv: Sequence[str]) -> tuple[Values, list[tuple[str, Any]]]:
    """The arguments that are given, and Limbeck's own keys, which may stand anywhere among them.

    Raises:
        LimbeckError: for an unknown flag, with the nearest one, or a flag without its value.
    """
    ours = [word for word in argv if word.partition("=")[0].partition(".")[0] in DistillConfig.model_fields]
    ours = [word for word in ours if "=" in word]
    words = [word for word in argv if word not in ours]
    parser = Parser(prog="pretrain_gpt.py", description="Distil a teacher into a student.")
    kinds = table.kinds()
    for name, kind in kinds.items():
        options: dict[str, Any] = {"action": "store_true"}
        if kind != table.SWITCH:
            options = {"metavar": "VALUE", **({"nargs": "+"} if kind == table.VALUES else {})}
        spellings = {f"--{name}", f"--{name.replace('opt-param', 'opt_param')}"}
        parser.add_argument(*sorted(spellings), dest=name, help=table.meaning(name).replace("%", "%%"), **options)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of Limbeck")
    found, rest = parser.parse_known_args(words)
    parser.refuse_unknown(rest, [f"--{name}" for name in kinds])
    given = vars(found)
    others = [*given.pop("overrides", []), *rest]
    return given, [override(word) for word in [*others, *ours]]


def _translate(result: Translation, given: Values, locations: dict[str, SourceLocation]) -> None:
    _refuse(result, given)
    result.ignored.extend(f"--{name}" for name in table.IGNORED if name in given)
    for name, key in table.MOVED.items():
        if name in given:
            result.set(key, given[name], f"--{name}")
    start = find_start(result, given)
    dims = _parallel(result, given, start)
    _precision(result, given)
    steps = _steps(result, given, dims, start)
    _schedule(result, given, steps)
    translate_student(result, given, start)
    translate_teacher(result, given, locations)
    share_with_teacher(result, given)
    for role in ("student", "teacher") if "trust-remote-code" in given else ():
        result.default(f"{role}.model_args.trust_remote_code", True, "--trust-remote-code")
    translate_data(result, given, steps.batch, EVAL_ITERS)
    _trackers(result, given)
    _save(result, given, dims)
    for key, value in DEFAULTS.items():
        result.default(key, value, DEFAULT)
    balance = result.derived.get("loss_balance")
    if result.get("distillation_config") is not None and balance == DEFAULT:
        result.notices.append(
            "the terms of the loss are added with fixed weights, as ModelOpt's documentation has it; its code scales them to "
            "each other in every micro-batch, which loss_balance=modelopt does."
        )


def _check_text(given: Values) -> None:
    """Raise LimbeckError for text that is not UTF-8, or can be no name of a file where that is the value of a flag."""
    for name, value in given.items():
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        # An argument that is not UTF-8 has half surrogate pairs in place of the other bytes.
        fault = "it is not UTF-8" if re.search("[\ud800-\udfff]", " ".join(texts)) else None
        if isinstance(value, str) and name not in table.MODEL_VALUES:
            fault = fault or path_fault(value)
        if fault is not None:
            raise LimbeckError(f"--{name} = {' '.join(texts)[:30]!a} cannot be read: {fault}.")


def _refuse(result: Translation, given: Values) -> None:
    for name, (_, allowed, sentence) in table.ONLY.items():
        known = {number(one) for one in allowed}
        value = given.get(name)
        each = value if isinstance(value, list) else [value]
        value = " ".join(value) if isinstance(value, list) else value
        if name in given and not any(needed in given for needed in table.NEEDED.get(name, given)):
            result.ignored.append(f"--{name}")
        elif name in given and not ({number(value)} <= known or {number(one) for one in each} <= known):
            shown = "" if value is True else f" = {value}"
            result.refuse(f"--{name}", f"{shown} {sentence}".strip())
    model = given.get("export-model-type", "GPTModel")
    if model not in ("GPTModel", *table.HYBRID_MODELS):
        result.refuse("--export-model-type", f"= {model} is not supported; use GPTModel, MambaModel or HybridModel")
    if "attention-dropout" not in given or "hidden-dropout" not in given:
        result.notices.append(
            "there is no dropout; Megatron-LM's default is 0.1 (--attention-dropout, --hidden-dropout)."
        )


def has_gpu() -> bool:
    """Whether this machine has a GPU that the process may use. PyTorch would not see a later CUDA_VISIBLE_DEVICES."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return allowed not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))


def _parallel(result: Translation, given: Values, start: Start) -> dict[str, int]:
    """Set the strategy and its dimensions for both models; returns the sizes of the student.

    An override of the teacher's layout takes precedence over the flags.
    """
    chosen = given.get("limbeck-strategy") or ("megatron" if has_gpu() else "fsdp2")
    if chosen not in ("megatron", "fsdp2"):
        result.refuse("--limbeck-strategy", f"= {chosen} is not one of megatron, fsdp2")
        chosen = "fsdp2"
    of_megatron = {name: given[name] for name in table.OF_MEGATRON if name in given}
    for flag in ("recompute-activations", "moe-layer-recompute"):
        if given.get(flag) and of_megatron.setdefault("recompute-granularity", "selective") == "full":
            result.refuse(f"--{flag}", "and --recompute-granularity full contradict each other; keep one")
    if given.get("moe-layer-recompute"):
        modules = of_megatron.get("recompute-modules", ["core_attn"])
        of_megatron["recompute-modules"] = modules if "moe" in modules else [*modules, "moe"]
    for role, mode, assign in (("student", "train", result.set), ("teacher", "infer", result.default)):
        path = f"{role}.strategy_args"
        origin = "--limbeck-strategy" if "limbeck-strategy" in given else "the devices of this machine"
        result.default(f"{path}.strategy_name", f"{chosen}_{mode}", origin)
        for name, key in table.PARALLEL.items():
            if name in given:
                value = True if name == "sequence-parallel" else whole(result, given, name, 1, least=1)
                assign(f"{path}.strategy_config.{key}", value, f"--{name}")
    sizes = {key: _size(result, key) for name, key in table.PARALLEL.items() if name != "sequence-parallel"}
    _virtual_stages(result, given, of_megatron, sizes["pipeline_model_parallel_size"], start)
    config = "student.strategy_args.strategy_config.megatron"
    if chosen == "megatron":
        for name, value in of_megatron.items():
            result.set(f"{config}.{table.megatron_key(name)}", value, f"--{name}")
            if name in table.OF_BOTH:
                teacher = config.replace("student", "teacher")
                result.default(f"{teacher}.{table.megatron_key(name)}", value, f"--{name}")
    elif "limbeck-strategy" not in given:
        unread = f" without {', '.join(f'--{name}' for name in of_megatron)}" if of_megatron else ""
        result.notices.append(
            f"this machine has no GPU, which Megatron needs, so the strategy is fsdp2 with the same parallel sizes{unread}."
        )
    else:
        result.ignored.extend(f"--{name}" for name in of_megatron)
    recompute = "student.model_args.disable_gradient_checkpointing"
    if chosen == "fsdp2" or "recompute-granularity" not in of_megatron:
        full = of_megatron.get("recompute-granularity") == "full"
        result.default(recompute, not full, "--recompute-granularity" if full else DEFAULT)
    return sizes


def _size(result: Translation, key: str) -> int:
    """The student's size of a parallel dimension, from an override or a flag; the schema refuses others than whole numbers."""
    value = number(result.get(f"student.strategy_args.strategy_config.{key}"))
    return value if type(value) is int and value > 0 else 1


def _virtual_stages(result: Translation, given: Values, of_megatron: Values, pipeline: int, start: Start) -> None:
    stages, layers = (
        given.get(name) for name in ("num-virtual-stages-per-pipeline-rank", "num-layers-per-virtual-pipeline-stage")
    )
    if layers is not None:
        flag = "num-layers-per-virtual-pipeline-stage"
        held = whole(result, given, flag, 1) * pipeline
        every = student_layers(result, given, start)
        if not every or not held or every % held:
            number_of = f"{every}" if every else "not known; give it"
            result.refuse(
                f"--{flag}",
                f"= {layers} times --pipeline-model-parallel-size must divide --num-layers, which is {number_of}",
            )
            return
        stages = every // held
    if stages is not None and number(stages) != 1:
        of_megatron["virtual-pipeline-model-parallel-size"] = stages


def _precision(result: Translation, given: Values) -> None:
    chosen = [name for name in ("bf16", "fp16") if name in given]
    if len(chosen) == 2:
        result.refuse("--fp16", "and --bf16 contradict each other; keep one")
    for role in ("student", "teacher"):
        result.default(
            f"{role}.model_args.dtype", chosen[0] if chosen else "fp32", f"--{chosen[0]}" if chosen else DEFAULT
        )
    kind = str(result.get("student.strategy_args.strategy_name")).removesuffix("_train")
    for flag, values in table.LOSS_SCALE.items():
        if flag in given and "fp16" not in given:
            result.ignored.append(f"--{flag}")
        elif flag in given and number(given[flag]) != values.get(kind):
            only = f"; with the strategy {kind} it is {values[kind]}" if kind in values else ""
            result.refuse(
                f"--{flag}", f"= {given[flag]} is not supported with --fp16{only}; remove it, or train with --bf16"
            )
    if "grad-reduce-in-bf16" in given and "bf16" in given:
        result.set("student.strategy_args.strategy_config.reduce_dtype", "bf16", "--grad-reduce-in-bf16")
    elif "grad-reduce-in-bf16" in given:
        result.ignored.append("--grad-reduce-in-bf16")


@dataclass(frozen=True)
class _Steps:
    """batch: rows of a step of all ranks. steps: of the whole run, without --exit-interval."""

    batch: int
    steps: int


def _steps(result: Translation, given: Values, dims: Mapping[str, int], start: Start) -> _Steps:
    """Set micro-batches and steps. Numbers that cannot be read are errors and count as 1."""
    if "micro-batch-size" not in given:
        result.refuse("--micro-batch-size", "is not given; give the number of rows of a micro-batch")
    micro = whole(result, given, "micro-batch-size", 1, least=1)
    if number(given.get("micro-batch-size", micro)) != micro:
        # One error is enough.
        result.put("student.training_args.per_device_train_batch_size", micro, "--micro-batch-size")
    world, together = launched_processes() or 1, 1
    for size in dims.values():
        together *= max(size, 1)
    ranks = max(world // together, 1)
    batch = whole(result, given, "global-batch-size", micro * ranks, least=1)
    if batch % (micro * ranks):
        result.refuse(
            "--global-batch-size",
            f"= {batch} is not a multiple of --micro-batch-size {micro} x {ranks} data parallel ranks "
            f"({world} processes / {together} of a model)",
        )
    result.default(
        "student.training_args.gradient_accumulation_steps", max(batch // (micro * ranks), 1), "--global-batch-size"
    )
    result.default("student.infer_batch_size", micro, "--micro-batch-size")
    names = [name for name in ("train-iters", "train-samples") if name in given]
    if len(names) != 1 and result.get("max_steps") is None:
        problem = (
            "and --train-iters are both given; keep one" if names else "is not given, nor is --train-samples; give one"
        )
        result.refuse(f"--{names[-1] if names else 'train-iters'}", problem)
    own = number(result.get("max_steps"))
    steps = own if type(own) is int else 1
    if "train-iters" in given:
        steps = whole(result, given, "train-iters", 1, least=1)
    elif "train-samples" in given:
        samples = whole(result, given, "train-samples", batch, least=1)
        if samples < batch:
            result.refuse("--train-samples", f"= {samples} must be at least {batch}, the number of rows of a step")
        steps = max(samples // batch, 1)
    last = steps
    if "exit-interval" in given:
        interval = whole(result, given, "exit-interval", 1, least=1)
        step = start.resumed.name.removeprefix("checkpoint-") if start.resumed else "0"
        done = int(step) if step.isdecimal() else 0
        last = min(steps, (done // interval + 1) * interval)
    result.default(
        "max_steps", last, "--exit-interval" if last != steps else f"--{names[0] if names else 'train-iters'}"
    )
    if "exit-duration-in-mins" in given:
        minutes = whole(result, given, "exit-duration-in-mins", 1, least=1)
        limit = f"{minutes // 60:02d}:{minutes % 60:02d}"
        result.set("checkpoint_config.save_before", limit, "--exit-duration-in-mins")
    return _Steps(batch, steps)


def _schedule(result: Translation, given: Values, steps: _Steps) -> None:
    """Set ``lr_scheduler_type: megatron``. Numbers of samples become numbers of steps."""

    def in_steps(stem: str, default: int) -> int:
        chosen = [
            f"{stem}-{unit}" for unit in ("fraction", "samples", "iters") if number(given.get(f"{stem}-{unit}", 0))
        ]
        if len(chosen) > 1:  # Megatron-LM also accepts one beside another that is 0
            result.refuse(f"--{chosen[0]}", f"and --{chosen[1]} are both given; keep one")
        if f"{stem}-samples" in chosen:
            return whole(result, given, f"{stem}-samples", default * steps.batch) // steps.batch
        return whole(result, given, f"{stem}-iters", default)

    if "lr" not in given:
        result.refuse("--lr", "is not given; give the learning rate")
    path = "student.training_args"
    decay = in_steps("lr-decay", steps.steps)
    warmup = in_steps("lr-warmup", 0)
    if "lr-warmup-fraction" in given:
        fraction = number(given["lr-warmup-fraction"])
        if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            result.refuse("--lr-warmup-fraction", f"= {format_value(fraction)} must be a number from 0 to 1")
            fraction = 0
        warmup = int(fraction * decay) if fraction else warmup
    style = given.get("lr-decay-style", "linear")
    kwargs: dict[str, Any] = {"decay_style": style, "decay_steps": decay}
    if style == "WSD":
        kwargs["wsd_decay_steps"] = in_steps("lr-wsd-decay", 0)
        kwargs["wsd_decay_style"] = given.get("lr-wsd-decay-style", "exponential")
    if result.get(f"{path}.lr_scheduler_type") is None:
        result.put(f"{path}.lr_scheduler_type", "megatron", "--lr-decay-style")
        result.put(f"{path}.lr_scheduler_kwargs", kwargs, "--lr-decay-style")
        for flag, key in (("min-lr", "min_lr"), ("lr-warmup-init", "warmup_init")):
            if flag in given:
                result.put(f"{path}.lr_scheduler_kwargs.{key}", number(given[flag]), f"--{flag}")
    flag = next((name for name in ("fraction", "samples", "iters") if f"lr-warmup-{name}" in given), "iters")
    result.default(f"{path}.warmup_steps", warmup, f"--lr-warmup-{flag}")


def _trackers(result: Translation, given: Values) -> None:
    """``--tensorboard-dir`` and ``--wandb-project`` each select their tracker; without both there is none."""
    arguments: dict[str, dict[str, Any]] = {}
    if "tensorboard-dir" in given:
        arguments["tensorboard"] = {"log_dir": given["tensorboard-dir"]}
    if given.get("wandb-project"):
        names = {
            "wandb-project": "project",
            "wandb-exp-name": "name",
            "wandb-entity": "entity",
            "wandb-save-dir": "log_dir",
        }
        arguments["wandb"] = {key: given[flag] for flag, key in names.items() if given.get(flag)}
    if result.get("track_with") is not None:
        return
    origin = "--tensorboard-dir" if "tensorboard" in arguments else "--wandb-project" if arguments else DEFAULT
    chosen = list(arguments)
    result.put("track_with", chosen if len(chosen) > 1 else chosen[0] if chosen else "none", origin)
    if chosen:
        result.default("tracker_kwargs", arguments if len(chosen) > 1 else arguments[chosen[0]], origin)


def _refuse_used(result: Translation, folder: str) -> None:
    """Refuse a ``--save`` with checkpoints of a run that this one does not resume, which would mix with its own."""
    elsewhere = result.get("checkpoint_config.output_dir") or result.get("output_dir") != folder
    if not result.get("resume_from_checkpoint") and not elsewhere and list_checkpoints(Path(folder)):
        result.refuse(
            "--save",
            f"= {folder} has checkpoints of an earlier run; give --load {folder} without --finetune to go on with it, or "
            "another --save",
        )


def _save(result: Translation, given: Values, dims: Mapping[str, int]) -> None:
    if "save" not in given and result.get("output_dir") is None:
        result.notices.append("--save is not given: the last checkpoint is kept in ./output.")
    if "save" in given:
        _refuse_used(result, given["save"])
        result.default("checkpoint_config.save_megatron", True, "--save")
    if "ckpt-format" not in given or result.get("checkpoint_config.save_megatron") is not True:
        return
    divided = any(dims[f"{axis}_model_parallel_size"] > 1 for axis in ("tensor", "pipeline"))
    if given["ckpt-format"] == "torch" and (divided or number(given.get("expert-model-parallel-size", 1)) != 1):
        result.notices.append(
            "--ckpt-format torch: the student is saved as torch_dist, which Megatron-LM loads in this layout; what Limbeck "
            "writes as torch is for a single rank."
        )
    else:
        result.default("checkpoint_config.megatron_format", given["ckpt-format"], "--ckpt-format")
