"""The keys of NeMo-RL's on-policy distillation and of the fork that mixes in the answers of the data, and what they become.

Keys are grouped by section. The section of the student is called ``policy`` here, whether the file calls it ``policy`` or
``student``; ``teacher`` has the same keys. ``dataset`` is an entry of ``data.train``, ``data.validation`` or ``data.default``.
"""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.config.deepspeed import words


@dataclass(frozen=True)
class Fixed:
    """A setting that would change a result: the values that match what Limbeck does, and the error message for all others.

    With ``section``, a section with ``enabled: false`` matches too.
    """

    values: tuple[object, ...]
    sentence: str
    section: bool = False


def _off(sentence: str) -> Fixed:
    return Fixed((None, False), sentence, section=True)


MOVED: dict[str, str] = {
    "distillation.seed": "seed",
    "distillation.lambda": "rollout.on_policy_fraction",
    "distillation.num_generations_per_prompt": "rollout.num_generations",
    "distillation.max_rollout_turns": "rollout.max_turns",
    "distillation.max_num_epochs": "student.training_args.num_train_epochs",
    "distillation.topk_logits_k": "logits_topk",
    "distillation.val_at_start": "validation.at_start",
    "distillation.val_at_end": "validation.at_end",
    "distillation.max_val_samples": "validation.rollout.max_samples",
    "distillation.logging_steps": "logging_steps",
    "checkpointing.checkpoint_dir": "checkpoint_config.output_dir",
    "policy.model_name": "student_pretrain",
    "policy.precision": "student.model_args.dtype",
    "policy.hf_config_overrides": "student.model_args.model_config_kwargs",
    "policy.max_total_sequence_length": "sequence_length",
    "policy.tokenizer.chat_template_kwargs": "student.data_args.template_kwargs",
    "policy.dtensor_cfg.tensor_parallel_size": "student.strategy_args.strategy_config.tensor_model_parallel_size",
    "policy.dtensor_cfg.context_parallel_size": "student.strategy_args.strategy_config.context_parallel_size",
    "policy.dtensor_cfg.sequence_parallel": "student.strategy_args.strategy_config.sequence_parallel",
    "policy.dtensor_cfg.cpu_offload": "student.strategy_args.strategy_config.offload_policy",
    "policy.dtensor_cfg.custom_parallel_plan": "student.strategy_args.strategy_config.tensor_parallel_plan",
    "policy.dtensor_cfg.env_vars": "student.system_envs",
    "policy.optimizer.kwargs.lr": "student.training_args.learning_rate",
    "policy.optimizer.kwargs.weight_decay": "student.training_args.weight_decay",
    "policy.optimizer.kwargs.eps": "student.training_args.adam_epsilon",
    "policy.generation.max_new_tokens": "rollout.max_new_tokens",
    "policy.generation.temperature": "rollout.temperature",
    "policy.generation.top_p": "rollout.top_p",
    "policy.generation.top_k": "rollout.top_k",
    "policy.generation.stop_strings": "rollout.stop_strings",
    "policy.generation.stop_token_ids": "rollout.stop_token_ids",
    "policy.generation.val_temperature": "validation.rollout.temperature",
    "policy.generation.val_top_p": "validation.rollout.top_p",
    "policy.generation.val_top_k": "validation.rollout.top_k",
    "teacher.model_name": "teacher_pretrain",
    "teacher.precision": "teacher.model_args.dtype",
    "teacher.hf_config_overrides": "teacher.model_args.model_config_kwargs",
    "teacher.dtensor_cfg.tensor_parallel_size": "teacher.strategy_args.strategy_config.tensor_model_parallel_size",
    "teacher.dtensor_cfg.context_parallel_size": "teacher.strategy_args.strategy_config.context_parallel_size",
    "teacher.dtensor_cfg.sequence_parallel": "teacher.strategy_args.strategy_config.sequence_parallel",
    "teacher.dtensor_cfg.cpu_offload": "teacher.strategy_args.strategy_config.offload_policy",
    "teacher.dtensor_cfg.custom_parallel_plan": "teacher.strategy_args.strategy_config.tensor_parallel_plan",
    "teacher.dtensor_cfg.env_vars": "teacher.system_envs",
    "env.math.num_workers": "rollout.environment_kwargs.workers",
    "logger.log_dir": "output_dir",
    "logger.num_val_samples_to_print": "validation.rollout.print_samples",
    "cluster.num_nodes": "num_nodes",
    "cluster.gpus_per_node": "num_gpus_per_node",
    "env_vars": "system_envs",
}
"""NeMo-RL's keys and Limbeck's keys with the same meaning. A null leaves Limbeck's key unset."""

