"""The dialect of NeMo-RL's on-policy distillation, and of the fork that also trains on answers of the data.

A key of ``nemo_rl_table.py`` is moved, translated here, ignored because it does not change a result, or refused because it
would. Any other key is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from limbeck.config.dialects.base import Source
from limbeck.config.dialects.nemo_rl_data import Datasets, environment_of, read_datasets, translate_data
from limbeck.config.dialects.nemo_rl_file import NemoRlFile
from limbeck.config.dialects.nemo_rl_spellings import ignore_once
from limbeck.config.dialects.nemo_rl_steps import put_steps, translate_batches, translate_schedule
from limbeck.config.dialects.nemo_rl_table import MOVED, READ
from limbeck.config.locations import SourceLocation, find_location
from limbeck.config.schema import TRACKER_KWARGS
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value
from limbeck.errors import LimbeckError
from limbeck.registry import ENVIRONMENTS, GENERATORS

_KL = {"forward": "forward_kl", "reverse": "reverse_kl", "mixed": "mixed_kl"}
_METRICS = {
    "val_loss": "val/loss",
    "val:avg_length": "val/mean_length",
    "val:mean_gen_tokens_per_sample": "val/mean_length",
    "val:truncation_rate": "val/truncated_share",
    "train:grad_norm": "student/grad_norm",
    "train:lr": "student/lr",
    "train:total_num_tokens": "train/tokens",
    "train:global_valid_toks": "train/supervised_tokens",
    "train:tokens_per_sec_per_gpu": "train/tokens_per_second",
    "train:mean_gen_tokens_per_sample": "rollout/mean_length",
    "train:max_gen_tokens_per_sample": "rollout/max_length",
    "train:truncation_rate": "rollout/truncated_share",
    "train:mean_total_reward": "rollout/reward",
}
"""Metrics that have another name here; the others keep theirs."""

_NOT_MEASURED = {
    "train:natural_termination_rate": "train:truncation_rate with higher_is_better: false",
    "train:max_turns_reached_rate": "train:truncation_rate",
    "train:total_turns": "train:total_num_tokens",
    "train:avg_turns_per_sample": "train:mean_gen_tokens_per_sample",
    "train:max_turns_per_sample": "train:max_gen_tokens_per_sample",
    "train:mean_prompt_length": "train:mean_gen_tokens_per_sample",
    "train:mean_total_tokens_per_sample": "train:mean_gen_tokens_per_sample",
    "train:mean_env_tokens_per_sample": "train:mean_gen_tokens_per_sample",
    "train:global_valid_seqs": "train:global_valid_toks",
    "train:num_valid_samples": "train:global_valid_toks",
    "train:train_fp_utilization": "train:tokens_per_sec_per_gpu",
    "train:wd": "train:lr",
}
"""Metrics of NeMo-RL that Limbeck does not have, and the nearest one that it has."""

_GROUPS = ("train/", "val/", "student/", "rollout/", "time/", "system/")
_CHECKED = ("val/accuracy", "val/mean_length", "val/truncated_share", "rollout/reward")
"""Metrics that need an environment: rewards, and those of answers that the student writes in validation."""


class NemoRlDialect:
    """A YAML file of NeMo-RL's ``run_distillation.py``."""

    name = "nemo_rl"
    system = "NeMo-RL"

    def recognises(self, source: Source) -> bool:
        """Whether the file has the sections of a distillation and of a model in NeMo-RL's form."""
        if not isinstance(source, Mapping) or not isinstance(source.get("distillation"), Mapping):
            return False
        models = (source.get(role) for role in ("policy", "student", "teacher"))
        return any(isinstance(model, Mapping) and "model_name" in model for model in models)

    def translate(self, source: Source, locations: dict[str, SourceLocation]) -> Translation:
        if not isinstance(source, Mapping):
            raise LimbeckError("the dialect nemo_rl reads YAML files, not arguments; use --dialect with another name.")
        if source.get("teachers"):
            where = find_location("teachers", locations) or "arguments"
            raise LimbeckError(
                f"{where}: teachers: off-policy distillation from several teachers or other tokenizers is not supported in "
                "NeMo-RL's form; write a file of Limbeck with cross_tokenizer."
            )
        file = NemoRlFile(source, locations)
        file.check()
        _translate_models(file)
        _translate_objective(file)
        datasets = read_datasets(file.result, file.section("data"), locations)
        _translate_generation(file, datasets)
        translate_data(file.result, datasets, locations)
        updates = translate_batches(file)
        translate_schedule(file, updates)
        _translate_checkpoints(file, updates)
        _translate_trackers(file)
        if file.result.get("validation.data_args.sources") is None:
            file.result.pop("validation")
        elif file.result.get("rollout.environment") and file.result.get("validation.rollout") is None:
            file.put("validation.rollout.num_generations", 1, "data")  # NeMo-RL validates by writing only
        return file.result


