"""The dialect of the HyperPod sample's ``distil_logits_cli.py``: its flags, and its nested configuration file.

A flag and a key of the file with the same meaning are one ``Setting``. A flag that is given overrides the file; defaults
fill what neither has. Limbeck's own keys may be written beside them, as ``key=value`` or at the top level of the file.
"""

from __future__ import annotations

import argparse
import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.config.dialects import training_arguments
from limbeck.config.dialects.arguments import Parser, override
from limbeck.config.dialects.base import Source
from limbeck.config.dialects.files import dataset_source, read_mapping, use_wandb
from limbeck.config.locations import COMMAND_LINE, SourceLocation, leaves
from limbeck.config.schema import DistillConfig
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value

DEFAULT = "HyperPod's default"
FSX = Path("/fsx")
"""Where the sample's cluster mounts its file system, which outlives a pod."""
SYSTEM_MESSAGE = "You are a helpful assistant."


@dataclass(frozen=True)
class Setting:
    """A flag, and the key of the configuration file with the same meaning.

    Attributes:
        flag: without dashes.
        key: dotted path in the file.
        default: None if there is none.
        help: for ``--help``.
        switch: the flag takes no value; a default of True also makes the flag ``--no-<flag>``.
    """

    flag: str
    key: str
    default: Any
    help: str
    switch: bool = False


SETTINGS = (
    Setting("project_name", "project_name", "distil-logits", "name of the run, and of its project in Weights & Biases"),
    Setting("dataset_name", "dataset.name", "mlabonne/FineTome-100k", "hub dataset, local folder or file"),
    Setting("dataset_split", "dataset.split", "train", "split of a hub dataset or a folder"),
    Setting("num_samples", "dataset.num_samples", None, "number of rows, selected by the seed; default: all"),
    Setting("seed", "dataset.seed", 42, "seed of everything random"),
    Setting("teacher_model", "models.teacher", "arcee-ai/Arcee-Spark", "folder or hub id of the teacher"),
    Setting("student_model", "models.student", "Qwen/Qwen2-1.5B", "folder or hub id of the student"),
    Setting("max_length", "tokenizer.max_length", 4096, "maximum number of tokens of a row"),
    Setting("chat_template", "tokenizer.chat_template", "chatml", "Jinja source, .jinja file or built-in template"),
    Setting("save_location", "save_location", None, "hub, fsx or both; default: both with hub_location, else fsx"),
    Setting("hub_location", "hub_location", None, "OWNER/NAME on the hub; there is no default"),
    Setting(
        "output_dir",
        "training.output_dir",
        None,
        "folder of the checkpoints; default: /fsx/model if /fsx is mounted, else ./output",
    ),
    Setting("num_train_epochs", "training.num_train_epochs", 3, "number of epochs"),
    Setting(
        "per_device_train_batch_size", "training.per_device_train_batch_size", 1, "rows in a micro-batch of a process"
    ),
    Setting("gradient_accumulation_steps", "training.gradient_accumulation_steps", 8, "micro-batches in a step"),
    Setting("learning_rate", "training.learning_rate", 2e-5, "peak learning rate"),
    Setting("weight_decay", "training.weight_decay", 0.05, "weight decay"),
    Setting("warmup_ratio", "training.warmup_ratio", 0.1, "warm-up steps as a fraction of all steps"),
    Setting("lr_scheduler_type", "training.lr_scheduler_type", "cosine", "learning rate schedule"),
    Setting("save_steps", "training.save_steps", 1000, "number of steps between checkpoints"),
    Setting("logging_steps", "training.logging_steps", 1, "number of steps between records of the metrics"),
    Setting(
        "resume_from_checkpoint", "training.resume_from_checkpoint", None, "checkpoint folder, or latest for the newest"
    ),
    Setting("fp16", "training.fp16", False, "compute in float16", switch=True),
    Setting("bf16", "training.bf16", True, "compute in bfloat16 (default); float32 with --no-bf16", switch=True),
    Setting("temperature", "distillation.temperature", 2.0, "divides the logits of both models"),
    Setting("alpha", "distillation.alpha", 0.5, "weight of the distillation term"),
    Setting("use_flash_attention", "model_config.use_flash_attention", False, "use FlashAttention 2", switch=True),
    Setting(
        "layers_to_unfreeze", "spectrum.layers_to_unfreeze", None, "YAML file of Spectrum with the trained parameters"
    ),
    Setting(
        "parity", "distillation.parity", False, "reproduce the arithmetic of the sample, for comparison", switch=True
    ),
)
BY_KEY = {setting.key: setting for setting in SETTINGS}
SECTIONS = {key.partition(".")[0] for key in BY_KEY if "." in key}