READ: dict[str, frozenset[str]] = {
    "": words("distillation loss_fn checkpointing policy student teacher data env logger cluster plugins"),
    "distillation": words(
        """num_prompts_per_step max_num_steps max_steps val_period eval_steps save_steps kl_type mixed_kl_weight
        zero_outside_topk max_length teacher_model_path"""
    ),
    "loss_fn": words("kl_type mixed_kl_weight zero_outside_topk"),
    "checkpointing": words(
        "enabled metric_name higher_is_better keep_top_k ft_keep_latest_k save_period checkpoint_must_save_by"
    ),
    "policy": words(
        """tokenizer train_global_batch_size train_micro_batch_size dtensor_cfg megatron_cfg dynamic_batching sequence_packing
        max_grad_norm make_sequence_length_divisible_by optimizer scheduler generation"""
    ),
    "policy.tokenizer": words("name chat_template"),
    "policy.dtensor_cfg": words("enabled activation_checkpointing dp_replicate_size lora_cfg"),
    "policy.dtensor_cfg.lora_cfg": words("enabled target_modules match_all_linear dim alpha dropout"),
    "policy.dynamic_batching": words("enabled train_mb_tokens sequence_length_round"),
    "policy.sequence_packing": words("enabled train_mb_tokens sequence_length_round algorithm"),
    "policy.optimizer": words("kwargs"),
    "policy.optimizer.kwargs": words("betas"),
    "policy.generation": words("backend vllm_cfg vllm_kwargs colocated"),
    "policy.generation.colocated": words("enabled resources"),
    "policy.generation.colocated.resources": words("gpus_per_node num_nodes"),
    "policy.generation.vllm_cfg": words("gpu_memory_utilization enforce_eager kv_cache_dtype tensor_parallel_size"),
    "data": words(
        """train validation default dataset_name data_path input_key output_key subset split prompt_file prompt_template
        system_prompt_file max_samples env_name"""
    ),
    "dataset": words(
        """dataset_name data_path input_key output_key subset split prompt_file prompt_template system_prompt_file repeat
        max_samples env_name"""
    ),
    "env": words("math"),
    "env.math": frozenset(),
    "logger": words("tensorboard_enabled wandb_enabled mlflow_enabled swanlab_enabled wandb mlflow swanlab"),
    "cluster": frozenset(),
}
"""Keys that ``nemo_rl.py`` and ``nemo_rl_data.py`` translate."""

NESTED = words(
    """student teacher plugins data.train data.validation data.default policy.dtensor_cfg.lora_cfg.target_modules
    policy.optimizer.kwargs.betas policy.scheduler policy.generation.vllm_kwargs logger.wandb logger.mlflow logger.swanlab"""
)
"""Those of them that may have a list or a section, besides the sections that are keys of ``READ``."""

FLAGS = words(
    """enabled higher_is_better zero_outside_topk activation_checkpointing match_all_linear tensorboard_enabled wandb_enabled
    mlflow_enabled swanlab_enabled"""
)
"""Names of those of them that are true or false."""

NO_MEANING: dict[str, frozenset[str]] = {
    "distillation": words("val_batch_size"),
    "checkpointing": words(
        "model_save_format save_consolidated model_cache_dir model_repo_id is_peft peft_config is_async"
    ),
    "policy": words(
        """generation_batch_size logprob_batch_size logprob_chunk_size offload_optimizer_for_logprob refit_buffer_size_gb
        disable_modelopt_layer_spec name_prefix"""
    ),
    "policy.tokenizer": words("use_fastokens use_processor audio video"),
    "policy.dtensor_cfg": words("_v2 defer_fsdp_grad_sync moe_parallelizer automodel_kwargs clear_cache_every_n_steps"),
    "policy.dtensor_cfg.lora_cfg": words("lora_A_init use_triton"),
    "policy.dynamic_batching": words("logprob_mb_tokens"),
    "policy.sequence_packing": words("logprob_mb_tokens microbatch_order"),
    "policy.optimizer.kwargs": words("foreach fused"),
    "policy.generation": words(
        "port_range_low port_range_high use_async_rollouts refit_transport refit_cfg model_name"
    ),
    "policy.generation.vllm_cfg": words(
        """async_engine precision logprobs_mode pipeline_parallel_size expert_parallel_size max_model_len
        use_deep_gemm num_last_layers_in_bf16 num_first_layers_in_bf16 distributed_executor_backend skip_tokenizer_init
        load_format use_tqdm cap_max_tokens_to_context expose_http_server http_refit_api_key_env_var http_refit_server_port
        zmq_refit_server_port http_server_serving_chat_kwargs tool_parser_plugin reasoning_parser_plugin env_vars
        reset_encoder_cache_after_weight_update"""
    ),
    "data": words("max_input_seq_length num_workers add_bos add_eos add_system_prompt"),
    "dataset": words("seed download_dir"),
    "env.math": words("math_verify_impl"),
    "env": words("should_log_nemo_gym_responses"),
    "logger": words("monitor_gpus gpu_monitoring tensorboard"),
    "cluster": words("enabled master_port_range_low master_port_range_high segment_size"),
}
"""Ignored keys. They configure processes, ports, memory and speed, or parts that Limbeck does not have, and do not change a
result."""

_MEGATRON = _off("(Megatron) is not supported yet; use dtensor_cfg, whose sizes mean the same")
_QUANTIZED = Fixed((None,), "(quantization) is not supported yet; remove it")
_ENVIRONMENT = "is not supported yet; Limbeck checks answers to mathematical questions only, so use math"

