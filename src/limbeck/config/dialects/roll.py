"""The dialect of ROLL's distillation pipeline. Limbeck's keys are named after ROLL's, so most of them need no translation.

A key of ``roll_table.py`` is moved, respelled, or ignored because it does not change a result. A setting that would change
a result and is not supported is an error. The schema checks all other keys.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.config.compose import format_error
from limbeck.config.dialects import native, roll_on_policy
from limbeck.config.dialects.base import Source
from limbeck.config.dialects.roll_table import (
    DEFAULT_PROMPT_LENGTH,
    MOVED,
    NO_MEANING,
    ONLY_WHEN_OFF,
    SAME_AS,
    SPELLINGS,
    STRATEGIES_INSTEAD,
    TEMPLATES,
    UNREAD_BY_TEACHER,
)
from limbeck.config.locations import SourceLocation, find_location
from limbeck.config.schema import (
    Contradiction,
    DistillConfig,
    MegatronConfig,
    StudentConfig,
    TeacherConfig,
    ValidationConfig,
    ValidationDataArgs,
    reads_deepspeed_block,
    reads_megatron_keys,
)
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value
from limbeck.errors import LimbeckError
from limbeck.registry import STRATEGIES

_VALIDATION = {
    "validation": ValidationConfig.model_fields.keys(),
    "validation.data_args": ValidationDataArgs.model_fields.keys(),
}
"""The keys of ``validation`` that Limbeck reads. ROLL's has the keys of any worker, of which it reads the files only."""


_OTHER_PIPELINES = ("actor_train", "actor_infer", "use_opd")
_VISION = re.compile(r"[-_.]vl\b|[-_.]vl[-_]", re.IGNORECASE)  # in names such as qwen2-vl and Qwen2.5-VL-7B


class RollDialect:
    """A YAML file of ROLL's distillation pipelines."""

    name = "roll"
    system = "ROLL"

    def recognises(self, source: Source) -> bool:
        """Whether the file has a key or a value that ROLL's schema has and Limbeck's does not."""
        return isinstance(source, Mapping) and next(_foreign_settings(Translation(dict(source))), None) is not None

    def translate(self, source: Source, locations: dict[str, SourceLocation]) -> Translation:
        if not isinstance(source, Mapping):
            raise LimbeckError("the dialect roll reads YAML files, not arguments; use --dialect with another name.")
        result = Translation(copy.deepcopy(dict(source)))
        _refuse_other_pipelines(result.values, locations)
        on_policy = roll_on_policy.is_on_policy(source)
        if on_policy:
            roll_on_policy.translate(result)
        _ignore_validation_settings(result)
        _refuse_strategies(result)
        native.normalise(result)
        native.respell(result, SPELLINGS)
        _drop_precision_flags(result)
        _rename_domain_column(result)
        _drop_ignored_keys(result)
        if result.get("student.training_args.max_steps") == -1:  # transformers' and ROLL's spelling of no limit
            result.pop("student.training_args.max_steps")
        for foreign, ours in MOVED.items():
            result.move(foreign, ours)
        _drop_repetitions(result)
        _sum_lengths(result)
        _join_dataset_dir(result)
        _rename_template(result)
        _drop_unread_teacher_keys(result)
        if not on_policy:
            _add_notices(result)
        return result


DIALECT = RollDialect()


def _foreign_settings(result: Translation) -> Iterator[str]:
    """Paths of the settings that only ROLL's schema has."""
    yield from (key for key in (*roll_on_policy.SECTIONS, *_OTHER_PIPELINES) if key in result.values)
    if len(_teachers(result.values)) > 1:
        yield "teacher"
    yield from (path for path in (*MOVED, *SAME_AS) if result.get(path) is not None)
    yield from (key for key in ("prompt_length", "response_length") if key in result.values)
    for kind in NO_MEANING.keys() | ONLY_WHEN_OFF.keys() | SPELLINGS.keys() | {"training_args"}:
        known = NO_MEANING.get(kind, frozenset()) | ONLY_WHEN_OFF.get(kind, {}).keys()
        known |= {"bf16", "fp16"} if kind in ("training_args", "strategy_config") else set()
        for path, section in result.sections(kind):
            beside = result.get(path.removesuffix("strategy_config.") + "strategy_name")
            if kind == "strategy_config" and reads_deepspeed_block(beside):
                continue  # the keys are DeepSpeed's
            ours = MegatronConfig.model_fields.keys() if reads_megatron_keys(beside) else set()
            yield from (f"{path}{key}" for key in section if key in known - ours)
            for key, values in SPELLINGS.get(kind, {}).items():
                if key in section and native.respelled(section[key], values) is not section[key]:
                    yield f"{path}{key}"
    for path, section in result.sections("strategy_args"):
        if section.get("strategy_name") in STRATEGIES_INSTEAD and section["strategy_name"] not in STRATEGIES:
            yield f"{path}strategy_name"
    data_args = result.section("student.data_args") or {}
    if "dataset_dir" in data_args:
        yield "student.data_args.dataset_dir"
    if isinstance(data_args.get("template"), str) and data_args["template"] in TEMPLATES:
        yield "student.data_args.template"
    for path, kept in _VALIDATION.items():
        yield from (f"{path}.{key}" for key in result.section(path) or {} if key not in kept)
    for part, keys in UNREAD_BY_TEACHER.items():
        yield from (f"teacher.{part}.{key}" for key in result.section(f"teacher.{part}") or {} if key in keys)
    student_keys = StudentConfig.model_fields.keys() - TeacherConfig.model_fields.keys()
    yield from (f"teacher.{key}" for key in result.section("teacher") or {} if key in student_keys)