DIALECT = NemoRlDialect()


def _translate_models(file: NemoRlFile) -> None:
    world = _place(file)
    file.put("teacher_pretrain", *file.one_of("teacher.model_name", "distillation.teacher_model_path"))
    if "teacher" not in file.source:
        for path, target in MOVED.items():
            if path.startswith(("policy.dtensor_cfg.", "policy.precision")) and target.startswith("student."):
                file.put(target.replace("student.", "teacher.", 1), file.get(path), path)
    roles = ("policy", "teacher") if "teacher" in file.source else ("policy",)
    for role in roles:
        if file.section(f"{role}.dtensor_cfg").get("enabled") is False and not file.is_enabled(f"{role}.megatron_cfg"):
            file.refuse(f"{role}.dtensor_cfg.enabled", "= false leaves no backend; set it to true")
        if world > 1:
            ours, suffix = ("student", "train") if role == "policy" else ("teacher", "infer")
            file.put(f"{ours}.strategy_args.strategy_name", f"fsdp2_{suffix}", f"{role}.dtensor_cfg")
        _translate_replicas(file, role, world)
    recompute = file.get("policy.dtensor_cfg.activation_checkpointing")
    if recompute is not None:
        path = "policy.dtensor_cfg.activation_checkpointing"
        file.put("student.model_args.disable_gradient_checkpointing", not recompute, path)
    _translate_tokenizer(file)
    _translate_lora(file)


