"""Megatron-LM's arguments, and what becomes of each.

The tables have the flags without dashes. A flag is a switch (no value), or has one value or several. Flags that are in none of
the tables are unknown.
"""

from __future__ import annotations

from typing import Any, TypeVar

from limbeck.config.deepspeed import words

T = TypeVar("T")

SWITCH, VALUE, VALUES = "switch", "value", "values"


def _all(names: str, meaning: T) -> dict[str, T]:
    """The words of ``names``, all with one meaning."""
    return dict.fromkeys(names.split(), meaning)


MODEL_VALUES = words(
    """num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups kv-channels max-position-embeddings
        position-embedding-type rotary-base rotary-percent rotary-seq-len-interpolation-factor
        rope-scaling-factor make-vocab-size-divisible-by normalization norm-epsilon init-method-std window-size
        num-experts moe-ffn-hidden-size moe-router-topk moe-layer-freq moe-latent-size moe-shared-expert-intermediate-size
        moe-router-score-function moe-router-topk-scaling-factor moe-router-num-groups
        hybrid-override-pattern hybrid-layer-pattern hybrid-attention-ratio hybrid-mlp-ratio mamba-state-dim
        mamba-head-dim mamba-num-groups mamba-num-heads heterogeneous-layers-config-path padded-vocab-size
        no-rope-freq softmax-type glu-linear-offset activation-func-clamp-value experimental-attention-variant"""
)
"""Arguments that describe the student; megatron_arguments has them with ``_`` for ``-``."""

PATTERNS = ("moe-layer-freq", "no-rope-freq")
"""Those that may be a list, which is an entry for each layer."""

MODEL_SWITCHES: dict[str, tuple[str, Any]] = {
    "disable-bias-linear": ("add_bias_linear", False),
    "use-rotary-position-embeddings": ("position_embedding_type", "rope"),
    **{
        name: (name.replace("-", "_"), True)
        for name in _all(
            """group-query-attention swiglu squared-relu openai-gelu quick-geglu use-rope-scaling rotary-interleaved
        untie-embeddings-and-output-weights qk-layernorm qk-l2-norm add-qkv-bias apply-layernorm-1p
        apply-residual-connection-post-layernorm multi-latent-attention is-hybrid-model
        moe-router-pre-softmax moe-router-enable-expert-bias""",
            None,
        )
    },
}
"""The same for switches: the name and the value that each sets."""

MOVED: dict[str, str] = {
    "seed": "seed",
    "seq-length": "sequence_length",
    "micro-batch-size": "student.training_args.per_device_train_batch_size",
    "eval-micro-batch-size": "student.infer_batch_size",
    "lr": "student.training_args.learning_rate",
    "weight-decay": "student.training_args.weight_decay",
    "adam-beta1": "student.training_args.adam_beta1",
    "adam-beta2": "student.training_args.adam_beta2",
    "adam-eps": "student.training_args.adam_epsilon",
    "clip-grad": "max_grad_norm",
    "save": "output_dir",
    "save-interval": "save_steps",
    "persistent-save-interval": "save_steps",
    "log-interval": "logging_steps",
    "eval-interval": "eval_steps",
    "data-cache-path": "student.data_args.cache_path",
    "distributed-timeout-minutes": "student.backend_timeout",
    "wandb-exp-name": "exp_name",
    "export-kd-cfg": "distillation_config",
    "export-kd-distill-cfg": "distillation_config",
}
"""Arguments with a value of the same meaning in Limbeck."""

PARALLEL: dict[str, str] = {
    "tensor-model-parallel-size": "tensor_model_parallel_size",
    "pipeline-model-parallel-size": "pipeline_model_parallel_size",
    "context-parallel-size": "context_parallel_size",
    "sequence-parallel": "sequence_parallel",
}
"""Keys of ``strategy_config`` of both models, with every strategy."""

OF_MEGATRON: dict[str, str] = {
    "use-distributed-optimizer": SWITCH,
    "overlap-grad-reduce": SWITCH,
    "ddp-average-in-collective": SWITCH,
    "ddp-bucket-size": VALUE,
    "account-for-embedding-in-pipeline-split": SWITCH,
    "account-for-loss-in-pipeline-split": SWITCH,
    "decoder-first-pipeline-num-layers": VALUE,
    "decoder-last-pipeline-num-layers": VALUE,
    "expert-model-parallel-size": VALUE,
    "expert-tensor-parallel-size": VALUE,
    "moe-token-dispatcher-type": VALUE,
    "moe-grouped-gemm": SWITCH,
    "moe-router-dtype": VALUE,
    "recompute-granularity": VALUE,
    "recompute-method": VALUE,
    "recompute-num-layers": VALUE,
    "recompute-modules": VALUES,
    "transformer-impl": VALUE,
}
"""Keys of ``strategy_config.megatron`` of the student, which only Megatron's strategies read."""