def _ignore_validation_settings(result: Translation) -> None:
    for path, kept in _VALIDATION.items():
        result.ignore(path, (result.section(path) or {}).keys() - kept)


def _teachers(values: Mapping[str, Any]) -> list[str]:
    """The names of the teachers of a file that has a section for each of them in ``teacher``."""
    teacher = values.get("teacher")
    sections = teacher if isinstance(teacher, Mapping) else {}
    return [name for name, one in sections.items() if isinstance(one, Mapping) and "model_args" in one]


def _refuse_other_pipelines(values: Mapping[str, Any], locations: Mapping[str, SourceLocation]) -> None:
    """Raise LimbeckError, with one sentence for the whole file, for a pipeline whose other keys would all be errors."""
    found: tuple[str, str] | None = None
    template = Translation(dict(values)).get("student.data_args.template")
    if isinstance(template, str) and _VISION.search(template):
        found = (
            "student.data_args.template",
            f"= {template} is for images, and Limbeck distils text models only; begin with "
            "examples/qwen2.5-7B-distill_fsdp2/distill_fsdp2.yaml, which has the same keys for text",
        )
    elif len(names := _teachers(values)) > 1:
        found = (
            "teacher",
            f"has the sections of several teachers ({', '.join(map(str, names))}), and a run of Limbeck has one; keep one "
            "section, directly under teacher, and train with one teacher after the other",
        )
    elif other := next((key for key in _OTHER_PIPELINES if key in values), None):
        found = (
            other,
            "belongs to reinforcement learning with a teacher, which Limbeck runs as on-policy distillation with rewards; "
            "use the sections student and rollout with rollout.reward_weight, as docs/on-policy.md shows",
        )
    elif values.get("pure_opd_pipeline_type") == "agentic":
        found = (
            "pure_opd_pipeline_type",
            "= agentic plays games in environments of ROLL, which Limbeck does not have; use rlvr, or an environment of your "
            "own as in examples/rollout/calculator.py",
        )
    if found is not None:
        location = find_location(found[0], locations)
        raise LimbeckError(format_error(Contradiction(*found), location or "ROLL's file"))


def _refuse_strategies(result: Translation) -> None:
    for path, section in result.sections("strategy_args"):
        name = section.get("strategy_name")
        if isinstance(name, str) and name in STRATEGIES_INSTEAD and name not in STRATEGIES:
            result.refuse(f"{path}strategy_name", f"= {name} is not supported yet; {STRATEGIES_INSTEAD[name]}")
            # Errors about the settings of an unsupported strategy would hide the one that matters.
            del section["strategy_name"]
            section.pop("strategy_config", None)


def _drop_precision_flags(result: Translation) -> None:
    for kind in ("training_args", "strategy_config"):
        for path, section in result.sections(kind):
            role = path.partition(".")[0]
            dtype = native.dtype_of(result, role)
            for key in ("bf16", "fp16"):
                if section.pop(key, None) is True and dtype != key:
                    result.refuse(
                        f"{path}{key}", f"= true contradicts {role}.model_args.dtype = {dtype}; keep the latter only"
                    )


def _drop_ignored_keys(result: Translation) -> None:
    for role in ("student", "teacher"):
        config = f"{role}.strategy_args.strategy_config"
        has_adapters = role == "student" and result.get("student.model_args.lora_target") is not None
        if result.get(f"{config}.save_merged_model") is False and not has_adapters:
            result.ignore(config, {"save_merged_model"})
    for kind in NO_MEANING.keys() | ONLY_WHEN_OFF.keys():
        for path, section in result.sections(kind):
            for key in list(section):
                if key in NO_MEANING.get(kind, ()):
                    del section[key]
                    result.ignored.append(f"{path}{key}")
                elif key in ONLY_WHEN_OFF.get(kind, {}):
                    value = section.pop(key)
                    supported, sentence = ONLY_WHEN_OFF[kind][key]
                    if not any(type(value) is type(off) and value == off for off in supported):
                        result.refuse(f"{path}{key}", f"= {format_value(value)} {sentence}")


