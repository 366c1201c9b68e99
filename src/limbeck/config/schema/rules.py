"""Rules between keys: combinations that are errors, and keys that have no effect in a combination."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from limbeck.config.schema.base import Contradiction
from limbeck.config.schema.environment_rules import environment_contradictions, unread_environment_keys
from limbeck.config.schema.freezing import freezing_contradictions
from limbeck.config.schema.megatron import MegatronConfig
from limbeck.config.schema.megatron_rules import unread_megatron_keys
from limbeck.config.schema.models import StrategyArgs, StrategyConfig, reads_megatron_keys
from limbeck.config.schema.objective import OBJECTIVE_KEYS, OBJECTIVE_KWARGS, OBJECTIVES, SAMPLED_OBJECTIVES
from limbeck.config.schema.origin_objectives import distils, for_origin, objectives_by_origin
from limbeck.config.schema.origins import ORIGINS
from limbeck.config.schema.path_rules import path_contradictions
from limbeck.config.schema.rollout_rules import rollout_contradictions, sampled_contradictions, unread_rollout_keys
from limbeck.config.schema.schedule_rules import schedule_contradictions
from limbeck.config.schema.teacher_rules import teacher_contradictions, unread_teacher_keys
from limbeck.config.schema.tracker_rules import tracker_contradictions
from limbeck.config.schema.training import (
    REQUIRED_SCHEDULER_KWARGS,
    SCHEDULER_KWARGS,
    STEP_SOURCE_KWARGS,
)
from limbeck.config.schema.workers import TEACHER_SOURCE_KWARGS
from limbeck.registry import STRATEGIES

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields


def contradictions(config: RunFields) -> Iterator[Contradiction]:
    yield from path_contradictions(config)
    yield from _model_contradictions(config)
    yield from teacher_contradictions(config)
    yield from _objective_contradictions(config)
    yield from _training_contradictions(config)
    yield from rollout_contradictions(config)
    yield from environment_contradictions(config)
    yield from _placement_contradictions(config)
    yield from _transport_contradictions(config)


def _model_contradictions(config: RunFields) -> Iterator[Contradiction]:
    student, teacher = config.student.model_args, config.teacher.model_args
    if not student.names_a_model:
        yield Contradiction(
            "student_pretrain", "is not set; set it to the folder or hub id of the student's checkpoint"
        )
    elif config.tokenizer_name_or_path is None:
        yield Contradiction("tokenizer", "is not set, and there is no checkpoint with a tokenizer; set it")
    if not config.has_teacher and config.distill_loss_weight > 0:
        yield Contradiction(
            "teacher_pretrain",
            f"is not set, but distill_loss_weight = {config.distill_loss_weight:g} needs a teacher; set it to "
            "a checkpoint, or set distill_loss_weight: 0 to train without a teacher",
        )
    elif not config.has_teacher and distils(config):
        yield Contradiction(
            "teacher_pretrain",
            "is not set, but rollout needs a teacher for what the student writes; set it to a checkpoint",
        )
    if config.features.pairs and not teacher.names_a_model:
        yield Contradiction("features.pairs", "need a teacher; set teacher_pretrain")
    if config.features.pairs and student.gradient_checkpointing_use_reentrant:
        yield Contradiction(
            "student.model_args.gradient_checkpointing_use_reentrant",
            "= true hides submodules from features.pairs; set it to false",
        )
    if config.loss_balance == "modelopt" and config.distill_loss_weight == 0:
        yield Contradiction(
            "loss_balance", "= modelopt scales by the divergence of the logits; set distill_loss_weight above 0"
        )
    if config.objective_faults:
        others = {
            "cross_tokenizer": config.cross_tokenizer != "off",
            "features.pairs": bool(config.features.pairs),
            "loss_balance": config.loss_balance != "weighted",
            "distill_loss_weight = 0": config.distill_loss_weight == 0,
        }
        if "trained_padding" in config.objective_faults:
            others |= {
                "rollout": config.rollout is not None,
                "student.use_sequence_packing": config.student.use_sequence_packing,
            }
        for other in (name for name, given in others.items() if given):
            yield Contradiction("objective_faults", f"cannot be combined with {other}; remove one of them")
        both = [name for name in ("unshifted_mask", "every_token") if name in config.objective_faults]
        if len(both) == 2:
            yield Contradiction(
                "objective_faults", f"has both {' and '.join(both)}, which contradict each other; keep one"
            )
    for role, pretrain, model_args in (
        ("student", config.student_pretrain, student),
        ("teacher", config.teacher_pretrain, teacher),
    ):
        if pretrain is not None and pretrain != model_args.model_name_or_path:
            yield Contradiction(
                f"{role}_pretrain",
                f"= {pretrain} is not {role}.model_args.model_name_or_path = {model_args.model_name_or_path}; "
                "both set the same checkpoint, so keep one",
            )
    if teacher.megatron_arguments and teacher.model_name_or_path is None:
        yield Contradiction(
            "teacher.model_args.megatron_arguments", "describe a teacher without weights; set teacher_pretrain too"
        )
    if student.lora_target is None and student.additional_target is not None:
        yield Contradiction(
            "student.model_args.additional_target",
            "is only read with LoRA; set student.model_args.lora_target too",
        )
    yield from freezing_contradictions(student)

    if config.cross_tokenizer != "off":
        if teacher.model_name_or_path is None:
            yield Contradiction(
                "cross_tokenizer", f"= {config.cross_tokenizer} needs the teacher's tokenizer; set teacher_pretrain"
            )
        if config.logits_topk:
            yield Contradiction(
                "logits_topk", "cannot be combined with cross_tokenizer, which compares whole vocabularies; set it to 0"
            )
        if config.features.pairs:
            yield Contradiction(
                "features.pairs", "compare features token by token, which cross_tokenizer does not align; remove one"
            )
        if config.loss_balance != "weighted":
            yield Contradiction(
                "loss_balance", f"= {config.loss_balance} cannot be combined with cross_tokenizer; use weighted"
            )


def _objective_contradictions(config: RunFields) -> Iterator[Contradiction]:
    yield from _unknown_parameters(config, "")
    given = None if config.rollout is None else config.rollout.objectives
    for origin in ORIGINS if given is not None else ():
        if getattr(given, origin).kd_objective_kwargs:
            yield from _unknown_parameters(for_origin(config, origin), f"rollout.objectives.{origin}.")


def _unknown_parameters(config: RunFields, prefix: str) -> Iterator[Contradiction]:
    if config.kd_objective not in (*OBJECTIVES, *SAMPLED_OBJECTIVES):  # from a plug-in, which checks its own parameters
        return
    if config.kd_objective in SAMPLED_OBJECTIVES:
        yield from sampled_contradictions(config)
    readable = OBJECTIVE_KWARGS.get(config.kd_objective, ())
    own = next((key for key, objectives in OBJECTIVE_KEYS.items() if config.kd_objective in objectives), None)
    for key in config.kd_objective_kwargs:
        if key not in readable:
            hint = f"; its parameter is the key {own}" if own else ""
            yield Contradiction(
                f"{prefix}kd_objective_kwargs.{key}",
                f"is not read by kd_objective = {config.kd_objective}, which reads {', '.join(readable) or 'none'}{hint}",
            )


def _concatenation_contradictions(config: RunFields) -> Iterator[Contradiction]:
    """Rows that are cut from concatenated documents have no columns, and cannot be mixed with other rows."""
    path = "student.data_args.sources"
    for key, sources in ((path, config.data_sources), ("validation.data_args.sources", config.validation_sources)):
        if len({source.is_concatenated for source in sources}) > 1:
            yield Contradiction(
                key, "mix concatenated documents (concatenate, mock) with other rows; give one kind only"
            )
    if not any(source.is_concatenated for source in config.data_sources):
        return
    for key, given in (
        ("rollout", config.rollout),
        ("teacher.prompt", config.teacher.prompt),
        ("student.data_args.domain_key", config.student.data_args.domain_key),
        ("student.use_sequence_packing", config.student.use_sequence_packing),
    ):
        if given:
            yield Contradiction(key, f"does not apply to concatenated documents; remove it, or the sources of {path}")


def _training_contradictions(config: RunFields) -> Iterator[Contradiction]:
    student, training = config.student, config.student.training_args
    data = student.data_args
    if not data.file_name and not data.sources:
        yield Contradiction("student.data_args.file_name", "is not set; set it to the training files")
    if data.file_name and data.sources:
        yield Contradiction("student.data_args.sources", "and file_name both set the training data; keep one")
    mixing = {
        "sources": any(entry.get("weight") is not None for entry in data.sources or ()),
        "mixing_temperature": data.mixing_temperature is not None,
        "domain_interleave_probs": data.domain_interleave_probs is not None,
    }
    if sum(mixing.values()) > 1:
        names = [name if name != "sources" else "the weights of sources" for name, given in mixing.items() if given]
        yield Contradiction(
            f"student.data_args.{next(name for name, given in reversed(mixing.items()) if given)}",
            f"and other keys set shares of the data ({' and '.join(names)}); keep one of them",
        )
    if student.data_args.eval_file_name and config.validation and config.validation.data_args.file_name:
        yield Contradiction(
            "student.data_args.eval_file_name",
            "and validation.data_args.file_name both set the validation files; keep one",
        )
    validation = config.validation.data_args if config.validation else None
    if validation and validation.sources:
        for path, others in (
            ("student.data_args.eval_file_name", student.data_args.eval_file_name),
            ("validation.data_args.file_name", validation.file_name),
        ):
            if others:
                yield Contradiction(path, "and validation.data_args.sources both set the validation data; keep one")
    yield from _concatenation_contradictions(config)
    if student.use_dynamic_batching_in_train:
        if student.max_tokens_per_microbatch_in_train == 0:
            yield Contradiction(
                "student.use_dynamic_batching_in_train",
                "needs student.max_tokens_per_microbatch_in_train, the maximum number of tokens of a micro-batch",
            )
        elif student.max_tokens_per_microbatch_in_train < config.sequence_length:
            yield Contradiction(
                "student.max_tokens_per_microbatch_in_train",
                f"= {student.max_tokens_per_microbatch_in_train} cannot hold one row of sequence_length = "
                f"{config.sequence_length} tokens; raise it or lower sequence_length",
            )
    scheduler, kwargs = training.lr_scheduler_type, training.lr_scheduler_kwargs
    needed = REQUIRED_SCHEDULER_KWARGS.get(scheduler, ())
    if needed and not any(key in kwargs for key in needed):
        yield Contradiction(
            "student.training_args.lr_scheduler_type",
            f"= {scheduler} needs {' or '.join(needed)} in student.training_args.lr_scheduler_kwargs",
        )
    readable = SCHEDULER_KWARGS.get(scheduler, ())
    for key in kwargs:
        if key not in readable:
            yield Contradiction(
                f"student.training_args.lr_scheduler_kwargs.{key}",
                f"is not read by lr_scheduler_type = {scheduler}, which reads {', '.join(readable) or 'none'}",
            )
    yield from schedule_contradictions(training, config.max_steps)
    yield from tracker_contradictions(config)
    for path, name, given, known in (
        ("step_source", config.effective_step_source, config.step_source_kwargs, STEP_SOURCE_KWARGS),
        ("teacher.source", config.teacher.source, config.teacher.source_kwargs, TEACHER_SOURCE_KWARGS),
    ):
        for key in given if name in known else ():  # one from a plug-in checks its own arguments
            if key not in known[name]:
                yield Contradiction(
                    f"{path}_kwargs.{key}",
                    f"is not read by {path} = {name}, which reads {', '.join(known[name]) or 'none'}",
                )


def _placement_contradictions(config: RunFields) -> Iterator[Contradiction]:
    student, teacher = config.student, config.teacher
    for role, strategy, suffix in (
        ("student", student.strategy_args, "_train"),
        ("teacher", teacher.strategy_args, "_infer"),
    ):
        name = strategy.strategy_name
        if name is not None and not name.endswith(suffix):
            counterpart = name.rpartition("_")[0] + suffix
            yield Contradiction(
                f"{role}.strategy_args.strategy_name",
                f"= {name} is not a strategy for the {role}, whose strategies end in {suffix}; "
                f"use {counterpart if counterpart in STRATEGIES else f'fsdp2{suffix}'}",
            )
        else:
            yield from _foreign_strategy_keys(strategy, role)
        if strategy.strategy_config.replicate and strategy.strategy_config.fsdp_size is not None:
            yield Contradiction(
                f"{role}.strategy_args.strategy_config.replicate", "contradicts fsdp_size in the same section; keep one"
            )
    for role, strategy in (("student", student.strategy_args), ("teacher", teacher.strategy_args)):
        if strategy.strategy_config.offload_policy and config.offloads_colocated:
            yield Contradiction(
                f"{role}.strategy_args.strategy_config.offload_policy",
                f"and is_offload_states both keep the {role} in host memory; keep one of them",
            )
    if config.num_gpus_per_node is not None and config.device_mapping:
        available = config.num_nodes * config.num_gpus_per_node
        for role, mapping in (("student", config.student.device_mapping), ("teacher", teacher.device_mapping)):
            if role == "teacher" and teacher.service is not None:  # the mapping belongs to the service
                continue
            if mapping and max(mapping) >= available:
                yield Contradiction(
                    "num_gpus_per_node",
                    f"= {config.num_gpus_per_node} on {config.num_nodes} machine(s) is {available} devices, but "
                    f"{role}.device_mapping has device {max(mapping)} (counted from 0); correct one of them",
                )
    if config.num_gpus_per_node is None and config.num_nodes > 1 and config.device_mapping:
        yield Contradiction(
            "num_nodes",
            f"= {config.num_nodes} does not determine the machine of each device; set num_gpus_per_node too",
        )
    if teacher.service is not None and not config.has_teacher:
        yield Contradiction("teacher.service", "needs the checkpoint of the service; set teacher_pretrain")
    if config.needs_worker_groups and config.features.pairs:
        yield Contradiction(
            "features.pairs",
            "needs the teacher's hidden layers, which are not sent between worker groups; set teacher.device_mapping to "
            "the student's devices, and remove teacher.service and is_offload_states",
        )
    environments = (
        ("system_envs", config.system_envs),
        ("student.system_envs", student.system_envs),
        ("teacher.system_envs", teacher.system_envs),
    )
    seen: dict[str, tuple[str, str]] = {}
    for path, environment in environments:
        for name, value in environment.items():
            first_path, first = seen.setdefault(name, (path, value))
            if first != value and not config.needs_worker_groups:
                yield Contradiction(
                    f"{path}.{name}",
                    f"= {value} contradicts {first_path}.{name} = {first}; student and teacher share one process",
                )


def _transport_contradictions(config: RunFields) -> Iterator[Contradiction]:
    source = config.teacher.source
    if source == "ray" and config.default_teacher_source != "ray":
        yield Contradiction(
            "teacher.source",
            "= ray needs a teacher in other processes; set teacher.device_mapping to devices that the student does not have, "
            "or set teacher.service",
        )
    elif source not in ("auto", "ray") and config.needs_worker_groups:
        yield Contradiction(
            "teacher.source",
            f"= {source} contradicts teacher.service or teacher.device_mapping, which place the teacher in Ray workers; "
            "remove one of them",
        )
    signal = config.teacher.signal
    if signal == "top_k" and not config.logits_topk:
        yield Contradiction("teacher.signal", "= top_k needs a number of tokens; set logits_topk")
    if signal == "sampled_token" and config.kd_objective not in SAMPLED_OBJECTIVES:
        yield Contradiction(
            "teacher.signal",
            f"= sampled_token is the probability of one token, and kd_objective = {config.kd_objective} needs a "
            f"distribution; use hidden_states, or a kd_objective of {', '.join(SAMPLED_OBJECTIVES)}",
        )
    if signal == "top_k" and config.topk_from == "student":
        yield Contradiction(
            "teacher.signal",
            "= top_k sends the teacher's most likely tokens, and topk_from: student compares the student's; use hidden_states",
        )
    if signal in ("top_k", "logits"):
        needing = {"cross_tokenizer": config.cross_tokenizer != "off", "objective_faults": config.objective_faults}
        for key in (key for key, given in needing.items() if given):
            yield Contradiction(
                "teacher.signal",
                f"= {signal} cannot be combined with {key}, which needs hidden states; use hidden_states",
            )

    backend = config.logits_transfer_backend
    if config.transfers_directly and config.teacher.service is not None:
        yield Contradiction(
            "logits_transfer_backend",
            f"= {backend} connects workers for the duration of one run, and a teacher.service outlives runs; use ray",
        )


def unread_keys(config: RunFields) -> Iterator[tuple[str, str]]:
    """Keys that have no effect in this combination, with the reason. Setting one causes a notice."""
    used = {config.kd_objective, *(one.kd_objective for one in objectives_by_origin(config).values())}
    for key, objectives in OBJECTIVE_KEYS.items():
        if not used & set(objectives):
            yield key, f"is only read by {' and '.join(objectives)}, and kd_objective is {' and '.join(sorted(used))}"
    yield from unread_teacher_keys(config)
    yield from unread_rollout_keys(config)
    if config.cross_tokenizer == "off":
        for key in ("rest_weight", "merge", "tokens"):
            yield f"cross_tokenizer_{key}", "is only read with cross_tokenizer"
    else:
        yield "compile_loss", "is not read with cross_tokenizer, whose loss is not compiled"
    if config.cross_tokenizer == "uld":
        for key in ("kd_objective", "cross_tokenizer_rest_weight"):
            yield key, "is not read with cross_tokenizer: uld, which compares sorted probabilities only"
    if config.teacher_source == "model":
        yield "teacher.signal", "is only read by a teacher in other processes; this one is in the student's processes"
    if not config.needs_worker_groups:
        yield "logits_transfer_backend", "is only read with worker groups, in which Ray runs the teacher"
    if not config.offloads_colocated:
        yield (
            "is_offload_states",
            "is only read if the device_mappings of both roles have common devices, and not with Megatron, nor with "
            "DeepSpeed, which has its own offloading",
        )
        yield "offload_interval", "is only read with is_offload_states"
    elif config.logits_transfer_backend not in ("auto", "ray"):
        yield "logits_transfer_backend", "is not read with is_offload_states, which keeps signals in host memory"
    if not config.needs_worker_groups and config.num_nodes == 1:
        for key in ("max_restarts", "student.backend_timeout", "teacher.backend_timeout"):
            yield key, "is only read with worker groups, where student and teacher have different devices"
    if not config.device_mapping:
        for key in ("num_gpus_per_node", "num_nodes"):
            yield key, "is only read with device_mapping; without one, the launcher decides the number of processes"
    if config.objective_faults:
        yield "compile_loss", "is not read with objective_faults, whose loss is not compiled"
    if config.logits_topk == 0:
        yield "logits_topk_tail", "is only read with logits_topk"
        yield "topk_from", "is only read with logits_topk"
    if config.kd_objective == "policy_gradient":
        yield "temperature_squared", "is not read by policy_gradient, which is no divergence"
    if not config.features.pairs:
        for key in ("weight", "projection", "mask", "adapt_to_stages"):
            yield f"features.{key}", "is only read with features.pairs"
    elif config.loss_balance == "modelopt" and "loss_balance" not in config.features.adapt_to_stages:
        yield "features.weight", "is not read with loss_balance: modelopt"
    student = config.student
    if not student.use_dynamic_batching_in_train:
        yield "student.max_tokens_per_microbatch_in_train", "is only read with use_dynamic_batching_in_train: true"
    if not student.use_sequence_packing:
        yield "student.packing_algorithm", "is only read with use_sequence_packing: true"
    else:
        yield "student.training_args.group_by_length", "is not read with use_sequence_packing, which pads nothing"
    if student.model_args.lora_target is None:
        for key in ("lora_rank", "lora_alpha", "lora_dropout"):
            yield f"student.model_args.{key}", "is only read with lora_target"
    if student.model_args.disable_gradient_checkpointing:
        key = "student.model_args.gradient_checkpointing_use_reentrant"
        yield key, "is only read with disable_gradient_checkpointing: false"
    if student.training_args.optimizer_name == "adafactor":
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            yield f"student.training_args.{key}", "is not read by optimizer_name: adafactor"
    without_warmup = {
        "constant": "is not read by lr_scheduler_type: constant; use constant_with_warmup",
        "sequential": "is not read by lr_scheduler_type: sequential; begin with a LinearLR",
    }
    if (reason := without_warmup.get(student.training_args.lr_scheduler_type)) is not None:
        for key in ("warmup_steps", "warmup_ratio"):
            yield f"student.training_args.{key}", reason
    elif student.training_args.warmup_steps > 0:
        yield "student.training_args.warmup_ratio", "is not read with warmup_steps"
    if not student.model_args.unfrozen_parameters and not student.model_args.frozen_parameters:
        yield "student.model_args.parameter_match", "is only read with unfrozen_parameters or frozen_parameters"
    if config.checkpoint_config.save_to_hub.repo_id is None:
        for key in ("private", "branch"):
            yield f"checkpoint_config.save_to_hub.{key}", "is only read with save_to_hub.repo_id"
    if not config.checkpoint_config.save_megatron:
        yield "checkpoint_config.megatron_format", "is only read with save_megatron: true"
    if config.distill_on_prompt:
        yield "student.data_args.train_on", "is not read with distill_on_prompt: true, which supervises every token"
    for role, worker in (("student", config.student), ("teacher", config.teacher)):
        given = worker.strategy_args.strategy_config
        if given.tensor_parallel_plan is not None and given.tensor_model_parallel_size == 1:
            yield (
                f"{role}.strategy_args.strategy_config.tensor_parallel_plan",
                "is only read with tensor_model_parallel_size above 1",
            )
    if not config.validation_sources:
        yield "eval_steps", "is only read with validation files"
    yield from unread_megatron_keys(config)
    yield from unread_environment_keys(config)


def _foreign_strategy_keys(strategy: StrategyArgs, role: str) -> Iterator[Contradiction]:
    """Keys of DeepSpeed and Megatron with another strategy, and other keys with these."""
    given, path = strategy.strategy_config, f"{role}.strategy_args.strategy_config"
    reads_megatron = reads_megatron_keys(strategy.strategy_name)
    if not reads_megatron and given.megatron != MegatronConfig():
        which = "megatron_train" if role == "student" else "megatron_infer"
        yield Contradiction(f"{path}.megatron", f"is only read by strategy_name: {which}; set that, or remove it")
    foreign = ("fsdp_size", "replicate", "reshard_after_forward", "offload_policy", "tensor_parallel_plan")
    for key in foreign if reads_megatron else ():
        if getattr(given, key) != StrategyConfig.model_fields[key].default:
            yield Contradiction(f"{path}.{key}", f"is not read by {strategy.strategy_name}; remove it")
    if not strategy.reads_deepspeed_block:
        if given.deepspeed:
            which = "deepspeed_train" if role == "student" else "deepspeed_infer"
            yield Contradiction(f"{path}.deepspeed", f"is only read by strategy_name: {which}; set that, or remove it")
        return
    for key, field in type(given).model_fields.items():
        if key != "deepspeed" and getattr(given, key) != field.get_default(call_default_factory=True):
            yield Contradiction(f"{path}.{key}", f"is not read by {strategy.strategy_name}; remove it")
    optimization = given.deepspeed.get("zero_optimization")
    stages = (1, 2, 3) if role == "student" else (3,)
    if not isinstance(optimization, Mapping) or optimization.get("stage") not in stages:
        yield Contradiction(
            f"{path}.deepspeed",
            f"needs zero_optimization with stage {' or '.join(map(str, stages))} for {strategy.strategy_name}; add it",
        )