OF_BOTH = ("transformer-impl",)
"""Those of ``OF_MEGATRON`` that the teacher gets too."""

OF_EXPERTS = (
    "expert-model-parallel-size",
    "expert-tensor-parallel-size",
    "moe-token-dispatcher-type",
    "moe-grouped-gemm",
    "moe-router-dtype",
)
"""Those that a teacher with experts gets too."""

OF_STAGES = ("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers")
"""Those that a teacher gets too whose layers can be divided so."""

_OTHER_KEYS = {
    "decoder-first-pipeline-num-layers": "num_layers_in_first_pipeline_stage",
    "decoder-last-pipeline-num-layers": "num_layers_in_last_pipeline_stage",
}


def megatron_key(flag: str) -> str:
    """The key of ``strategy_config.megatron`` for a flag of ``OF_MEGATRON``."""
    return _OTHER_KEYS.get(flag, flag.replace("-", "_"))


SPECIAL: dict[str, str] = {
    **_all(
        """export-kd-teacher-load export-kd-teacher-model-config export-model-type load pretrained-checkpoint ckpt-step
        tokenizer-type tokenizer-model vocab-size vocab-file merge-file yaml-cfg global-batch-size train-iters train-samples
        exit-interval exit-duration-in-mins lr-decay-style lr-decay-iters lr-decay-samples lr-warmup-fraction
        lr-warmup-iters lr-warmup-samples lr-warmup-init lr-wsd-decay-style lr-wsd-decay-iters
        lr-wsd-decay-samples min-lr split data-args-path per-split-data-args-path eval-iters tensorboard-dir
        wandb-project wandb-entity wandb-save-dir num-layers-per-virtual-pipeline-stage
        num-virtual-stages-per-pipeline-rank limbeck-strategy""",
        VALUE,
    ),
    **_all("no-load-optim no-load-rng use-checkpoint-opt-param-scheduler override-opt-param-scheduler", SWITCH),
    **_all("loss-scale-window hysteresis", VALUE),
    **_all("exit-on-missing-checkpoint grad-reduce-in-bf16 moe-layer-recompute trust-remote-code", SWITCH),
    **_all("data-path train-data-path valid-data-path test-data-path", VALUES),
    **_all("bf16 fp16 finetune use-checkpoint-args mock-data full-validation recompute-activations", SWITCH),
}
"""Arguments that ``megatron`` translates in code."""

