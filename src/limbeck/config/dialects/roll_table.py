"""ROLL's keys and values that Limbeck's schema does not have, and what they become.

The tables are grouped by kind of section (``limbeck.config.translation.SECTIONS``).
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from limbeck.config.deepspeed import words
from limbeck.config.schema import (
    DataArgs,
    ModelArgs,
    StudentModelArgs,
    TrainingArgs,
)

NO_MEANING: dict[str, frozenset[str]] = {
    "run": words(
        """rpc_timeout base_dir rollout_dump_dir rollout_batch_size val_batch_size local_rank val_prompt_length
        val_sequence_length profiler_timeline profiler_memory profiler_output_dir length_profiler_dir
        report_length_and_rewards is_offload_optimizer_states_in_train_step
        otlp_output_dir model_update_buffer_size_mb rollout_mock transfer_backend generate_opt_level
        is_num_return_sequences_expand max_running_requests is_use_additional_prompts max_additional_running_prompts
        user_defined_rollout_loop_cls router_args max_pixels min_pixels"""
    ),
    "checkpoint_config": frozenset({"async_upload", "keep_local_file"}),
    "worker": words(
        """name pg_variant generating_args world_size num_gpus_per_worker model_update_frequency
        topr_positive_weight topr_negative_weight use_dynamic_batching_in_infer
        max_tokens_per_microbatch_in_infer sequence_length_round_in_infer offload_nccl sequence_packing_args
        logits_in_fp32 opd_kl_coef tag_included"""
    ),
    "model_args": frozenset({"device_map", "num_labels", "max_pixels", "min_pixels"}),
    "data_args": words(
        """dataset_type tag id prompt response messages image_max_pixels image_min_pixels
        video_max_pixels video_min_pixels video_total_pixels video_fps video_max_frames video_resize_chunk_frames
        image_folder video_folder audio_folder"""
    ),
    "training_args": frozenset({"dataloader_num_workers", "save_hf_model"}),
    "strategy_args": frozenset({"gpu_memory_utilization"}),
    "strategy_config": words(
        """wrap_policy apply_expert_patch apply_tiled_mlp tiled_num_shards model_type async_save_ckpt moe_use_grouped_mm
        reduce_scatter_during_grad_accumulation account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split overlap_p2p_comm variable_seq_lengths recompute_granularity recompute_method
        recompute_modules recompute_num_layers bias_activation_fusion apply_rope_fusion cross_entropy_loss_fusion
        moe_layer_recompute moe_token_dispatcher_type moe_grouped_gemm moe_shared_expert_overlap transformer_impl
        cuda_graph_impl cuda_graph_scope accumulate_allreduce_grads_in_fp32 use_distributed_optimizer
        distrib_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient overlap_grad_reduce
        delay_grad_reduce overlap_param_gather check_for_nan_in_loss_and_grad ddp_average_in_collective ddp_bucket_size
        calculate_per_token_loss save_hf_model ckpt_format ckpt_d2h_non_blocking sequence_packing compile_warmup
        gpu_memory_utilization"""
    ),
}
"""Ignored keys. They configure rollouts, rewards, Ray, profilers or Megatron's memory and do not change a result.

