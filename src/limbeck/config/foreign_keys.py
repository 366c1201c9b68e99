"""Keys of TRL, transformers and papers that Limbeck does not have, and what to set instead."""

from __future__ import annotations

_TRL = "TRL"
_HF = "transformers"

FOREIGN_KEYS: dict[str, tuple[str, str]] = {
    # GKDConfig
    "lambda": ("GKD", "rollout.on_policy_fraction"),
    "lmbda": (_TRL, "rollout.on_policy_fraction"),
    "beta": (_TRL, "js_beta, with kd_objective: js_divergence"),
    "seq_kd": (_TRL, "rollout.off_policy: teacher"),
    "teacher_model_name_or_path": (_TRL, "teacher_pretrain"),
    "teacher_model_revision": (_TRL, "teacher.model_args.revision"),
    "teacher_model_init_kwargs": (_TRL, "the keys of teacher.model_args"),
    "max_completion_length": (_TRL, "rollout.max_new_tokens"),
    "max_prompt_length": (_TRL, "sequence_length, which limits a prompt and its answer together"),
    # SFTConfig, ModelConfig, ScriptArguments
    "max_length": (_TRL, "sequence_length"),
    "max_seq_length": (_TRL, "sequence_length"),
    "packing": (_TRL, "student.use_sequence_packing"),
    "padding_free": (_TRL, "student.use_sequence_packing"),
    "dataset_name": (_TRL, "student.data_args.file_name: hub:OWNER/NAME"),
    "dataset_text_field": (_TRL, "student.data_args.format: text"),
    "dataset_num_proc": (_TRL, "student.data_args.preprocessing_num_workers"),
    "assistant_only_loss": (_TRL, "student.data_args.train_on"),
    "completion_only_loss": (_TRL, "distill_on_prompt"),
    "chat_template_path": (_TRL, "student.data_args.template"),
    "use_peft": (_TRL, "student.model_args.lora_target"),
    "lora_r": (_TRL, "student.model_args.lora_rank"),
    "lora_target_modules": (_TRL, "student.model_args.lora_target"),
    "lora_modules_to_save": (_TRL, "student.model_args.additional_target"),
    "use_vllm": (_TRL, "rollout.generator: vllm"),
    # TrainingArguments
    "optim": (_HF, "student.training_args.optimizer_name"),
    "report_to": (_HF, "track_with"),
    "run_name": (_HF, "exp_name"),
    "torch_dtype": (_HF, "student.model_args.dtype and teacher.model_args.dtype"),
    "bf16": (_HF, "student.model_args.dtype: bf16"),
    "fp16": (_HF, "student.model_args.dtype: fp16"),
    "gradient_checkpointing": (_HF, "student.model_args.disable_gradient_checkpointing, with the opposite value"),
    "gradient_checkpointing_kwargs": (_HF, "student.model_args.gradient_checkpointing_use_reentrant"),
    "per_device_eval_batch_size": (_HF, "student.infer_batch_size"),
    "eval_strategy": (_HF, "eval_steps"),
    "evaluation_strategy": (_HF, "eval_steps"),
    "save_strategy": (_HF, "save_steps"),
    "logging_strategy": (_HF, "logging_steps"),
    "save_total_limit": (_HF, "max_ckpt_to_keep"),
    "metric_for_best_model": (_HF, "checkpoint_config.best_metric"),
    "greater_is_better": (_HF, "checkpoint_config.best_mode"),
    "load_best_model_at_end": (_HF, "the link `best` in the output folder"),
    "hub_model_id": (_HF, "checkpoint_config.save_to_hub.repo_id"),
    "push_to_hub": (_HF, "checkpoint_config.save_to_hub.repo_id"),
    "torch_compile": (_HF, "compile_model"),
    "fsdp": (_HF, "student.strategy_args.strategy_name: fsdp2_train"),
    "fsdp_config": (_HF, "student.strategy_args.strategy_config"),
    "ddp_timeout": (_HF, "student.backend_timeout"),
}
"""The key's system, and Limbeck's key."""