IGNORED: dict[str, str] = {
    **_all(
        """export-te-mcore-model export-default-te-spec export-force-local-attention modelopt-enabled use-mcore-models
        no-save-optim no-save-rng auto-detect-ckpt-format
        use-dist-ckpt async-save ckpt-fully-parallel-save no-ckpt-fully-parallel-save ckpt-fully-parallel-load
        ckpt-assume-constant-structure use-persistent-ckpt-worker no-use-tokenizer-model-from-checkpoint-args
        use-mp-args-from-checkpoint-args
        overlap-param-gather overlap-param-gather-with-optimizer-step no-align-grad-reduce no-align-param-gather
        align-param-gather no-overlap-p2p-communication overlap-p2p-communication-warmup-flush use-flash-attn
        defer-embedding-wgrad-compute tp-comm-overlap disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs
        no-async-tensor-model-parallel-allreduce accumulate-allreduce-grads-in-fp32
        attention-softmax-in-fp32 apply-query-key-layer-scaling fp16-lm-cross-entropy
        no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion
        no-gradient-accumulation-fusion no-persist-layer-norm persist-layer-norm cross-entropy-loss-fusion
        distribute-saved-activations use-cpu-initialization init-model-with-meta-device te-rng-tracker
        deterministic-mode manual-gc no-manual-gc-eval exit-signal-handler calculate-per-token-loss
        no-check-for-nan-in-loss-and-grad check-for-spiky-loss check-for-large-grads no-mmap-bin-files
        no-create-attention-mask-in-dataloader log-params-norm log-num-zeros-in-grad log-throughput log-progress
        log-energy log-timers-to-tensorboard no-log-loss-scale-to-tensorboard log-loss-scale-to-tensorboard
        log-learning-rate-to-tensorboard log-batch-size-to-tensorboard log-validation-ppl-to-tensorboard
        log-memory-to-tensorboard log-world-size-to-tensorboard no-barrier-with-level-1-timing log-straggler
        profile use-pytorch-profiler record-memory-history disable-gloo-process-groups use-tp-pp-dp-mapping
        no-one-logger moe-permute-fusion moe-per-layer-logging disable-mamba-mem-eff-path
        no-position-embedding no-initialization data-parallel-random-init use-sharp use-nccl-ub test-mode
        use-precision-aware-optimizer enable-experimental disable-bf16-reduced-precision-matmul
        use-fused-weighted-squared-relu moe-shared-expert-overlap moe-pad-expert-input-to-capacity""",
        SWITCH,
    ),
    **_all(
        """attention-backend distributed-backend local-rank num-workers
        dataloader-type timing-log-level timing-log-option tensorboard-log-interval
        tensorboard-queue-size logging-level log-memory-interval cross-entropy-fusion-impl
        empty-unused-memory-level manual-gc-interval profile-step-start profile-step-end memory-snapshot-path
        num-dataset-builder-threads min-loss-scale
        ckpt-fully-parallel-load-exchange-algo dist-ckpt-format dist-ckpt-strictness async-strategy
        pipeline-model-parallel-comm-backend microbatch-group-size-per-virtual-pipeline-stage
        tp-comm-bootstrap-backend nccl-communicator-config-path num-distributed-optimizer-instances
        train-sync-interval check-weight-hash-across-dp-replicas-interval
        mid-level-dataset-surplus non-persistent-save-interval non-persistent-ckpt-type ddp-num-buckets
        rerun-mode error-injection-rate error-injection-type one-logger-project one-logger-run-name
        config-logger-dir sgd-momentum
        wgrad-deferral-limit sample-rate eval-global-batch-size tiktoken-pattern
        moe-token-drop-policy moe-router-bias-update-rate moe-router-group-topk window-attn-skip-freq linear-attention-freq
        kv-lora-rank q-lora-rank v-head-dim qk-head-dim qk-pos-emb-head-dim rotary-scaling-factor mscale mscale-all-dim""",
        VALUE,
    ),
    **_all("profile-ranks high-priority-stream-groups tiktoken-special-tokens cp-comm-type", VALUES),
}
"""Arguments without a meaning in Limbeck, where checkpoints are whole, formats are recognised and kernels are PyTorch's.

Some belong to another argument that Limbeck refuses, such as ``--multi-latent-attention`` or ``--window-size``.
"""

_LATER = "is not supported; remove it"
_PACKS = "is not supported: documents of a row attend to each other, as by default in Megatron-LM; remove it"
_FSDP = "is not supported; --limbeck-strategy fsdp2 shards with PyTorch's FSDP2"
_OFFLINE = "(cached logits of the teacher) is not supported; the teacher computes during the run, so remove it"
_SCALER = "is not supported: with --fp16 the scale of the loss begins at 65536; remove it, or train with --bf16"
_DATA = "is not supported; remove it and set student.data_args.file_name=FILE, which reads conversations and text"

_OTHER_MODELS = "describes GPT-OSS or Llama 4, which need a checkpoint of Hugging Face; --load that, and remove it"
_SPEC = "is not supported: layers of a GPT model need no --spec, and modules of your own are not run; remove it"

HYBRID_MODELS = ("MambaModel", "HybridModel")
"""Values of ``--export-model-type`` for hybrids of Mamba, attention and feed-forward layers."""

HYBRID_SPECS = (
    "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec",
    "megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec",
)
"""Values of ``--spec`` that name Megatron's own layers of hybrids."""