MOVED = {
    "models.teacher": "teacher_pretrain",
    "models.student": "student_pretrain",
    "dataset.num_samples": "student.data_args.num_samples",
    "dataset.seed": "seed",
    "tokenizer.max_length": "sequence_length",
    "tokenizer.chat_template": "student.data_args.template",
    "project_name": "exp_name",
    "distillation.temperature": "kd_temperature",
    "distillation.alpha": "distill_loss_weight",
    "spectrum.layers_to_unfreeze": "student.model_args.unfrozen_parameters",
}
PARITY = ["trained_padding", "zero_padded_vocabulary", "every_token", "mean_of_micro_batches"]

Values = dict[str, tuple[Any, str]]
"""Dotted path of a setting to its value and the flag or key that set it."""


class HyperPodDialect:
    """The flags of ``distil_logits_cli.py``, or its configuration file."""

    name = "hyperpod"
    system = "HyperPod"

    def recognises(self, source: Source) -> bool:
        """Whether there is a flag that only this script has, or a section ``models`` with teacher and student."""
        if isinstance(source, Mapping):
            models = source.get("models")
            return isinstance(models, Mapping) and bool(models.keys() & {"teacher", "student"})
        own = {"--teacher_model", "--student_model", "--save_location", "--hub_location", "--layers_to_unfreeze"}
        return any(word.partition("=")[0] in own for word in source)

    def translate(self, source: Source, locations: dict[str, SourceLocation]) -> Translation:
        if isinstance(source, Mapping):
            flags: Values = {}
            file, result = _split(source)
        else:
            flags, config_file, overrides = _parse(source)
            file, result = _split(
                {} if config_file is None else read_mapping(Path(config_file), "--config_file", locations)
            )
            for key, value in overrides:
                result.put(key, value, key)
                del result.derived[key]
                locations[key] = COMMAND_LINE
        given = _from_file(file, result)
        _translate(result, {**given, **flags}, flags)
        return result


DIALECT = HyperPodDialect()


def _parse(argv: Sequence[str]) -> tuple[Values, str | None, list[tuple[str, Any]]]:
    """The flags that are given, the configuration file, and Limbeck's own keys. Values remain text; the schema reads them."""
    parser = Parser(prog="distil_logits_cli.py", description="Distil a teacher into a student.")
    for setting in SETTINGS:
        shown = "" if setting.default is None or setting.switch else f"; default: {setting.default}"
        action: dict[str, Any] = {"metavar": "VALUE"}
        if setting.switch:
            action = {"action": argparse.BooleanOptionalAction if setting.default else "store_true"}
        parser.add_argument(f"--{setting.flag}", help=setting.help + shown, **action)
    parser.add_argument("--config_file", metavar="FILE", help="JSON or YAML file; given flags override it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any other key of Limbeck")
    found, rest = parser.parse_known_args(argv)
    words = [*getattr(found, "overrides", []), *(word for word in rest if not word.startswith("-"))]
    parser.refuse_unknown(rest, [f"--{setting.flag}" for setting in SETTINGS] + ["--config_file"])
    given = vars(found)
    flags = {s.key: (given[s.flag], _spelling(s, argv)) for s in SETTINGS if s.flag in given}
    return flags, given.get("config_file"), [override(word) for word in words]


def _spelling(setting: Setting, argv: Sequence[str]) -> str:
    negated = f"--no-{setting.flag}"
    return negated if negated in argv else f"--{setting.flag}"


def _split(content: Mapping[str, Any]) -> tuple[dict[str, Any], Translation]:
    """The sample's own part of a file, and Limbeck's keys beside it."""
    file, ours = {}, {}
    for key, value in content.items():
        of_sample = key in BY_KEY or (
            key in SECTIONS and (isinstance(value, Mapping) or key not in DistillConfig.model_fields)
        )
        if of_sample or key not in DistillConfig.model_fields:
            file[key] = value
        else:
            ours[key] = copy.deepcopy(value)
    return file, Translation(ours)


def _from_file(file: Mapping[str, Any], result: Translation) -> Values:
    given: Values = {}
    rest = dict(file)
    if isinstance(file.get("training"), Mapping):  # values of its keys may be sections
        given |= {f"training.{name}": (value, f"training.{name}") for name, value in rest.pop("training").items()}
    for path, value in leaves(rest):
        if path in BY_KEY:
            if value is not None:
                given[path] = (value, path)
        elif value not in ({}, None):
            near = difflib.get_close_matches(path, BY_KEY, n=1, cutoff=0.7)
            result.refuse(
                path, f"is not a key of HyperPod's configuration{f'; did you mean {near[0]}?' if near else ''}"
            )
    return given


