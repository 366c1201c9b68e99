"""Batch sizes, packing, optimizer and schedule of a file of NeMo-RL."""

from __future__ import annotations

import math
from collections.abc import Mapping

from limbeck.config.dialects.nemo_rl_file import NemoRlFile
from limbeck.config.validation_errors import format_value

_PYTORCH_SCHEDULES = "torch.optim.lr_scheduler."


def translate_batches(file: NemoRlFile) -> int:
    """Set the batch sizes. Returns the number of optimizer steps that NeMo-RL takes for the samples of one step."""
    tp, cp = (file.whole(f"policy.dtensor_cfg.{key}") for key in ("tensor_parallel_size", "context_parallel_size"))
    world = file.num_ranks
    prompts, generations = (
        file.whole(f"distillation.{key}", default)
        for key, default in (("num_prompts_per_step", 0), ("num_generations_per_prompt", 1))
    )
    path = "policy.train_global_batch_size"
    batch = file.whole(path, prompts * generations or 8)
    samples = prompts * generations or batch
    micro = file.whole("policy.train_micro_batch_size")
    ranks = max(world // (tp * cp), 1)
    known = not file.wrong  # else an error below may only follow from another one
    if known and world % (tp * cp):
        file.refuse(
            "policy.dtensor_cfg.tensor_parallel_size",
            f"= {tp} times context_parallel_size = {cp} does not divide the {world} devices of the training; change one",
        )
    elif known and batch % (ranks * micro):
        file.refuse(
            path,
            f"= {batch} cannot be divided into micro-batches of {micro} (train_micro_batch_size) on {ranks} data-parallel "
            "ranks; change one of them",
        )
    if known and samples % batch:
        file.refuse(
            path,
            f"= {batch} does not divide the {samples} samples of a step (num_prompts_per_step x "
            "num_generations_per_prompt); change one of them",
        )
    elif known and batch % generations:
        file.refuse(
            path, f"= {batch} is not a multiple of num_generations_per_prompt = {generations}; change one of them"
        )
    file.put("student.training_args.per_device_train_batch_size", micro, "policy.train_micro_batch_size")
    file.put("student.training_args.gradient_accumulation_steps", max(batch // (ranks * micro), 1), path)
    _translate_packing(file)
    updates = max(samples // batch, 1)
    if updates > 1:
        file.put("rollout.steps_per_rollout", updates, path)
        file.result.notices.append(
            f"{file.written(path)} = {batch}: NeMo-RL trains {updates} optimizer steps on the {samples} samples of a step; "
            f"Limbeck counts optimizer steps, so max_num_steps, val_period and save_period become {updates} times as many."
        )
    put_steps(file, "max_steps", updates, "distillation.max_num_steps", "distillation.max_steps")
    put_steps(file, "eval_steps", updates, "distillation.val_period", "distillation.eval_steps")
    return updates


def put_steps(file: NemoRlFile, target: str, updates: int, *paths: str) -> None:
    """Set ``target`` to a number of NeMo-RL's steps, of ``updates`` optimizer steps each. ``paths`` are its spellings."""
    value, path = file.one_of(*paths)
    file.put(target, value * updates if type(value) is int and value > 0 else value, path)


def _translate_packing(file: NemoRlFile) -> None:
    roundings = {"policy.make_sequence_length_divisible_by": file.whole("policy.make_sequence_length_divisible_by")}
    modes = [key for key in ("dynamic_batching", "sequence_packing") if file.is_enabled(f"policy.{key}")]
    for mode in modes:
        path = f"policy.{mode}"
        roundings[f"{path}.sequence_length_round"] = file.whole(f"{path}.sequence_length_round")
        file.put("student.use_dynamic_batching_in_train", True, path)
        file.put(
            "student.max_tokens_per_microbatch_in_train",
            file.get(f"{path}.train_mb_tokens"),
            f"{path}.train_mb_tokens",
        )
    if len(modes) == 2:
        file.refuse("policy.sequence_packing.enabled", "= true contradicts dynamic_batching.enabled = true; keep one")
    if "sequence_packing" in modes:
        file.put("student.use_sequence_packing", True, "policy.sequence_packing")
        algorithm = file.get("policy.sequence_packing.algorithm")
        ours = "modified_first_fit_decreasing"
        if algorithm == ours:
            file.put("student.packing_algorithm", ours, "policy.sequence_packing.algorithm")
        elif algorithm is not None:
            file.result.ignored.append(file.written("policy.sequence_packing.algorithm"))
    file.put("student.sequence_length_round_in_train", math.lcm(*roundings.values()), list(roundings)[-1])


def translate_schedule(file: NemoRlFile, updates: int) -> None:
    betas = file.get("policy.optimizer.kwargs.betas")
    if isinstance(betas, list) and len(betas) == 2:
        for number, beta in enumerate(betas, start=1):
            file.put(f"student.training_args.adam_beta{number}", beta, "policy.optimizer.kwargs.betas")
    elif betas is not None:
        file.refuse("policy.optimizer.kwargs.betas", f"= {format_value(betas)} must be two numbers")
    if "max_grad_norm" in file.section(file.student):
        file.put("max_grad_norm", file.get("policy.max_grad_norm") or 0.0, "policy.max_grad_norm")
    path = "policy.scheduler"
    given = file.get(path)
    if given is None:
        file.put("student.training_args.lr_scheduler_type", "constant", file.student)
        return
    parts = given if isinstance(given, list) else [given]
    schedulers, milestones = [], None
    for part in parts:
        if isinstance(part, Mapping) and "milestones" in part:
            milestones = part["milestones"]
        elif (
            isinstance(part, Mapping)
            and str(part.get("name")).startswith(_PYTORCH_SCHEDULES)
            and isinstance(kwargs := part.get("kwargs") or {}, Mapping)
        ):
            schedulers.append({"name": part["name"].removeprefix(_PYTORCH_SCHEDULES), **kwargs})
        else:
            file.refuse(path, f"has the entry {part}; write name: {_PYTORCH_SCHEDULES}… with kwargs, or milestones")
            return
    interval = updates if updates > 1 else None  # NeMo-RL's schedules count rollouts, not optimizer steps
    sequence = {"schedulers": schedulers, "milestones": milestones, "interval": interval}
    file.put("student.training_args.lr_scheduler_type", "sequential", path)
    file.put(
        "student.training_args.lr_scheduler_kwargs",
        {key: one for key, one in sequence.items() if one is not None},
        path,
    )