ONLY: dict[str, tuple[str, tuple[str, ...], str]] = {
    "optimizer": (VALUE, ("adam",), "is not supported; use adam, or set student.training_args.optimizer_name=NAME"),
    "attention-dropout": (VALUE, ("0",), "is not supported; set it to 0"),
    "hidden-dropout": (VALUE, ("0",), "is not supported; set it to 0"),
    "ckpt-format": (
        VALUE,
        ("torch_dist", "torch"),
        "is not supported; checkpoints of Megatron-LM are torch_dist or torch",
    ),
    "export-kd-teacher-ckpt-format": (
        VALUE,
        ("torch_dist", "torch"),
        "is not supported; checkpoints of Megatron-LM are torch_dist or torch",
    ),
    "vocab-extra-ids": (
        VALUE,
        ("0",),
        "adds tokens to the vocabulary, which is not supported; add them to the tokenizer",
    ),
    "weight-decay-incr-style": (VALUE, ("constant",), "is not supported; use constant"),
    "mtp-num-layers": (VALUE, ("0",), "(multi-token prediction) is not supported; remove it"),
    "moe-aux-loss-coeff": (
        VALUES,
        ("0",),
        "is not supported yet: the loss of a run has no term that balances experts, so set it to 0",
    ),
    "moe-z-loss-coeff": (VALUE, ("0",), "is not supported yet; set it to 0"),
    "moe-expert-capacity-factor": (VALUE, (), "(experts leave out tokens) is not supported; remove it"),
    "moe-router-load-balancing-type": (VALUES, ("none", "aux_loss"), "is not supported yet; use none"),
    "rl-default-temperature": (VALUE, (), "belongs to reinforcement learning; " + _LATER),
    "data-parallel-sharding-strategy": (VALUE, ("no_shard",), _FSDP),
    **_all(
        """decoupled-lr decoupled-min-lr start-weight-decay end-weight-decay fp8-format fp4-format""",
        (VALUE, (), _LATER),
    ),
    **_all(
        """step-batch-size-schedule start-eval-at-iter save-retain-interval warmup optimizer-offload-fraction
        loss-scale encoder-num-layers decoder-num-layers encoder-seq-length
        decoder-seq-length kitchen-config-file ckpt-convert-format ckpt-convert-save qad-train-target
        pipeline-model-parallel-layout""",
        (VALUE, (), _LATER),
    ),
    "initial-loss-scale": (VALUE, ("65536",), _SCALER),
    "fp32-residual-connection": (SWITCH, (), "is not supported: residuals have the data type of the model; remove it"),
    **_all(
        "main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype",
        (VALUE, ("fp32",), "is not supported: the optimizer and what it adds to are fp32; set it to fp32"),
    ),
    "iterations-to-skip": (VALUES, (), _LATER),
    "rampup-batch-size": (VALUES, (), "is not supported; give the final --global-batch-size"),
    "spec": (VALUES, HYBRID_SPECS, _SPEC),
    **dict.fromkeys(("reset-position-ids", "reset-attention-mask", "eod-mask-loss"), (SWITCH, (), _PACKS)),
    **dict.fromkeys(("use-torch-fsdp2", "use-custom-fsdp", "use-megatron-fsdp"), (SWITCH, (), _FSDP)),
    **dict.fromkeys(("logits-save-dir", "logits-load-dir", "logits-save-top-k"), (VALUE, (), _OFFLINE)),
    **dict.fromkeys(("finetune-hf-dataset", "finetune-data-split"), (VALUE, (), _DATA)),
    "sft": (SWITCH, (), _DATA),
    **_all(
        """optimizer-cpu-offload skip-train use-legacy-models freeze-all-layers freeze-base-for-mtp
        multiple-validation-sets decrease-batch-size-if-needed onnx-safe load-main-params-from-ckpt perform-rl-step
        export-kd-finalize init-method-xavier-uniform fim-data""",
        (SWITCH, (), _LATER),
    ),
    **_all("enable-gpt-oss export-qk-l2-norm export-moe-apply-probs-on-input", (SWITCH, (), _OTHER_MODELS)),
}
"""Arguments that would change the result: their kind, the values that Limbeck also has, and the end of the error for others."""

NEEDED: dict[str, tuple[str, ...]] = {
    "initial-loss-scale": ("fp16",),
    "fp32-residual-connection": ("bf16", "fp16"),
}
"""Arguments of ``ONLY`` that have no effect without one of these switches."""

LOSS_SCALE: dict[str, dict[str, int]] = {
    "loss-scale-window": {"megatron": 1000, "fsdp2": 2000},
    "hysteresis": {"megatron": 2, "fsdp2": 1},
}
"""Arguments of ``SPECIAL`` about the scale of the loss with fp16, to the only value that each strategy has."""

OF_RESUMED: dict[str, str] = {
    **_all(
        "no-load-optim no-load-rng",
        "cannot leave out a part of {}, which the run resumes from; remove {flag}, or give another --save, which starts at "
        "step 0 from the weights of --load",
    ),
    "use-checkpoint-opt-param-scheduler": "is not supported: a run that resumes from {} has the schedule of the command line; "
    "remove {flag}, and give the arguments of the schedule as before",
}
"""Arguments of ``SPECIAL`` about the checkpoint of a run that resumes, and the errors for them. Else they have no effect."""