Megatron's strategies read some of them, which have then been moved (``limbeck.config.schema.MegatronConfig``).
"""

_PARALLEL = (
    (None, 1),
    "is not supported yet; remove it, and fsdp2_train shards the same model over the same devices",
)
_OFFLOAD = ((None, False), "(parameters or optimizer in CPU memory) is not supported yet; set it to false")
_MOE = ((None, 0, 0.0), "changes the loss of mixture-of-experts models, which is not supported yet; remove it")

ONLY_WHEN_OFF: dict[str, dict[str, tuple[tuple[object, ...], str]]] = {
    "run": {
        "model_download_type": (
            (None, "HUGGINGFACE_HUB"),
            "is not supported yet; download the model and give its folder, or use the Hugging Face hub",
        ),
        "target_vocab_size": (
            (None,),
            "cannot be set; the shared vocabulary follows from the tokenizer and the output heads, so remove it",
        ),
    },
    "checkpoint_config": {
        "type": ((None, "file_system"), "is not supported yet; use file_system"),
    },
    "worker": {
        "worker_cls": (
            (
                None,
                "roll.pipeline.distill.distill_worker.StudentWorker",
                "roll.pipeline.distill.distill_worker.TeacherWorker",
            ),
            "is a worker class of your own, which Limbeck does not run; remove it",
        ),
        "max_concurrency": (
            (None, 1),
            "is not supported: a worker processes one request at a time, in order; set it to 1",
        ),
        "router_replay": ((None, {}, {"mode": "disable"}), "is not supported yet; set mode: disable"),
        "apply_loss_scale": (
            (None, True),
            "would average over micro-batches; the loss is always the mean over all supervised tokens of a step, "
            "so remove it",
        ),
        "mtp_training_mode": ((None, "disabled"), "(multi-token prediction) is not supported yet; set it to disabled"),
    },
    "model_args": {
        "model_type": (
            (None, "causal_lm"),
            "is not supported; Limbeck distils causal language models only, so set it to ~",
        ),
        "adapter_name_or_path": ((None,), "is not supported yet; merge the adapter into the checkpoint and use that"),
        "moe_aux_loss_coef": _MOE,
        "autocast_adapter_dtype": ((None, True), "is not supported yet; set it to true"),
    },
    "data_args": {
        "interleave_probs": (
            (None, "1.0", 1.0),
            "sets the shares of several files; use student.data_args.sources with a weight for each",
        ),
        "custom_data_kwargs_func": ((None,), "is a function of your own, which Limbeck does not run; remove it"),
    },
    "training_args": {
        "tf32": ((None, False), "is not supported yet; remove it"),
    },
    "strategy_args": {"ep_size": _PARALLEL},
    "strategy_config": {
        **dict.fromkeys(
            (
                *("ep_size", "efsdp_size"),
                *("expert_model_parallel_size", "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size"),
            ),
            _PARALLEL,
        ),
        "pipeline_model_parallel_layout": ((None,), _PARALLEL[1]),
        "optimizer_cpu_offload": _OFFLOAD,
        "optimizer_offload_fraction": (
            (None, 0, 0.0),
            "(a part of the optimizer in CPU memory) is not supported yet; remove it",
        ),
        "save_only_model": ((None, False), "would make resuming impossible and is not supported; set it to false"),
        "save_merged_model": (
            (None, True),
            "with LoRA is not supported: adapters are always merged when saving; set it to true, or remove it",
        ),
        "fp8": ((None, False), "is not supported yet; remove it"),
        "fp8_recipe": ((None,), "is not supported yet; remove it"),
        "fp8_param": ((None, False), "is not supported yet; remove it"),
        "optimizer": ((None, "adam", "adamw"), "is not supported yet; the optimizer is AdamW, so remove it"),
        "additional_configs": ((None, {}), "passes settings to Megatron that Limbeck does not know; remove it"),
        "mtp_num_layers": ((None, 0), "(multi-token prediction) is not supported yet; set it to 0"),
        "moe_aux_loss_coeff": _MOE,
        "moe_z_loss_coeff": _MOE,
        "moe_router_load_balancing_type": (
            (None, "none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
            "routes tokens otherwise than the model does, which is not supported; remove it",
        ),
        "moe_expert_capacity_factor": ((None,), "drops tokens of experts, which is not supported yet; remove it"),
        "moe_pad_expert_input_to_capacity": ((None, False), "is not supported yet; remove it"),
        "moe_token_drop_policy": ((None,), "drops tokens of experts, which is not supported yet; remove it"),
        "moe_enable_routing_replay": ((None, False), "is not supported yet; remove it"),
        "moe_router_dtype": ((None,), "is not supported yet; remove it"),
        "lr_scheduler_kwargs": (
            (None, {}),
            "is not read here; set student.training_args.lr_scheduler_kwargs",
        ),
        "zero_optimization": (
            (None,),
            "is a DeepSpeed key; set strategy_name: deepspeed_train too, or remove it",
        ),
    },
}
"""Keys that may change a result: the values that match what Limbeck does, and the error message for all others."""

STRATEGIES_INSTEAD: dict[str, str] = {
    "vllm": "use fsdp2_infer or hf_infer, which compute the whole distribution",
    "sglang": "use fsdp2_infer or hf_infer, which compute the whole distribution",
    "mock_infer": "use hf_infer",
}
"""ROLL's strategies that Limbeck does not have, unless a plug-in registers them, and what to use instead."""

SPELLINGS: dict[str, dict[str, dict[object, object]]] = {
    "run": {"logits_transfer_backend": {"nccl_only": "nccl-only", None: "auto"}},
    "strategy_config": {"fsdp_size": {-1: None, 0: None, 1: None}},
}
"""ROLL's spelling of a value and Limbeck's."""

MOVED: dict[str, str] = {
    "student.training_args.max_grad_norm": "max_grad_norm",
    "student.training_args.max_steps": "max_steps",
    "global_template": "student.data_args.template",
    **{
        f"{role}.{foreign}": f"{role}.strategy_args.strategy_config.{ours}"
        for role in ("student", "teacher")
        for ours, names in {
            "tensor_model_parallel_size": "strategy_args.tp_size strategy_args.strategy_config.tp_size "
            "strategy_args.strategy_config.tensor_parallel_size",
            "context_parallel_size": "strategy_args.cp_size strategy_args.strategy_config.cp_size model_args.ulysses_size "
            "strategy_args.strategy_config.ulysses_size",
            "pipeline_model_parallel_size": "strategy_args.pp_size strategy_args.strategy_config.pp_size "
            "strategy_args.strategy_config.pipeline_parallel_size",
        }.items()
        for foreign in names.split()
    },
}
"""ROLL's keys and Limbeck's keys with the same meaning."""

SAME_AS: dict[str, str] = {
    "student.training_args.seed": "seed",
    "student.training_args.output_dir": "output_dir",
}
"""Keys that ROLL sets from another key: removed if both agree, an error otherwise."""

TEMPLATES: dict[str, tuple[str, dict[str, Any]]] = {
    "native_nonthinking": ("native", {"enable_thinking": False}),
    "qwen3_nothink": ("qwen3", {"enable_thinking": False}),
}
"""ROLL's chat templates that are another template with fixed template_kwargs."""

UNREAD_BY_TEACHER: dict[str, Set[str]] = {
    "model_args": StudentModelArgs.model_fields.keys() - ModelArgs.model_fields.keys(),
    "data_args": DataArgs.model_fields.keys() | {"dataset_dir"},
    "training_args": TrainingArgs.model_fields.keys() | {"max_grad_norm", "seed", "output_dir", "max_steps"},
}
"""Keys that ROLL accepts for the teacher although it reads the student's batches and is not trained."""

DEFAULT_PROMPT_LENGTH = 1024
"""ROLL's prompt_length for a response_length without one."""
