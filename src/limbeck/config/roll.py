"""The ROLL dialect: what a configuration written for ROLL's distillation pipeline says in the words of `schema`.

Mostly tables. A foreign key is moved, respelled, or dropped because it means nothing here and changes no result; what
would change a result and is not built is a contradiction, never silence. Files and defaults are not known here, and a
key that is in no table is left for the schema to accept or refuse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.config import deepspeed
from limbeck.config.deepspeed import words
from limbeck.config.mistakes import shown
from limbeck.config.schema import (
    Contradiction,
    DataArgs,
    DistillConfig,
    ModelArgs,
    StrategyConfig,
    StudentConfig,
    StudentModelArgs,
    TeacherConfig,
    TrainingArgs,
)

SECTIONS: dict[str, tuple[str, ...]] = {
    "run": ("",),
    "checkpoint_config": ("checkpoint_config",),
    "worker": ("student", "teacher"),
    "model_args": ("student.model_args", "teacher.model_args"),
    "data_args": ("student.data_args", "teacher.data_args", "validation.data_args"),
    "training_args": ("student.training_args", "teacher.training_args"),
    "strategy_args": ("student.strategy_args", "teacher.strategy_args"),
    "strategy_config": ("student.strategy_args.strategy_config", "teacher.strategy_args.strategy_config"),
}
"""Where each kind of section stands. The tables below are by kind."""

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
"""Keys that steer other machinery (rollouts, rewards, Ray, Megatron's memory): dropped whatever they say."""

_PARALLEL = (
    (None, 1),
    "is not built yet; take it out, and fsdp2_train spreads the same model over the same devices by sharding it",
)
_OFFLOAD = ((None, False), "(parameters or optimizer in CPU memory) is not built yet; set it to false")
_MOE = ((None, 0, 0.0), "changes the loss of mixture-of-experts models, which is not built yet; take it out")

ONLY_WHEN_OFF: dict[str, dict[str, tuple[tuple[object, ...], str]]] = {
    "run": {
        "model_download_type": (
            (None, "HUGGINGFACE_HUB"),
            "is not built yet; models come from folders or the Hugging Face hub, so download it and name its folder",
        ),
        "target_vocab_size": (
            (None,),
            "cannot be set; the vocabulary that teacher and student share is found from their tokenizer and heads",
        ),
    },
    "checkpoint_config": {
        "type": ((None, "file_system"), "is not built yet; use file_system"),
    },
    "worker": {
        "worker_cls": (
            (
                None,
                "roll.pipeline.distill.distill_worker.StudentWorker",
                "roll.pipeline.distill.distill_worker.TeacherWorker",
            ),
            "names worker code of your own, which is not run here; take it out",
        ),
        "max_concurrency": (
            (None, 1),
            "is not honoured: a worker answers one question at a time, in the order of asking; set it to 1",
        ),
        "router_replay": ((None, {}, {"mode": "disable"}), "is not built yet; set mode: disable"),
        "apply_loss_scale": (
            (None, True),
            "would weigh micro-batches by their number instead of by their tokens; the loss is always a mean over all "
            "supervised tokens of a step, so take it out",
        ),
        "mtp_training_mode": ((None, "disabled"), "(multi-token prediction) is not built yet; set it to disabled"),
    },
    "model_args": {
        "model_type": ((None, "causal_lm"), "is not built yet; only causal language models are distilled, so use ~"),
        "adapter_name_or_path": ((None,), "is not built yet; merge the adapter into the checkpoint and name that"),
        "moe_aux_loss_coef": _MOE,
        "autocast_adapter_dtype": ((None, True), "is not built yet; set it to true"),
    },
    "data_args": {
        "custom_data_kwargs_func": ((None,), "would run code of your own, which is not done here; take it out"),
    },
    "training_args": {
        "tf32": ((None, False), "is not built yet; take it out"),
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
        "offload_policy": _OFFLOAD,
        "optimizer_cpu_offload": _OFFLOAD,
        "optimizer_offload_fraction": ((None, 0, 0.0), _OFFLOAD[1]),
        "save_only_model": ((None, False), "would make resuming impossible and is not built yet; set it to false"),
        "save_merged_model": ((None, True), "is not built yet; adapters are always merged when saving, so take it out"),
        "fp8": ((None, False), "is not built yet; take it out"),
        "fp8_recipe": ((None,), "is not built yet; take it out"),
        "fp8_param": ((None, False), "is not built yet; take it out"),
        "optimizer": ((None, "adam", "adamw"), "is not built yet; the optimizer is AdamW, so take it out"),
        "additional_configs": ((None, {}), "passes settings to Megatron, which is not built yet; take it out"),
        "mtp_num_layers": ((None, 0), "(multi-token prediction) is not built yet; set it to 0"),
        "moe_aux_loss_coeff": _MOE,
        "moe_expert_capacity_factor": ((None,), "drops tokens of experts, which is not built yet; take it out"),
        "moe_pad_expert_input_to_capacity": ((None, False), "is not built yet; take it out"),
        "moe_token_drop_policy": ((None,), "drops tokens of experts, which is not built yet; take it out"),
        "moe_enable_routing_replay": ((None, False), "is not built yet; take it out"),
        "moe_router_dtype": ((None,), "is not built yet; take it out"),
        "lr_scheduler_kwargs": (
            (None, {}),
            "belongs to the schedule; write it as student.training_args.lr_scheduler_kwargs",
        ),
        "zero_optimization": (
            (None,),
            "belongs to DeepSpeed; set strategy_name: deepspeed_train beside it, or take it out",
        ),
    },
}
"""Keys that may change a result: dropped while they say what happens here anyway, refused with a sentence otherwise."""

_FSDP2 = "without the sizes in strategy_config: it trains the same model on the same devices by sharding it"

NOT_BUILT: dict[str, dict[str, dict[str, str]]] = {
    "strategy_args": {
        "strategy_name": {
            "megatron_train": f"use fsdp2_train, {_FSDP2}",
            "megatron_infer": f"use fsdp2_infer, {_FSDP2.replace('trains', 'runs')}",
            "vllm": "use fsdp2_infer or hf_infer, which give the whole distribution that distillation needs",
            "sglang": "use fsdp2_infer or hf_infer, which give the whole distribution that distillation needs",
            "mock_infer": "use hf_infer",
        }
    },
}
"""Values that ROLL knows and that are not built here, each with what to use instead."""

_DTYPES: dict[object, object] = {
    **dict.fromkeys(("float32", "float", "torch.float32", "torch.float"), "fp32"),
    **dict.fromkeys(("bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("float16", "half", "torch.float16", "torch.half"), "fp16"),
}

SPELLINGS: dict[str, dict[str, dict[object, object]]] = {
    "run": {
        "track_with": {"": "none", None: "none"},
        "max_steps": {-1: None},
        "save_steps": {-1: 0},
        "eval_steps": {-1: 0},
        "resume_from_checkpoint": {None: False, "": False},
        "logits_transfer_backend": {"nccl_only": "nccl-only", None: "auto"},
    },
    "model_args": {"dtype": _DTYPES, "attn_implementation": {"fa2": "flash_attention_2", None: "auto"}},
    "strategy_config": {
        "param_dtype": _DTYPES,
        "reduce_dtype": {**_DTYPES, None: "fp32"},
        "fsdp_size": {-1: None, 0: None, 1: None},
    },
}
"""Values that are written differently here."""

MOVED: dict[str, str] = {
    "student.training_args.max_grad_norm": "max_grad_norm",
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
"""Keys that stand elsewhere here."""

SAME_AS: dict[str, str] = {
    "student.training_args.seed": "seed",
    "student.training_args.output_dir": "output_dir",
    "student.training_args.max_steps": "max_steps",
}
"""Keys that ROLL fills from another one: dropped if they say the same, refused otherwise."""

TEMPLATES: dict[str, tuple[str, dict[str, Any]]] = {
    "native_nonthinking": ("native", {"enable_thinking": False}),
    "qwen3_nothink": ("qwen3", {"enable_thinking": False}),
}
"""Chat templates that are others under another name, with the values they set."""

UNREAD_BY_TEACHER: dict[str, Set[str]] = {
    "model_args": StudentModelArgs.model_fields.keys() - ModelArgs.model_fields.keys(),
    "data_args": DataArgs.model_fields.keys() | {"dataset_dir"},
    "training_args": TrainingArgs.model_fields.keys() | {"max_grad_norm", "seed", "output_dir", "max_steps"},
}
"""Keys of the student's sections that have no meaning in the teacher's."""

DEFAULT_PROMPT_LENGTH = 1024
"""What ROLL adds to a response_length that stands without a prompt_length."""

DEFINITIONS = ("deepspeed_zero", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_cpuoffload")
"""Top-level blocks that exist only so that `${deepspeed_zero3}` can point at them."""


@dataclass
class Translation:
    """A configuration in our words, and what became of the foreign ones (all by dotted key path).

    derived: our key -> the foreign key that it came from.
    ignored: foreign keys that mean nothing here.
    notices: sentences about what runs differently from what is written.
    """

    values: dict[str, Any]
    derived: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    contradictions: list[Contradiction] = field(default_factory=list)

    def refuse(self, path: str, sentence: str) -> None:
        self.contradictions.append(Contradiction(path, sentence))

    def put(self, path: str, value: object, derived_from: str) -> None:
        """Write our key ``path``, which the foreign key ``derived_from`` stands for."""
        section = self.values
        *parents, key = path.split(".")
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[key] = value
        self.derived[path] = derived_from


def translate(values: Mapping[str, Any]) -> Translation:
    """`values` (nested, as written) in the words of the schema."""
    result = Translation(copy.deepcopy(dict(values)))
    for name in DEFINITIONS:
        result.values.pop(name, None)
    _keep_only_the_files_of_validation(result)
    _refuse_what_is_not_built(result)
    _respell(result)
    _translate_deepspeed(result)
    _drop_precision_flags(result)
    _keep_the_column_of_domains(result)
    _drop_what_means_nothing(result)
    _move(result)
    _drop_repetitions(result)
    _sum_lengths(result)
    _join_dataset_dir(result)
    _rename_template(result)
    _drop_what_the_teacher_does_not_read(result)
    return result


def _section(result: Translation, path: str) -> dict[str, Any] | None:
    """The section at `path`, or None if there is none."""
    section: Any = result.values
    for part in path.split(".") if path else ():
        section = section.get(part) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


def _sections(result: Translation, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The path, with its dot, and the content of every section of a kind that is there."""
    for path in SECTIONS[kind]:
        section = _section(result, path)
        if section is not None:
            yield f"{path}." if path else "", section


def _pop(result: Translation, path: str) -> Any:
    """Take out the value at `path`; None if there is none."""
    parent, _, key = path.rpartition(".")
    section = _section(result, parent)
    return None if section is None else section.pop(key, None)


def _ignore(result: Translation, path: str, keys: Set[str]) -> None:
    """Drop those of `keys` that stand in the section at `path`."""
    section = _section(result, path) or {}
    for key in [key for key in section if key in keys]:
        del section[key]
        result.ignored.append(f"{path}.{key}" if path else key)


def _keep_only_the_files_of_validation(result: Translation) -> None:
    for path, kept in (("validation", "data_args"), ("validation.data_args", "file_name")):
        _ignore(result, path, (_section(result, path) or {}).keys() - {kept})


def _refuse_what_is_not_built(result: Translation) -> None:
    for kind, keys in NOT_BUILT.items():
        for path, section in _sections(result, kind):
            for key, instead in keys.items():
                value = section.get(key)
                if isinstance(value, str) and value in instead:
                    result.refuse(f"{path}{key}", f"= {shown(value)} is not built yet; {instead[value]}")
                    # What belongs to the refused value would only add noise to this sentence.
                    del section[key]
                    section.pop("strategy_config", None)


def _respell(result: Translation) -> None:
    for kind, keys in SPELLINGS.items():
        for _, section in _sections(result, kind):
            for key, spellings in keys.items():
                if key in section and isinstance(section[key], (str, int, type(None))):
                    for foreign, ours in spellings.items():
                        if type(foreign) is type(section[key]) and foreign == section[key]:
                            section[key] = ours
                            break


def _translate_deepspeed(result: Translation) -> None:
    """Gather DeepSpeed's keys in strategy_config under one key of ours; without sharding, no DeepSpeed is needed."""
    for path, section in _sections(result, "strategy_args"):
        name = section.get("strategy_name")
        given = section.get("strategy_config") or {}
        if name not in ("deepspeed_train", "deepspeed_infer") or not isinstance(given, dict):
            continue
        config, beside = f"{path}strategy_config", given.get("deepspeed") or {}
        if not isinstance(beside, dict):
            continue
        ours = {key: value for key, value in given.items() if key in StrategyConfig.model_fields and key != "deepspeed"}
        foreign = {key: value for key, value in given.items() if key not in StrategyConfig.model_fields}
        dtype = _dtype(result, path.partition(".")[0])
        result.contradictions.extend(deepspeed.contradictions(foreign, config, dtype))
        result.contradictions.extend(deepspeed.contradictions(beside, f"{config}.deepspeed", dtype))
        block = {**foreign, **beside}
        section["strategy_config"] = ours
        stage = deepspeed.stage_of(block)
        if stage == 3 or (stage > 0 and name == "deepspeed_train"):
            passed = deepspeed.passed_on(block)
            if foreign:
                result.put(f"{config}.deepspeed", passed, config)
            else:
                ours["deepspeed"] = passed
            continue
        # What ZeRO does not shard is a whole copy on every rank, which needs nothing of DeepSpeed.
        if name == "deepspeed_train":
            section["strategy_name"] = "fsdp2_train"
            result.put(f"{config}.replicate", True, config)
        else:
            section["strategy_name"] = "hf_infer"
        result.notices.append(
            f"{path}strategy_name = {name} with ZeRO stage {stage} keeps a whole copy on every rank; it runs as "
            f"{section['strategy_name']}, with the same mathematics."
        )


def _drop_precision_flags(result: Translation) -> None:
    for kind in ("training_args", "strategy_config"):
        for path, section in _sections(result, kind):
            role = path.partition(".")[0]
            dtype = _dtype(result, role)
            for key in ("bf16", "fp16"):
                if section.pop(key, None) is True and dtype != key:
                    result.refuse(
                        f"{path}{key}", f"= true contradicts {role}.model_args.dtype = {dtype}; keep the latter only"
                    )


def _dtype(result: Translation, role: str) -> object:
    return (_section(result, f"{role}.model_args") or {}).get("dtype", ModelArgs.model_fields["dtype"].default)


def _drop_what_means_nothing(result: Translation) -> None:
    for kind in SECTIONS:
        for path, section in _sections(result, kind):
            for key in list(section):
                if key in NO_MEANING.get(kind, ()):
                    del section[key]
                    result.ignored.append(f"{path}{key}")
                elif key in ONLY_WHEN_OFF.get(kind, {}):
                    value = section.pop(key)
                    harmless, sentence = ONLY_WHEN_OFF[kind][key]
                    if not any(type(value) is type(off) and value == off for off in harmless):
                        result.refuse(f"{path}{key}", f"= {shown(value)} {sentence}")


def _move(result: Translation) -> None:
    for foreign, ours in MOVED.items():
        value = _pop(result, foreign)
        if value is None:
            continue
        parent, _, key = ours.rpartition(".")
        present = (_section(result, parent) or {}).get(key)
        if present is None:
            result.put(ours, value, foreign)
        elif present != value:
            result.refuse(foreign, f"= {shown(value)} contradicts {ours} = {shown(present)}; keep the latter only")


def _drop_repetitions(result: Translation) -> None:
    for foreign, ours in SAME_AS.items():
        value = _pop(result, foreign)
        meant = result.values.get(ours, DistillConfig.model_fields[ours].default)
        if value not in (None, -1, meant):
            result.refuse(
                foreign, f"= {shown(value)} contradicts {ours} = {shown(meant)}; give only {ours}, at the top level"
            )


def _sum_lengths(result: Translation) -> None:
    prompt, response = _pop(result, "prompt_length"), _pop(result, "response_length")
    if result.values.get("sequence_length") is not None or response is None:
        given = (("prompt_length", prompt), ("response_length", response))
        result.ignored.extend(key for key, length in given if length is not None)
        return
    prompt = DEFAULT_PROMPT_LENGTH if prompt is None else prompt
    if type(prompt) is int and type(response) is int:
        result.put("sequence_length", prompt + response, "prompt_length + response_length")
    else:
        result.refuse("response_length", f"= {response} and prompt_length = {prompt} must be whole numbers of tokens")


def _keep_the_column_of_domains(result: Translation) -> None:
    """ROLL's `tag` names the column of the domains, which matters only where domains are mixed."""
    data_args = _section(result, "student.data_args") or {}
    if (
        data_args.get("domain_interleave_probs")
        and "domain_key" not in data_args
        and isinstance(data_args.get("tag"), str)
    ):
        result.put("student.data_args.domain_key", _pop(result, "student.data_args.tag"), "student.data_args.tag")


def _join_dataset_dir(result: Translation) -> None:
    folder = _pop(result, "student.data_args.dataset_dir")
    data_args = _section(result, "student.data_args") or {}
    for key in ("file_name", "eval_file_name"):
        files = data_args.get(key)
        files = [files] if isinstance(files, str) else files
        if isinstance(folder, str) and isinstance(files, list) and all(isinstance(file, str) for file in files):
            joined = [str(Path(folder) / file) for file in files]
            result.put(f"student.data_args.{key}", joined, "student.data_args.dataset_dir")


def _rename_template(result: Translation) -> None:
    data_args = _section(result, "student.data_args") or {}
    name = data_args.get("template")
    if name == "longCOT_qwen2.5" and data_args.get("default_system") is None:
        result.notices.append(
            "student.data_args.template: longCOT_qwen2.5 asks for that recipe's format in a system message of Limbeck's own "
            "wording; set student.data_args.default_system to reproduce another wording exactly."
        )
    if isinstance(name, str) and name in TEMPLATES:
        data_args["template"], kwargs = TEMPLATES[name]
        if kwargs and isinstance(given := data_args.get("template_kwargs") or {}, dict):
            result.put("student.data_args.template_kwargs", {**kwargs, **given}, "student.data_args.template")


def _drop_what_the_teacher_does_not_read(result: Translation) -> None:
    """The teacher reads the student's batches and is not trained, so ROLL's keys for that mean nothing to it."""
    teacher = _section(result, "teacher") or {}
    for part, keys in UNREAD_BY_TEACHER.items():
        _ignore(result, f"teacher.{part}", keys)
        if part not in TeacherConfig.model_fields and not teacher.get(part, True):
            del teacher[part]
    sections = UNREAD_BY_TEACHER.keys()
    _ignore(result, "teacher", StudentConfig.model_fields.keys() - TeacherConfig.model_fields.keys() - sections)
