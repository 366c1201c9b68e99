"""Rules between the keys of on-policy distillation: the section rollout, and objectives on sampled tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from limbeck.config.schema.base import Contradiction
from limbeck.config.schema.mixture_rules import mixture_contradictions, unread_mixture_keys
from limbeck.config.schema.models import reads_megatron_keys
from limbeck.registry import GENERATORS, HAS_OWN_DEVICES

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields


def sampled_contradictions(config: RunFields) -> Iterator[Contradiction]:
    """Of an objective on the token that the student has sampled."""
    needing = {
        "logits_topk": config.logits_topk > 0,
        "cross_tokenizer": config.cross_tokenizer != "off",
        "objective_faults": bool(config.objective_faults),
        "loss_balance": config.loss_balance != "weighted",
        "teacher.signal = top_k": config.teacher.signal == "top_k",
    }
    for other in (name for name, given in needing.items() if given):
        yield Contradiction(
            "kd_objective",
            f"= {config.kd_objective} reads the sampled token only and cannot be combined with {other}; remove one of them",
        )
    if config.rollout is None or "student" not in config.rollout.origins:
        yield Contradiction(
            "kd_objective",
            f"= {config.kd_objective} needs tokens that the student has sampled; add rollout with an on_policy_fraction above "
            "0",
        )
    elif config.rollout.origins != ("student",) and config.kd_objective != "policy_gradient":
        yield Contradiction(
            "kd_objective",
            f"= {config.kd_objective} estimates the reverse KL at tokens that the student has sampled, not at answers of the "
            "data; set rollout.on_policy_fraction: 1, or use policy_gradient, which leaves other tokens out",
        )
    elif config.kd_objective == "policy_gradient" and config.rollout.temperature != config.kd_temperature:
        yield Contradiction(
            "kd_temperature",
            f"= {config.kd_temperature:g} is not the rollout.temperature = {config.rollout.temperature:g} at which the student "
            "writes, and policy_gradient compares with the probabilities there; set both to the same number",
        )


def rollout_contradictions(config: RunFields) -> Iterator[Contradiction]:
    rollout = config.rollout
    if rollout is None:
        if config.step_source == "rollout":
            yield Contradiction("step_source", "= rollout needs the section rollout; add it, for example rollout: {}")
        return
    yield from mixture_contradictions(config)
    if config.has_policy_gradient:
        key = "kd_objective" if config.kd_objective == "policy_gradient" else "rollout.reward_weight"
        if rollout.truncates or rollout.temperature == 0:
            yield Contradiction(
                key,
                "has a policy gradient, for which the student must write from its whole distribution; set rollout.top_p: 1, "
                "rollout.top_k: 0 and a rollout.temperature above 0",
            )
    if rollout.reward_weight > 0:
        if rollout.environment is None:
            yield Contradiction("rollout.reward_weight", "needs rewards; set rollout.environment")
        if rollout.num_generations == 1:
            yield Contradiction(
                "rollout.reward_weight",
                "compares the samples of a prompt, and there is one; set rollout.num_generations to 2 or more",
            )
        if config.cross_tokenizer != "off" or config.objective_faults or config.loss_balance != "weighted":
            yield Contradiction(
                "rollout.reward_weight",
                "cannot be combined with cross_tokenizer, objective_faults or loss_balance; remove one of them",
            )
    if config.distill_on_prompt:
        yield Contradiction("distill_on_prompt", "hides where an answer begins, which rollout needs; set it to false")
    if config.student.data_args.overlong == "split" and config.writes_answers:
        yield Contradiction(
            "student.data_args.overlong",
            "= split cuts rows from the beginning of their prompts, which rollout continues; use drop or truncate",
        )
    if rollout.generator == "hf":
        yield from _hf_contradictions(rollout.generator_kwargs)
    if rollout.in_lockstep:
        obstacle = lockstep_obstacle(config)
        if obstacle is not None:
            yield Contradiction("rollout.generator_kwargs.copy", f"= false writes with the student itself, {obstacle}")
    if rollout.max_staleness and (config.offloads_colocated or rollout.offload):
        key = "rollout.offload" if rollout.offload else "is_offload_states"
        yield Contradiction(
            "rollout.max_staleness",
            f"= {rollout.max_staleness} writes while the student trains, and {key} leaves the device to one of them; set one "
            "of them to 0 or false",
        )
    if rollout.device_mapping is not None:
        yield from _own_device_contradictions(config, rollout.device_mapping)
    if rollout.stop_if is not None and not rollout.stop_if.model_fields_set - {"for_steps"}:
        yield Contradiction(
            "rollout.stop_if",
            "has no limit; set truncated_share, repeated_share, empty_share, mean_length_below or mean_length_above",
        )
    above = None if rollout.stop_if is None else rollout.stop_if.mean_length_above
    if above is not None and above >= rollout.max_new_tokens * rollout.max_turns:
        yield Contradiction(
            "rollout.stop_if.mean_length_above",
            f"= {above:g} is never passed, because an answer has at most {rollout.max_new_tokens * rollout.max_turns} tokens "
            "(rollout.max_new_tokens in each turn); lower it",
        )


def _hf_contradictions(arguments: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Of the arguments of the generator hf; the engine of another checks its own."""
    slots, copy = arguments.get("slots", 64), arguments.get("copy", "auto")
    wrong = dict.fromkeys(sorted(arguments.keys() - {"slots", "copy"}), "is no argument of the generator hf")
    if type(slots) is not int or slots < 1:
        wrong["slots"] = f"= {slots} is no positive number"
    if copy != "auto" and type(copy) is not bool:
        wrong["copy"] = f"= {copy} is neither auto nor true or false"
    for key, fault in wrong.items():
        yield Contradiction(
            f"rollout.generator_kwargs.{key}",
            f"{fault}; set slots, the number of completions that are written at the same time, copy, whether each rank has a "
            "copy of the weights, or nothing",
        )


