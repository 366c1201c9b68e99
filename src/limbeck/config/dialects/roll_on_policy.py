"""ROLL's on-policy distillation pipeline, as keys of its distillation pipeline and of ``rollout``.

ROLL trains with a policy gradient whose advantage is the log-probability ratio of the sampled token: an estimate of the reverse
KL divergence. Limbeck computes that divergence over the whole vocabulary, so the keys of the policy gradient have no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.config.deepspeed import words
from limbeck.config.locations import leaves
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value

SECTIONS = ("student_train", "student_infer")
"""The sections of the student; other files of ROLL have ``student``."""

_NO_MEANING = words(
    """is_pure_opd pure_opd_pipeline_type rollout_batch_size reward_pretrain tag_to_template adv_estimator gamma lambd
    whiten_advantages whiten_rewards advantage_clip reward_clip reward_norm reward_shift reward_scale use_kl_loss kl_loss_coef
    kl_penalty init_kl_coef add_token_level_kl critic_warmup pg_clip pg_clip_low pg_clip_high use_pg_clip_range dual_clip_loss
    value_clip entropy_loss_coef loss_agg_mode importance_sampling enable_old_logprobs_recompute enable_reference
    async_generation_ratio"""
)
"""Ignored: the policy gradient and its advantages, and the shape of the batches that are written."""

_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")
_WITHOUT_EFFECT = words("include_stop_str_in_output logprobs do_sample")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "length_penalty": 1}
"""Settings of the generation that Limbeck does not have, and the value that switches each off."""

_VLLM = words("gpu_memory_utilization block_size max_model_len max_num_batched_tokens max_num_seqs enforce_eager")
"""Keys of ``student_infer.strategy_args.strategy_config`` that are passed to vLLM; the others are about ROLL's own workers."""


def is_on_policy(values: Mapping[str, Any]) -> bool:
    """Whether a file of ROLL is for its on-policy pipeline."""
    return any(section in values for section in SECTIONS)


def translate(result: Translation) -> None:
    """Replace the keys of the on-policy pipeline in place."""
    result.ignore("", _NO_MEANING)
    _translate_rewards(result)  # before the student's data, whose domains are those of the rewards
    _translate_student(result)
    _translate_generation(result)
    _translate_validation(result)
    result.put("rollout.on_policy_fraction", 1.0, "student_infer")
    result.default("distill_loss_weight", 1.0, "student_train")
    result.default("kd_objective", "reverse_kl", "student_train")
    result.notices.append(
        "student_train: ROLL's policy gradient estimates the reverse KL divergence from the sampled token, and Limbeck "
        "computes it over the whole vocabulary; kd_objective: policy_gradient estimates it too. A step has "
        "per_device_train_batch_size x gradient_accumulation_steps x ranks samples, whatever rollout_batch_size is."
    )


def _translate_student(result: Translation) -> None:
    student, base = result.section("student_train") or {}, result.pop("pretrain")
    result.ignore("student_train.data_args", words("dataset_dir messages prompt tag"))
    result.ignore("student_train", frozenset({"sequence_packing_args"}))
    epochs = result.pop("ppo_epochs")
    if epochs not in (None, 1):
        result.refuse("ppo_epochs", f"= {format_value(epochs)} trains several times on what is written; set it to 1")
    domains = result.get("student_train.data_args.domain_interleave_probs")
    if isinstance(domains, Mapping) and len(domains) == 1:
        result.ignore("student_train.data_args", frozenset({"domain_interleave_probs"}))
    if not (result.section("student_train.model_args") or {}).get("model_name_or_path"):
        result.default("student_pretrain", base, "pretrain")
    for path, value in leaves(student):
        result.put(f"student.{path}", value, f"student_train.{path}")
    result.values.pop("student_train", None)


def _translate_generation(result: Translation) -> None:
    _move_sampling(result, "student_infer.generating_args", "rollout")
    result.move("num_return_sequences_in_group", "rollout.num_generations")
    result.move("student_infer.generating_args.num_return_sequences", "rollout.num_generations")
    result.move("student_infer.generating_args.stop_strings", "rollout.stop_strings")
    length = result.get("response_length")
    if result.get("rollout.max_new_tokens") is None and length is not None:
        result.put("rollout.max_new_tokens", length, "response_length")
    engine = result.pop("student_infer.strategy_args.strategy_name")
    if engine == "vllm":
        result.put("rollout.generator", "vllm", "student_infer.strategy_args.strategy_name")
        config = result.section("student_infer.strategy_args.strategy_config") or {}
        for key in sorted(_VLLM & config.keys()):
            result.move(f"student_infer.strategy_args.strategy_config.{key}", f"rollout.generator_kwargs.{key}")
    elif engine not in (None, "hf_infer"):
        result.notices.append(
            f"student_infer.strategy_args.strategy_name: the engine {format_value(engine)} is not built in; the student writes "
            "in the training process (rollout.generator: hf)."
        )
    result.ignored.extend(
        f"student_infer.{path}" for path, value in leaves(result.section("student_infer") or {}) if value != {}
    )
    result.values.pop("student_infer", None)


def _translate_rewards(result: Translation) -> None:
    """Rewards are measured only, as in ROLL: by math-verify if one of the reward workers compares mathematical answers."""
    rewards = result.values.pop("rewards", None)
    if not isinstance(rewards, Mapping):
        return
    classes = [str(one.get("worker_cls")) for one in rewards.values() if isinstance(one, Mapping)]
    if any("MathRule" in name for name in classes):
        result.put("rollout.environment", "math", "rewards")
        result.put("rollout.environment_kwargs.answer_key", "ground_truth", "rewards")
    else:
        result.ignored.append("rewards")


def _translate_validation(result: Translation) -> None:
    generation = "validation.generating_args"
    if result.get("rollout.environment") is None or not result.get("validation.data_args.file_name"):
        return
    _move_sampling(result, generation, "validation.rollout")
    result.move(f"{generation}.num_return_sequences", "validation.rollout.num_generations")
    if result.get(generation) == {}:
        result.pop(generation)


def _move_sampling(result: Translation, source: str, target: str) -> None:
    given = result.section(source) or {}
    for key, off in _NEUTRAL.items():
        if given.get(key) not in (None, off):
            result.refuse(f"{source}.{key}", f"= {format_value(given[key])} is not supported; remove it")
        given.pop(key, None)
    if given.get("do_sample") is False:
        given["temperature"] = 0.0
    if given.get("top_k") == -1:
        given["top_k"] = 0
    result.ignore(source, _WITHOUT_EFFECT)
    for key in _SAMPLING:
        result.move(f"{source}.{key}", f"{target}.{key}")