def _drop_repetitions(result: Translation) -> None:
    for foreign, ours in SAME_AS.items():
        value = result.pop(foreign)
        effective = result.values.get(ours, DistillConfig.model_fields[ours].default)
        if value not in (None, -1, effective):
            result.refuse(
                foreign,
                f"= {format_value(value)} contradicts {ours} = {format_value(effective)}; "
                f"set only {ours}, at the top level",
            )


def _sum_lengths(result: Translation) -> None:
    prompt, response = result.pop("prompt_length"), result.pop("response_length")
    if result.values.get("sequence_length") is not None or response is None:
        given = (("prompt_length", prompt), ("response_length", response))
        result.ignored.extend(key for key, length in given if length is not None)
        return
    prompt = DEFAULT_PROMPT_LENGTH if prompt is None else prompt
    if type(prompt) is int and type(response) is int:
        result.put("sequence_length", prompt + response, "prompt_length + response_length")
    else:
        result.refuse("response_length", f"= {response} and prompt_length = {prompt} must be whole numbers of tokens")


def _rename_domain_column(result: Translation) -> None:
    """``tag`` is the column of the domains; ROLL reads it only if domains are mixed."""
    data_args = result.section("student.data_args") or {}
    if (
        data_args.get("domain_interleave_probs")
        and "domain_key" not in data_args
        and isinstance(data_args.get("tag"), str)
    ):
        result.put("student.data_args.domain_key", result.pop("student.data_args.tag"), "student.data_args.tag")


def _join_dataset_dir(result: Translation) -> None:
    folder = result.pop("student.data_args.dataset_dir")
    data_args = result.section("student.data_args") or {}
    for key in ("file_name", "eval_file_name"):
        files = data_args.get(key)
        files = [files] if isinstance(files, str) else files
        if isinstance(folder, str) and isinstance(files, list) and all(isinstance(file, str) for file in files):
            joined = [str(Path(folder) / file) for file in files]
            result.put(f"student.data_args.{key}", joined, "student.data_args.dataset_dir")


def _rename_template(result: Translation) -> None:
    data_args = result.section("student.data_args") or {}
    name = data_args.get("template")
    if name == "longCOT_qwen2.5" and data_args.get("default_system") is None:
        result.notices.append(
            "student.data_args.template: longCOT_qwen2.5 adds a system message in Limbeck's wording, which is not ROLL's; "
            "set student.data_args.default_system to use ROLL's."
        )
    if isinstance(name, str) and name in TEMPLATES:
        data_args["template"], kwargs = TEMPLATES[name]
        if kwargs and isinstance(given := data_args.get("template_kwargs") or {}, dict):
            result.put("student.data_args.template_kwargs", {**kwargs, **given}, "student.data_args.template")


def _drop_unread_teacher_keys(result: Translation) -> None:
    teacher = result.section("teacher") or {}
    for part, keys in UNREAD_BY_TEACHER.items():
        result.ignore(f"teacher.{part}", keys)
        if part not in TeacherConfig.model_fields and not teacher.get(part, True):
            del teacher[part]
    sections = UNREAD_BY_TEACHER.keys()
    result.ignore("teacher", StudentConfig.model_fields.keys() - TeacherConfig.model_fields.keys() - sections)


def _add_notices(result: Translation) -> None:
    """Notices about defaults that differ from ROLL's. A preset or a ModelOpt section sets them on purpose."""
    values = result.values
    if values.get("objective_preset") is not None or values.get("distillation_config") is not None:
        return
    if values.get("logits_topk") is None and values.get("distill_loss_weight") != 0:
        result.notices.append(
            "logits_topk is not set: Limbeck compares the whole vocabulary, ROLL the teacher's 64 most likely tokens; "
            "objective_preset: roll sets ROLL's values."
        )
    divisor = values.get("teacher_temperature")
    multiplied = divisor is not None and values.get("kd_temperature") not in (None, 1)
    if multiplied and values.get("temperature_convention") is None:
        result.notices.append(
            f"teacher_temperature: Limbeck divides the teacher's logits by {format_value(divisor)}; ROLL also divides them "
            "by kd_temperature, as temperature_convention: roll does."
        )