def _translate_replicas(file: NemoRlFile, role: str, world: int) -> None:
    """Copies of the model become the number of ranks that share one of them, which includes context parallel ranks."""
    path = f"{role}.dtensor_cfg.dp_replicate_size"
    copies = file.whole(path)
    tp, cp = (file.whole(f"{role}.dtensor_cfg.{key}_parallel_size") for key in ("tensor", "context"))
    data = world // (tp * cp)  # a remainder is an error elsewhere
    if copies == 1 or file.wrong:
        return
    if data % copies or data <= copies:
        file.refuse(
            path, f"= {copies} must divide the {data} data parallel ranks and be less, so that two or more share a copy"
        )
        return
    for ours in ("student", "teacher") if "teacher" not in file.source else ("student" if role == "policy" else role,):
        file.put(f"{ours}.strategy_args.strategy_config.fsdp_size", data // copies * cp, path)


def _place(file: NemoRlFile) -> int:
    """Set the devices of the training, and those of the generation if it has its own. Returns the number of ranks."""
    if file.get("cluster.gpus_per_node") is None:
        file.refuse("cluster.gpus_per_node", "is not set; set it to the number of devices of a machine")
        file.wrong.add("cluster.gpus_per_node")
    world, own = file.num_ranks, file.generation_devices
    file.put("student.device_mapping", list(range(world)), "cluster.gpus_per_node")
    path = "policy.generation.colocated"
    apart = file.section(path).get("enabled") is False
    if apart and max(file.whole("cluster.num_nodes"), file.whole(f"{path}.resources.num_nodes")) > 1:
        file.refuse(
            f"{path}.enabled",
            "= false is only supported on one machine: a generator on machines of its own is not there yet; set it to true",
        )
    elif own:
        file.put("rollout.device_mapping", list(range(world, world + own)), f"{path}.resources.gpus_per_node")
    elif apart:
        file.refuse(
            f"{path}.resources.gpus_per_node",
            f"= {format_value(file.get(f'{path}.resources.gpus_per_node'))} must be the number of devices for the generation, "
            "fewer than cluster.gpus_per_node, because colocated.enabled = false",
        )
    return world


def _translate_tokenizer(file: NemoRlFile) -> None:
    tokenizer = file.get("policy.tokenizer")
    name = tokenizer if isinstance(tokenizer, str) else file.section("policy.tokenizer").get("name")
    if name != file.get("policy.model_name"):
        file.put("tokenizer", name, "policy.tokenizer")
    if "chat_template" in file.section("policy.tokenizer"):
        template = file.get("policy.tokenizer.chat_template")
        spelled = {None: "empty", "default": "native"}.get(template, template)
        file.put("student.data_args.template", spelled, "policy.tokenizer.chat_template")


def _translate_lora(file: NemoRlFile) -> None:
    path = "policy.dtensor_cfg.lora_cfg"
    if file.is_enabled(path):
        lora = file.section(path)
        target = "all-linear" if lora.get("match_all_linear") else lora.get("target_modules")
        file.put("student.model_args.lora_target", target, path)
        for key in ("dim", "alpha", "dropout"):
            file.put(f"student.model_args.lora_{'rank' if key == 'dim' else key}", lora.get(key), f"{path}.{key}")


def _translate_objective(file: NemoRlFile) -> None:
    where = "loss_fn" if "loss_fn" in file.source else "distillation"
    file.put("objective_preset", "nemo_rl", where)
    kind, path = file.one_of("loss_fn.kl_type", "distillation.kl_type")
    if kind is not None and kind not in _KL:
        file.refuse(path, f"= {format_value(kind)} is not one of {', '.join(_KL)}")
    elif kind is not None:
        file.put("kd_objective", _KL[kind], path)
    weight, path = file.one_of("loss_fn.mixed_kl_weight", "distillation.mixed_kl_weight")
    if kind in (None, "mixed") and weight is not None:
        file.put("kd_objective_kwargs", {"forward": weight}, path)
    elif weight is not None:
        ignore_once(file.result, path)
    only_topk, path = file.one_of("loss_fn.zero_outside_topk", "distillation.zero_outside_topk")
    if only_topk is not None:
        file.put("logits_topk_tail", "zero" if only_topk else "renormalize", path)
    if file.get("policy.generation.temperature") != 0:  # the distribution that is sampled is the one that is compared
        file.put("kd_temperature", file.get("policy.generation.temperature"), "policy.generation.temperature")


def _translate_generation(file: NemoRlFile, datasets: Datasets) -> None:
    _translate_lengths(file)
    if file.result.section("rollout") is None:
        file.put("rollout.on_policy_fraction", 1.0, "distillation")
    _translate_environment(file, datasets)
    backend = file.get("policy.generation.backend")
    if backend is None:
        return
    if backend not in ("vllm", "hf"):
        file.refuse("policy.generation.backend", f"= {format_value(backend)} is not supported; use vllm, or hf")
        return
    path = "policy.generation.backend"
    if backend not in GENERATORS:
        file.result.notices.append(f"{file.written(path)}: the generator {backend} is not built in; hf is used.")
        backend = "hf"
    file.put("rollout.generator", backend, path)
    if backend == "vllm":
        engine = {key: file.get(f"policy.generation.vllm_cfg.{key}") for key in READ["policy.generation.vllm_cfg"]}
        if engine.get("kv_cache_dtype") == "auto":
            del engine["kv_cache_dtype"]
        if not file.generation_devices and engine.pop("tensor_parallel_size", None) not in (None, 1):
            file.result.ignored.append("policy.generation.vllm_cfg.tensor_parallel_size")  # an engine on every rank
        given = {key: value for key, value in sorted(engine.items()) if value is not None}
        file.put(
            "rollout.generator_kwargs",
            {**given, **file.section("policy.generation.vllm_kwargs")},
            "policy.generation.vllm_cfg",
        )


def _translate_lengths(file: NemoRlFile) -> None:
    """``max_length`` sets both limits, or the other one beside one that is set in the same place: the file, or the command
    line, which has precedence.
    """
    ours = "distillation.max_length"
    limits = {
        "sequence_length": "policy.max_total_sequence_length",
        "rollout.max_new_tokens": "policy.generation.max_new_tokens",
    }
    given = {target: path for target, path in limits.items() if file.get(path) is not None}
    overrides = {target: path for target, path in given.items() if file.is_override(path)}
    beside = overrides if file.is_override(ours) else given
    if len(beside) == len(limits) and file.get(ours) not in map(file.get, beside.values()):
        file.one_of(max(beside.values(), key=file.is_override), ours)
    for target, path in limits.items():
        if target not in given:
            file.put(target, file.get(ours), ours)
        elif target not in beside:
            file.put(target, *file.one_of(path, ours))


def _translate_environment(file: NemoRlFile, datasets: Datasets) -> None:
    """The environment that the datasets name, or the first one of ``env``."""
    given = [name for name in file.section("env") if name in ENVIRONMENTS]
    found = environment_of(file.result, datasets)
    if found is None and "env" not in file.source:
        return
    name, path = found or ((given or ["math"])[0], "env")
    if name not in ENVIRONMENTS:
        file.refuse(path, f"= {name} {ENVIRONMENTS.explain_unknown(name)}, or let a file of plugins register it")
        name = "math"  # so that its other keys are checked
    file.put("rollout.environment", name, path)
    if name != "math":  # whose arguments have other names here
        file.put("rollout.environment_kwargs", dict(file.section(f"env.{name}")), f"env.{name}")
    file.result.ignored += [f"env.{other}" for other in given if other != name]


def _translate_checkpoints(file: NemoRlFile, updates: int) -> None:
    periods = ("checkpointing.save_period", "distillation.save_steps")
    enabled = file.section("checkpointing").get("enabled") is not False
    if not enabled or ("checkpointing" not in file.source and file.get(periods[1]) is None):
        file.put("save_steps", 0, "checkpointing")
        if file.get(periods[1]) is not None:
            ignore_once(file.result, periods[1])
    else:
        put_steps(file, "save_steps", updates, *periods)
        file.put("resume_from_checkpoint", True, "checkpointing")  # as NeMo-RL does
        _translate_time_limit(file)
    metric, path = file.get("checkpointing.metric_name"), "checkpointing.metric_name"
    keep, latest = file.get("checkpointing.keep_top_k"), file.get("checkpointing.ft_keep_latest_k")
    validates = file.result.get("validation.data_args.sources") is not None
    kind, _, name = str(metric).partition(":")
    if metric is not None and metric not in _METRICS and (kind not in ("val", "train") or not name):
        file.refuse(path, f"= {format_value(metric)} must be val: or train: and the name of a metric, or null")
        return
    if metric in _NOT_MEASURED:
        file.refuse(path, f"= {metric} is not measured in Limbeck; the nearest metric is {_NOT_MEASURED[metric]}")
        return
    if metric is None or (str(metric).startswith("val") and not validates):
        file.result.put("checkpoint_config.best_metric", None, file.written("checkpointing"))
        file.put("max_ckpt_to_keep", keep, "checkpointing.keep_top_k")
        return
    ours = _METRICS.get(metric, name if name.startswith(_GROUPS) else f"{kind}/{name}")
    if ours in _CHECKED and file.result.get("rollout.environment") is None:
        file.refuse(path, f"= {metric} needs an environment, which checks answers; add env: {{math: {{}}}}")
    file.put("checkpoint_config.best_metric", ours, path)
    higher = file.get("checkpointing.higher_is_better")
    if higher is None and "higher_is_better" in file.section("checkpointing"):
        file.refuse("checkpointing.higher_is_better", "= null is not true or false")
    file.put("checkpoint_config.best_mode", "min" if higher is False else "max", "checkpointing.higher_is_better")
    file.put("checkpoint_config.keep_best", keep, "checkpointing.keep_top_k")
    if keep is not None:  # the best ones, and the newest to resume from
        file.put("max_ckpt_to_keep", latest or 1, "checkpointing.keep_top_k")


def _translate_time_limit(file: NemoRlFile) -> None:
    """Days, hours, minutes and seconds become hours and minutes, rounded down."""
    path = "checkpointing.checkpoint_must_save_by"
    limit = file.get(path)
    if limit is None:
        return
    parts = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", str(limit))
    days, hours, minutes, seconds = map(int, parts.groups()) if parts else (0, 0, 0, 0)
    minutes += 60 * (24 * days + hours) + seconds // 60
    if minutes:
        file.put("checkpoint_config.save_before", f"{minutes // 60:02}:{minutes % 60:02}", path)
    else:
        file.refuse(path, f"= {format_value(limit)} must be a time of a minute or more, as DD:HH:MM:SS in quotes")


def _translate_trackers(file: NemoRlFile) -> None:
    if "logger" not in file.source:
        return
    names = [name for name in ("tensorboard", "wandb", "mlflow", "swanlab") if file.get(f"logger.{name}_enabled")]
    if len(names) > 1:
        file.put("track_with", names, "logger")
    else:
        file.put("track_with", names[0] if names else "none", f"logger.{names[0]}_enabled" if names else "logger")
    for name in names:
        target = f"tracker_kwargs.{name}" if len(names) > 1 else "tracker_kwargs"
        if name == "tensorboard":
            if file.get("logger.log_dir") is not None:
                file.put(f"{target}.log_dir", f"{file.get('logger.log_dir')}/tensorboard", "logger.log_dir")
            continue
        given = file.section(f"logger.{name}")
        kept = {key: value for key, value in given.items() if key in TRACKER_KWARGS[name]}
        file.put(target, kept, f"logger.{name}")
        file.result.ignored += [f"logger.{name}.{key}" for key in given if key not in kept]