FIXED: dict[str, dict[str, Fixed]] = {
    "": {
        "teachers": Fixed((None, []), "is not supported yet; use teacher"),
        "on_policy_distillation": _off("(teachers of a GRPO run) is not supported yet; remove it"),
    },
    "distillation": {
        "generate_strategy": Fixed((None, {}), "is not read; set the keys of generation in the student's section"),
    },
    "loss_fn": {
        "temperature": Fixed((None, 1, 1.0), "is not read; generation.temperature divides the logits of the loss too"),
        "alpha": Fixed((None,), "is not supported: the loss is the divergence alone; remove it"),
        "beta": Fixed((None,), "is not supported: the loss is the divergence alone; remove it"),
    },
    "checkpointing": {
        "ft_save_period": Fixed((None,), "is not supported; set save_period"),
        "save_optimizer": Fixed((None, True), "would make resuming impossible and is not supported; set it to true"),
        "pretrained_checkpoint": Fixed((None,), "(weights of Megatron) is not supported yet; convert them"),
    },
    "policy": {
        "draft": _off("(training a draft model) is not supported yet; remove it"),
        "router_replay": _off("is not supported yet; remove it"),
        "reward_model_cfg": _off("(a reward model) is not supported; remove it"),
        "pretrained_checkpoint": Fixed((None,), "(weights of Megatron) is not supported yet; convert them"),
        "is_vlm": Fixed((None, False), "(images) is not supported yet; set it to false"),
        **dict.fromkeys(
            words(
                "quant_cfg quant_calib_data quant_calib_size quant_batch_size quant_sequence_length real_quant real_quant_cfg"
            ),
            _QUANTIZED,
        ),
    },
    "policy.dtensor_cfg": {
        "expert_parallel_size": Fixed((None, 1), "is not supported yet; set it to 1"),
    },
    "policy.dtensor_cfg.lora_cfg": {
        "exclude_modules": Fixed((None, []), "is not supported; name the other modules in target_modules"),
        "dropout_position": Fixed(
            (None, "pre"), "is not supported: dropout acts on the input of an adapter, as with pre"
        ),
    },
    "policy.optimizer": {
        "name": Fixed((None, "torch.optim.AdamW"), "is not supported yet; the optimizer is torch.optim.AdamW"),
    },
    "policy.optimizer.kwargs": {
        "amsgrad": Fixed((None, False), "is not supported; remove it"),
        "maximize": Fixed((None, False), "is not supported; remove it"),
    },
    "policy.generation": {
        "bad_words": Fixed((None, []), "is not supported yet; remove it"),
        "quant_cfg": _QUANTIZED,
    },
    "policy.generation.vllm_cfg": {
        "is_mx": Fixed((None, False), "(quantization) is not supported yet; remove it"),
        "enable_return_routed_experts": Fixed((None, False), "is not supported yet; remove it"),
        "video": Fixed((None,), "is not supported yet; remove it"),
    },
    "data": {
        "shuffle": Fixed((None, True), "would keep the order of the data, which is not supported; set it to true"),
        "add_generation_prompt": Fixed((None, True), "is not supported: a prompt ends with it; set it to true"),
        "use_multiple_dataloader": Fixed((None, False), "is not supported; set it to false"),
        "num_prompts_per_dataloader": Fixed((None,), "is not supported; remove it"),
        "custom_dataloader": Fixed((None,), "is code of your own, which Limbeck does not run; remove it"),
        "processor": Fixed((None, "math_hf_data_processor"), "is not supported; use math_hf_data_processor"),
    },
    "dataset": {
        "processor": Fixed((None, "math_hf_data_processor"), "is not supported; use math_hf_data_processor"),
        "split_validation_size": Fixed(
            (None, 0, 0.0),
            "(rows of the training data, drawn for validation) is not supported; set it to 0, and name the rows with split: "
            "train[:95%] in data.train, and the same dataset with train[95%:] in data.validation",
        ),
        "extract_answer": Fixed((None,), "is not supported; remove it: a checker finds the final answer itself"),
    },
    "env": {
        "should_use_nemo_gym": Fixed((None, False), f"(NeMo Gym) {_ENVIRONMENT}"),
        "nemo_gym": Fixed((None, {}), f"{_ENVIRONMENT}"),
    },
}
"""Settings that would change a result and are supported with some values only."""

DISABLED_BY: dict[str, Fixed | None] = {
    "policy.megatron_cfg": _MEGATRON,
    "policy.dynamic_batching": None,
    "policy.sequence_packing": None,
    "policy.dtensor_cfg.lora_cfg": None,
}
"""Sections whose other keys have no effect with ``enabled: false``; and the error message if ``true`` is not supported."""

TEACHER_READS = words("model_name precision logprob_batch_size hf_config_overrides dtensor_cfg megatron_cfg is_vlm")
"""The keys of ``teacher`` that NeMo-RL reads for a teacher, which is not trained and does not generate."""