OF_LOADED = ("use-checkpoint-args", "ckpt-step")
"""Arguments of ``SPECIAL`` about the checkpoint that starts the student. Without one they have no effect."""


def kinds() -> dict[str, str]:
    """Every flag, and whether it is a switch or has one value or several."""
    found = dict.fromkeys(MODEL_VALUES, VALUE) | dict.fromkeys(MODEL_SWITCHES, SWITCH) | dict.fromkeys(MOVED, VALUE)
    found |= dict.fromkeys(PARALLEL, VALUE) | {"sequence-parallel": SWITCH}
    found |= OF_MEGATRON | SPECIAL | IGNORED
    return found | {name: kind for name, (kind, _, _) in ONLY.items()}


def meaning(flag: str) -> str:
    """What becomes of a flag, for ``--help`` and the documentation."""
    if flag in MODEL_VALUES or flag in MODEL_SWITCHES:
        return "student.model_args.megatron_arguments"
    if flag in MOVED:
        return MOVED[flag]
    if flag in PARALLEL:
        return f"strategy_config.{PARALLEL[flag]} of both models"
    if flag in OF_BOTH:
        return f"strategy_config.megatron.{megatron_key(flag)} of both models"
    if flag in OF_EXPERTS:
        return f"strategy_config.megatron.{megatron_key(flag)} of the student, and of a teacher with experts"
    if flag in OF_STAGES:
        return f"strategy_config.megatron.{megatron_key(flag)} of the student, and of a teacher that can be divided so"
    if flag in OF_MEGATRON:
        return f"student.strategy_args.strategy_config.megatron.{megatron_key(flag)}"
    if flag in IGNORED:
        return "no effect"
    if flag in ONLY:
        allowed = ONLY[flag][1]
        meaning = f"only {' or '.join(allowed)}" if allowed else "refused"
        needed = " or ".join(f"--{name}" for name in NEEDED.get(flag, ()))
        return f"with {needed}: {meaning}; else no effect" if needed else meaning
    return SPECIAL_MEANING[flag]


SPECIAL_MEANING: dict[str, str] = {
    "export-kd-teacher-load": "teacher.model_args.model_name_or_path",
    "export-kd-teacher-model-config": "teacher.model_args.megatron_arguments",
    "export-model-type": "GPTModel; or MambaModel or HybridModel, whose layers are Mamba layers",
    "load": "student.model_args.model_name_or_path, or resume_from_checkpoint if it is --save",
    "pretrained-checkpoint": "student.model_args.model_name_or_path, if --load has no checkpoint",
    "ckpt-step": "the iteration or step of --load, or resume_from_checkpoint if that is --save",
    "tokenizer-type": "how --tokenizer-model or --vocab-file is read; see Tokenizers",
    "tokenizer-model": "tokenizer",
    **dict.fromkeys(("vocab-file", "merge-file"), "tokenizer: gpt2:VOCAB,MERGES with GPT2BPETokenizer"),
    "yaml-cfg": "a file of these arguments",
    "vocab-size": "tokenizer: null:N with NullTokenizer, else no effect",
    "global-batch-size": "student.training_args.gradient_accumulation_steps",
    **dict.fromkeys(("train-iters", "train-samples", "exit-interval"), "max_steps"),
    "exit-duration-in-mins": "checkpoint_config.save_before",
    **dict.fromkeys(
        ("lr-warmup-fraction", "lr-warmup-iters", "lr-warmup-samples"), "student.training_args.warmup_steps"
    ),
    **_all(
        """lr-decay-style lr-decay-iters lr-decay-samples lr-warmup-init lr-wsd-decay-style lr-wsd-decay-iters
        lr-wsd-decay-samples min-lr""",
        "student.training_args.lr_scheduler_kwargs of lr_scheduler_type: megatron",
    ),
    **dict.fromkeys(("data-path", "train-data-path", "data-args-path"), "student.data_args.sources"),
    **dict.fromkeys(
        ("split", "per-split-data-args-path", "mock-data"),
        "student.data_args.sources and validation.data_args.sources",
    ),
    "valid-data-path": "validation.data_args.sources",
    "test-data-path": "no effect",
    **dict.fromkeys(("eval-iters", "full-validation"), "max_samples of validation.data_args.sources"),
    "tensorboard-dir": "track_with: tensorboard, tracker_kwargs.log_dir",
    "wandb-project": "track_with: wandb, tracker_kwargs.project",
    "wandb-entity": "tracker_kwargs.entity",
    "wandb-save-dir": "tracker_kwargs.log_dir",
    **dict.fromkeys(
        ("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank"),
        "student.strategy_args.strategy_config.megatron.virtual_pipeline_model_parallel_size",
    ),
    "limbeck-strategy": "strategy_name of both models: megatron, or fsdp2",
    **dict.fromkeys(("bf16", "fp16"), "model_args.dtype of both models; fp32 without"),
    "finetune": "--load is not resumed; its weights start the student",
    "use-checkpoint-args": "arguments that describe the student are those of --load; no effect without one",
    "recompute-activations": "recompute-granularity selective",
    "moe-layer-recompute": "recompute-granularity selective, and moe in recompute-modules",
    "trust-remote-code": "model_args.trust_remote_code of both models; false without",
    **{
        flag: f"with --fp16: only {' or '.join(f'{value} ({name})' for name, value in values.items())}; else no effect"
        for flag, values in LOSS_SCALE.items()
    },
    **dict.fromkeys(OF_RESUMED, "an error when a run resumes; else no effect"),
    "override-opt-param-scheduler": "as always: a run that resumes has the schedule of the command line",
    "exit-on-missing-checkpoint": "an error if --load has no checkpoint",
    "grad-reduce-in-bf16": "with --bf16: strategy_config.reduce_dtype of the student; else no effect",
}
"""What becomes of the arguments in ``SPECIAL``."""