def _translate(result: Translation, given: Values, flags: Values) -> None:
    _precision(result, given, flags)
    _dataset(result, given)
    _save(result, given)
    for key, ours in MOVED.items():
        if key in given:
            result.set(ours, *given[key])
    training = {key.removeprefix("training."): pair for key, pair in given.items() if key.startswith("training.")}
    training_arguments.translate(
        result, {name: pair[0] for name, pair in training.items()}, {name: pair[1] for name, pair in training.items()}
    )
    if (flash := given.get("model_config.use_flash_attention", (False, "")))[0]:
        for role in ("student", "teacher"):
            result.set(f"{role}.model_args.attn_implementation", "flash_attention_2", flash[1])
    if (parity := given.get("distillation.parity", (False, "")))[0]:
        result.set("objective_faults", PARITY, parity[1])
        result.set("distill_on_prompt", True, parity[1])
    _defaults(result)
    use_wandb(result, given.get("project_name", (BY_KEY["project_name"].default, DEFAULT)))


def _precision(result: Translation, given: Values, flags: Values) -> None:
    """One of two levels decides: the flags, else the file. float16 replaces the default of bfloat16."""
    for level in (flags, given):
        both = [(name, level[f"training.{name}"]) for name in ("bf16", "fp16") if f"training.{name}" in level]
        if not both:
            continue
        if len(both) == 2 and all(value for _, (value, _) in both):
            result.refuse(both[1][1][1], f"and {both[0][1][1]} contradict each other; keep one")
        dtype = training_arguments.precision({name: value for name, (value, _) in both})
        if dtype is not None:
            for role in ("student", "teacher"):
                result.set(f"{role}.model_args.dtype", dtype, both[-1][1][1])
        return


def _dataset(result: Translation, given: Values) -> None:
    default = BY_KEY["dataset.name"].default
    name, origin = given.get("dataset.name", (default, DEFAULT))
    split, split_origin = given.get("dataset.split", (BY_KEY["dataset.split"].default, DEFAULT))
    ours = result.section("student.data_args") or {}
    if origin == DEFAULT and (ours.get("file_name") or ours.get("sources")):
        return
    source = dataset_source(str(name), str(split))
    if "split" not in source and split_origin != DEFAULT:
        result.notices.append(f"{split_origin} has no effect: {name} is a file, which has no splits.")
    result.set("student.data_args.sources", [source], origin)


def _save(result: Translation, given: Values) -> None:
    where, where_origin = given.pop("save_location", (None, DEFAULT))
    name, name_origin = given.pop("hub_location", (None, DEFAULT))
    if where not in (None, "hub", "fsx", "both"):
        result.refuse(where_origin, f"= {format_value(where)} is not one of hub, fsx, both")
    elif where in ("hub", "both") and not name:
        result.refuse(where_origin, f"= {where} needs a repository; set hub_location to OWNER/NAME")
    elif name and where == "fsx":
        result.notices.append(f"{name_origin} has no effect: save_location is fsx.")
    elif name:
        result.set("checkpoint_config.save_to_hub.repo_id", name, name_origin)
        if where == "hub":
            result.notices.append(
                "save_location = hub: the checkpoints also stay in output_dir, so that no upload can lose them."
            )


def _defaults(result: Translation) -> None:
    for setting in SETTINGS:
        name = setting.key.removeprefix("training.")
        ours = MOVED.get(setting.key) or training_arguments.MOVED.get(name if name != setting.key else "", "")
        if ours and setting.default is not None and not _pretrained(result, ours):
            result.default(ours, setting.default, f"{DEFAULT} of --{setting.flag}")
    if result.get("max_steps") in (None, -1):
        result.default("student.training_args.num_train_epochs", BY_KEY["training.num_train_epochs"].default, DEFAULT)
    result.default("output_dir", str(FSX / "model") if FSX.is_dir() else "./output", f"{DEFAULT} of --output_dir")
    result.default("temperature_squared", True, DEFAULT)
    result.default("student.data_args.default_system", SYSTEM_MESSAGE, DEFAULT)


def _pretrained(result: Translation, ours: str) -> bool:
    """Whether ``ours`` is a model that is already named by its other key."""
    role = ours.removesuffix("_pretrain")
    return role != ours and result.get(f"{role}.model_args.model_name_or_path") is not None