def _own_device_contradictions(config: RunFields, devices: list[int]) -> Iterator[Contradiction]:
    """Of a generator on devices of its own."""
    rollout, key = config.rollout, "rollout.device_mapping"
    assert rollout is not None
    if not GENERATORS.has_trait(rollout.generator, HAS_OWN_DEVICES):
        yield Contradiction(
            key, f"needs a generator in other processes, which {rollout.generator} is not; set rollout.generator: vllm"
        )
    if config.device_mapping is None:
        yield Contradiction(key, "needs the devices of the student; set student.device_mapping to others")
    teacher = config.teacher.device_mapping if config.needs_worker_groups and config.teacher.service is None else None
    for role, others in (("student", config.device_mapping), ("teacher", teacher)):
        shared = sorted(set(devices) & set(others or ()))
        if shared:
            yield Contradiction(key, f"has the device {shared[0]} of {role}.device_mapping; give each other devices")
    if teacher and set(teacher) & set(config.device_mapping or ()):
        yield Contradiction(
            key,
            "cannot be combined with worker groups of student and teacher on common devices; give the teacher devices of its "
            "own, or remove teacher.device_mapping and is_offload_states",
        )
    if config.num_nodes > 1:
        yield Contradiction(key, f"is only supported on one machine, and num_nodes = {config.num_nodes}; remove it")
    elif config.num_gpus_per_node is not None and max(devices) >= config.num_gpus_per_node:
        yield Contradiction(
            key,
            f"has device {max(devices)} (counted from 0), but num_gpus_per_node = {config.num_gpus_per_node}; correct one",
        )
    size = rollout.generator_kwargs.get("tensor_parallel_size", 1)
    if type(size) is not int or size < 1 or len(devices) % size:
        yield Contradiction(
            "rollout.generator_kwargs.tensor_parallel_size",
            f"= {size} does not divide the {len(devices)} devices of rollout.device_mapping; change one of them",
        )
    if rollout.offload:
        yield Contradiction(
            "rollout.offload", "frees devices that only the generator has; remove it or rollout.device_mapping"
        )


def lockstep_obstacle(config: RunFields) -> str | None:
    """Why all ranks cannot write together with the student itself, and what to do; None if they can."""
    strategy = config.student.strategy_args
    if config.rollout is not None and config.rollout.max_staleness:
        return (
            f"whose weights are in use while it trains, and rollout.max_staleness = {config.rollout.max_staleness} writes "
            "then; set copy to true, or max_staleness to 0"
        )
    if strategy.reads_deepspeed_block or reads_megatron_keys(strategy.strategy_name):
        return f"which strategy_name = {strategy.strategy_name} does not support; use fsdp2_train, or set copy to true"
    for kind in ("tensor", "pipeline"):
        size = getattr(strategy.strategy_config, f"{kind}_model_parallel_size")
        if size > 1:
            return (
                f"of which no rank computes a whole pass with student.strategy_args.strategy_config.{kind}_model_parallel_size "
                f"= {size}; use 1, and FSDP2 shards the model all the same, or set copy to true"
            )
    return None


def unread_rollout_keys(config: RunFields) -> Iterator[tuple[str, str]]:
    """Keys of rollout that have no effect in this combination, with the reason; without the section, none."""
    if config.rollout is None:
        return
    yield from unread_mixture_keys(config)
    if config.rollout.in_lockstep:
        yield "rollout.offload", "is not read with rollout.generator_kwargs.copy: false, which copies no weights"
    if not config.has_policy_gradient:
        yield "rollout.policy_clip", "is only read by kd_objective: policy_gradient and with rollout.reward_weight"
    if config.rollout.truncates:
        yield (
            "rollout.log_prob_gap_limit",
            "is not read with rollout.top_p or rollout.top_k, which change probabilities",
        )
    elif config.cross_tokenizer != "off":
        yield (
            "rollout.log_prob_gap_limit",
            "is not read with cross_tokenizer, in which probabilities are not compared",
        )
    if "student" not in config.rollout.origins:
        for key in ("max_staleness", "steps_per_rollout", "stop_if"):
            yield f"rollout.{key}", "is only read with rollout.on_policy_fraction above 0"