NEMO: dict[str, str] = {
    "encoder_seq_length": "seq_length",
    "num_moe_experts": "num_experts",
    "bias": "add_bias_linear",
    "layernorm_epsilon": "norm_epsilon",
    "rotary_percentage": "rotary_percent",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "scale_positional_embedding": "use_rope_scaling",
}
"""Keys of NeMo's ``model_config.yaml`` under another name than Megatron's argument."""

NEMO_ONLY: dict[str, tuple[Any, ...]] = {
    "headscale": (False,),
    "openai_gelu": (False,),
    "normalize_attention_scores": (True,),
    "transformer_block_type": ("pre_ln",),
    "attention_type": ("multihead",),
    "mcore_gpt": (True,),
    "pre_process": (True,),
    "post_process": (True,),
}
"""Keys of NeMo of which only these values describe a model that Limbeck has."""

NEMO_IGNORED = words(
    """micro_batch_size global_batch_size rampup_batch_size tensor_model_parallel_size
    pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
    sequence_parallel use_scaled_init_method hidden_dropout attention_dropout ffn_dropout
    apply_query_key_layer_scaling do_layer_norm_weight_decay persist_layer_norm overlap_p2p_comm batch_p2p_comm
    native_amp_init_scale native_amp_growth_interval hysteresis fp32_residual_connection fp16_lm_cross_entropy
    megatron_amp_O2 grad_allreduce_chunk_size_mb grad_div_ar_fusion gradient_accumulation_fusion
    bias_activation_fusion bias_dropout_add_fusion masked_softmax_fusion get_attention_mask_from_fusion
    apply_rope_fusion seed resume_from_checkpoint use_cpu_initialization onnx_safe apex_transformer_log_level
    gradient_as_bucket_view sync_batch_comm nccl_communicator_config_path activations_checkpoint_granularity
    activations_checkpoint_method activations_checkpoint_num_layers num_micro_batches_with_partial_activation_checkpoints
    activations_checkpoint_layers_per_pipeline transformer_engine fp8 fp8_e4m3 fp8_hybrid fp8_margin fp8_interval
    fp8_amax_history_len fp8_amax_compute_algo reduce_amax use_emha ub_tp_comm_overlap use_flash_attention data optim
    nsys_profile gc_interval target nemo_version restore_from_path activation_func_fp8_input_store
    attention_softmax_in_fp32 tp_comm_overlap cpu_offloading cpu_offloading_num_layers fsdp name
    no_masked_softmax_fusion"""
)
"""Keys of NeMo that do not describe the model. Nor do the names of ``IGNORED`` and other arguments of Megatron."""

NEMO_TOKENIZER = ("tokenizer", "tokenizer_type", "tokenizer_model")
"""Keys of the teacher's tokenizer, NeMo's and those of Megatron's arguments."""
