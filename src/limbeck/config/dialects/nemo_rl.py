"""The dialect of NeMo-RL's on-policy distillation, and of the fork that also trains on answers of the data.

A key of ``nemo_rl_table.py`` is moved, translated here, ignored because it does not change a result, or refused because it
would. Any other key is an error.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.config.dialects.base import Source
from limbeck.config.dialects.nemo_rl_data import translate_data
from limbeck.config.dialects.nemo_rl_table import (
    DISABLED_BY,
    FIXED,
    MOVED,
    NO_MEANING,
    PENDING,
    READ,
    TEACHER_READS,
    Fixed,
)
from limbeck.config.locations import SourceLocation
from limbeck.config.schema import DistillConfig, walk_keys
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value
from limbeck.errors import LimbeckError
from limbeck.registry import GENERATORS, TRACKERS

_PYTORCH_SCHEDULES = "torch.optim.lr_scheduler."
_STEP_KEYS = ("eval_steps", "save_steps")
_KL = {"forward": "forward_kl", "reverse": "reverse_kl", "mixed": "mixed_kl"}
_METRICS = {"val:accuracy": "val/accuracy", "val_loss": "val/loss"}


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
        return _Run(source, locations).translation()


DIALECT = NemoRlDialect()


class _Run:
    """One file during its translation. Paths of the file are written with ``policy`` for the student's section."""

    def __init__(self, source: Mapping[str, Any], locations: Mapping[str, SourceLocation]) -> None:
        self.source, self.locations = source, locations
        self.student = "student" if "student" in source and "policy" not in source else "policy"
        self.result = Translation({})

    def translation(self) -> Translation:
        result = self.result
        if "student" in self.source and "policy" in self.source:
            result.refuse("student", "and policy are both sections of the student; keep one")
        self._check("", self.source)
        for path, target in MOVED.items():
            self._put(target, self.get(path), path)
        self._translate_models()
        self._translate_objective()
        self._translate_generation()
        translate_data(result, self.section("data"), self.locations)
        updates = self._translate_batches()
        self._translate_schedule(updates)
        self._translate_checkpoints(updates)
        self._translate_trackers()
        if result.get("validation.data_args.sources") is None:
            result.pop("validation")
        _hold_back_pending(result)
        return result

    def get(self, path: str) -> Any:
        """The value at ``path``, or None."""
        value: Any = self.source
        for part in self.written(path).split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def section(self, path: str) -> Mapping[str, Any]:
        """The section at ``path``; empty if there is none."""
        value = self.get(path)
        return value if isinstance(value, Mapping) else {}

    def written(self, path: str) -> str:
        """``path`` as the file writes it."""
        head, dot, rest = path.partition(".")
        return f"{self.student if head == 'policy' else head}{dot}{rest}"

    def refuse(self, path: str, sentence: str) -> None:
        self.result.refuse(self.written(path), sentence)

    def _put(self, target: str, value: Any, path: str) -> None:
        if value is not None:
            self.result.put(target, value, self.written(path))

    def _whole(self, path: str, default: int = 1) -> int:
        """A number of at least 1, for arithmetic; ``default`` if it is unset or wrong."""
        value = self.get(path)
        if value is None:
            return default
        if type(value) is not int or value < 1:
            self.refuse(path, f"= {format_value(value)} must be a whole number of at least 1")
            return default
        return value

    def _enabled(self, path: str) -> bool:
        return self.section(path).get("enabled") is True

    # Keys that are unknown, ignored or fixed

    def _check(self, path: str, section: Mapping[str, Any]) -> None:
        """Report unknown keys and values that are not supported, and collect the keys without effect."""
        table = path
        if path.startswith("data."):
            table = "dataset"
        elif path.partition(".")[0] in ("student", "teacher"):
            table = ".".join(["policy", *path.split(".")[1:]])
        fixed, ignored = FIXED.get(table, {}), NO_MEANING.get(table, frozenset())
        known = {*READ.get(table, ()), *fixed, *ignored, *_moved_keys(table)}
        for key, value in section.items():
            inner, kind = f"{path}.{key}" if path else key, f"{table}.{key}" if table else key
            if key in fixed:
                self._check_fixed(inner, value, fixed[key])
            elif key in ignored or (path == "teacher" and key in known and key not in TEACHER_READS):
                self.result.ignored.append(inner)
            elif kind in DISABLED_BY:
                self._check_switched(inner, value, kind)
            elif key in known:
                self._check_inner(inner, value, kind)
            elif path:
                self.result.refuse(inner, f"is not a key of NeMo-RL's distillation{_nearest(key, known)}")
            elif near := _nearest(key, known):
                self.result.refuse(inner, f"is not a section of NeMo-RL's distillation{near}")
            else:  # a variable, if a ${...} refers to it; the schema refuses it otherwise
                self.result.values[key] = value

    def _check_inner(self, path: str, value: Any, kind: str) -> None:
        sections = {"data.train", "data.validation", "data.default", *READ}
        if kind not in sections or value is None or (kind == "policy.tokenizer" and isinstance(value, str)):
            return
        for one in value if isinstance(value, list) and kind.startswith("data.") else [value]:
            if isinstance(one, Mapping):
                self._check(path, one)
            else:
                self.result.refuse(path, f"= {format_value(one)} must be a section of keys")

    def _check_switched(self, path: str, value: Any, kind: str) -> None:
        unsupported = DISABLED_BY[kind]
        enabled = isinstance(value, Mapping) and value.get("enabled") is True
        if enabled and unsupported is not None:
            self.result.refuse(f"{path}.enabled", f"= true {unsupported.sentence}")
        elif enabled:
            self._check(path, value)

    def _check_fixed(self, path: str, value: Any, fixed: Fixed) -> None:
        off = fixed.section and isinstance(value, Mapping) and not value.get("enabled")
        if not off and not any(type(value) is type(one) and value == one for one in fixed.values):
            shown = "" if isinstance(value, (Mapping, list)) else f"= {format_value(value)} "
            self.result.refuse(path, f"{shown}{fixed.sentence}")

    # Models

    def _translate_models(self) -> None:
        world = self._world_size()
        if "teacher" not in self.source:
            self._put(
                "teacher_pretrain", self.get("distillation.teacher_model_path"), "distillation.teacher_model_path"
            )
            for path, target in MOVED.items():
                if path.startswith(("policy.dtensor_cfg.", "policy.precision")) and target.startswith("student."):
                    self._put(target.replace("student.", "teacher.", 1), self.get(path), path)
        roles = ("policy", "teacher") if "teacher" in self.source else ("policy",)
        for role in roles:
            if self.section(f"{role}.dtensor_cfg").get("enabled") is False and not self._enabled(
                f"{role}.megatron_cfg"
            ):
                self.refuse(f"{role}.dtensor_cfg.enabled", "= false leaves no backend; set it to true")
            if world > 1:
                ours, suffix = ("student", "train") if role == "policy" else ("teacher", "infer")
                self._put(f"{ours}.strategy_args.strategy_name", f"fsdp2_{suffix}", f"{role}.dtensor_cfg")
        recompute = self.get("policy.dtensor_cfg.activation_checkpointing")
        if isinstance(recompute, bool):
            path = "policy.dtensor_cfg.activation_checkpointing"
            self._put("student.model_args.disable_gradient_checkpointing", not recompute, path)
        self._translate_tokenizer()
        self._translate_lora()

    def _world_size(self) -> int:
        """Number of ranks, which student and teacher share."""
        if self.get("cluster.gpus_per_node") is None:
            self.refuse("cluster.gpus_per_node", "is not set; set it to the number of devices of a machine")
        world = self._whole("cluster.gpus_per_node") * self._whole("cluster.num_nodes")
        self._put("student.device_mapping", list(range(world)), "cluster.gpus_per_node")
        return world

    def _translate_tokenizer(self) -> None:
        tokenizer = self.get("policy.tokenizer")
        name = tokenizer if isinstance(tokenizer, str) else self.section("policy.tokenizer").get("name")
        if name != self.get("policy.model_name"):
            self._put("tokenizer", name, "policy.tokenizer")
        if "chat_template" in self.section("policy.tokenizer"):
            template = self.get("policy.tokenizer.chat_template")
            spelled = {None: "empty", "default": "native"}.get(template, template)
            self._put("student.data_args.template", spelled, "policy.tokenizer.chat_template")

    def _translate_lora(self) -> None:
        path = "policy.dtensor_cfg.lora_cfg"
        if self._enabled(path):
            lora = self.section(path)
            target = "all-linear" if lora.get("match_all_linear") else lora.get("target_modules")
            self._put("student.model_args.lora_target", target, path)
            for key in ("dim", "alpha", "dropout"):
                self._put(f"student.model_args.lora_{'rank' if key == 'dim' else key}", lora.get(key), f"{path}.{key}")

    # Objective and generation

    def _translate_objective(self) -> None:
        where = "loss_fn" if "loss_fn" in self.source else "distillation"
        self._put("objective_preset", "nemo_rl", where)

        def find(key: str) -> tuple[Any, str]:
            paths = [f"{section}.{key}" for section in ("loss_fn", "distillation")]
            return next(((self.get(path), path) for path in paths if self.get(path) is not None), (None, where))

        kind, path = find("kl_type")
        if kind is not None and kind not in _KL:
            self.refuse(path, f"= {format_value(kind)} is not one of {', '.join(_KL)}")
        elif kind is not None:
            self._put("kd_objective", _KL[kind], path)
        weight, path = find("mixed_kl_weight")
        if kind in (None, "mixed") and weight is not None:
            self._put("kd_objective_kwargs", {"forward": weight}, path)
        only_topk, path = find("zero_outside_topk")
        if only_topk is not None and not isinstance(only_topk, bool):
            self.refuse(path, f"= {format_value(only_topk)} must be true or false")
        elif only_topk is not None:
            self._put("logits_topk_tail", "zero" if only_topk else "renormalize", path)
        if (
            self.get("policy.generation.temperature") != 0
        ):  # the distribution that is sampled is the one that is compared
            self._put("kd_temperature", self.get("policy.generation.temperature"), "policy.generation.temperature")

    def _translate_generation(self) -> None:
        longest = self.get("distillation.max_length")
        for target in ("sequence_length", "rollout.max_new_tokens"):
            if self.result.get(target) is None:
                self._put(target, longest, "distillation.max_length")
        if self.result.section("rollout") is None:
            self._put("rollout.on_policy_fraction", 1.0, "distillation")
        if "env" in self.source or self._has("env_name"):
            self._put("rollout.environment", "math", "env" if "env" in self.source else "data")
        backend = self.get("policy.generation.backend")
        if backend is None:
            return
        if backend not in ("vllm", "hf"):
            self.refuse("policy.generation.backend", f"= {format_value(backend)} is not supported; use vllm, or hf")
            return
        path = "policy.generation.backend"
        if backend not in GENERATORS:
            self.result.notices.append(f"{self.written(path)}: the generator {backend} is not built in; hf is used.")
            backend = "hf"
        self._put("rollout.generator", backend, path)
        if backend == "vllm":
            engine = {key: self.get(f"policy.generation.vllm_cfg.{key}") for key in READ["policy.generation.vllm_cfg"]}
            if engine.get("kv_cache_dtype") == "auto":
                del engine["kv_cache_dtype"]
            given = {key: value for key, value in sorted(engine.items()) if value is not None}
            self._put(
                "rollout.generator_kwargs",
                {**given, **self.section("policy.generation.vllm_kwargs")},
                "policy.generation.vllm_cfg",
            )

    def _has(self, key: str) -> bool:
        data = self.section("data")
        return any(
            isinstance(part, Mapping) and part.get(key) for part in (data, data.get("default"), data.get("train"))
        )

    # Steps

    def _translate_batches(self) -> int:
        """Set the batch sizes. Returns the number of optimizer steps that NeMo-RL takes for the samples of one step."""
        tp, cp = (self._whole(f"policy.dtensor_cfg.{key}") for key in ("tensor_parallel_size", "context_parallel_size"))
        world = self._whole("cluster.gpus_per_node") * self._whole("cluster.num_nodes")
        prompts, generations = (
            self._whole(f"distillation.{key}", default)
            for key, default in (("num_prompts_per_step", 0), ("num_generations_per_prompt", 1))
        )
        path = "policy.train_global_batch_size"
        batch = self._whole(path, prompts * generations or 8)
        samples = prompts * generations or batch
        micro = self._whole("policy.train_micro_batch_size")
        ranks = max(world // (tp * cp), 1)
        if world % (tp * cp):
            self.refuse(
                "policy.dtensor_cfg.tensor_parallel_size",
                f"= {tp} times context_parallel_size = {cp} does not divide the {world} devices of the cluster; change one",
            )
        elif batch % (ranks * micro):
            self.refuse(
                path,
                f"= {batch} cannot be divided into micro-batches of {micro} (train_micro_batch_size) on {ranks} data-parallel "
                "ranks; change one of them",
            )
        if samples % batch:
            self.refuse(
                path,
                f"= {batch} does not divide the {samples} samples of a step (num_prompts_per_step x "
                "num_generations_per_prompt); change one of them",
            )
        elif batch % generations:
            self.refuse(
                path, f"= {batch} is not a multiple of num_generations_per_prompt = {generations}; change one of them"
            )
        self._put("student.training_args.per_device_train_batch_size", micro, "policy.train_micro_batch_size")
        self._put("student.training_args.gradient_accumulation_steps", max(batch // (ranks * micro), 1), path)
        self._translate_packing()
        updates = max(samples // batch, 1)
        if updates > 1:
            self.result.notices.append(
                f"{self.written(path)} = {batch}: NeMo-RL writes {samples} samples and trains {updates} optimizer steps on "
                f"them; Limbeck writes {batch} new samples for each optimizer step, so max_num_steps, val_period and "
                f"save_period count {updates} times as many steps."
            )
        steps = "max_num_steps" if self.get("distillation.max_num_steps") is not None else "max_steps"
        self._put_steps("max_steps", f"distillation.{steps}", updates)
        period = "val_period" if self.get("distillation.val_period") is not None else "eval_steps"
        self._put_steps("eval_steps", f"distillation.{period}", updates)
        unused = [key for key in _STEP_KEYS if self.get(f"distillation.{key}") is not None]
        if period == "val_period" and "eval_steps" in unused:
            self.result.ignored.append("distillation.eval_steps")
        if self.get("checkpointing.save_period") is not None and "save_steps" in unused:
            self.result.ignored.append("distillation.save_steps")
        return updates

    def _put_steps(self, target: str, path: str, updates: int) -> None:
        value = self.get(path)
        self._put(target, value * updates if type(value) is int and value > 0 else value, path)

    def _translate_packing(self) -> None:
        roundings = {
            "policy.make_sequence_length_divisible_by": self._whole("policy.make_sequence_length_divisible_by")
        }
        modes = [key for key in ("dynamic_batching", "sequence_packing") if self._enabled(f"policy.{key}")]
        for mode in modes:
            path = f"policy.{mode}"
            roundings[f"{path}.sequence_length_round"] = self._whole(f"{path}.sequence_length_round")
            self._put("student.use_dynamic_batching_in_train", True, path)
            self._put(
                "student.max_tokens_per_microbatch_in_train",
                self.get(f"{path}.train_mb_tokens"),
                f"{path}.train_mb_tokens",
            )
        if len(modes) == 2:
            self.refuse(
                "policy.sequence_packing.enabled", "= true contradicts dynamic_batching.enabled = true; keep one"
            )
        if "sequence_packing" in modes:
            self._put("student.use_sequence_packing", True, "policy.sequence_packing")
            algorithm = self.get("policy.sequence_packing.algorithm")
            ours = "modified_first_fit_decreasing"
            if algorithm == ours:
                self._put("student.packing_algorithm", ours, "policy.sequence_packing.algorithm")
            elif algorithm is not None:
                self.result.ignored.append(self.written("policy.sequence_packing.algorithm"))
        self._put("student.sequence_length_round_in_train", math.lcm(*roundings.values()), list(roundings)[-1])

    def _translate_schedule(self, updates: int) -> None:
        betas = self.get("policy.optimizer.kwargs.betas")
        if isinstance(betas, list) and len(betas) == 2:
            for number, beta in enumerate(betas, start=1):
                self._put(f"student.training_args.adam_beta{number}", beta, "policy.optimizer.kwargs.betas")
        elif betas is not None:
            self.refuse("policy.optimizer.kwargs.betas", f"= {format_value(betas)} must be two numbers")
        if "max_grad_norm" in self.section(self.student):
            self._put("max_grad_norm", self.get("policy.max_grad_norm") or 0.0, "policy.max_grad_norm")
        path = "policy.scheduler"
        given = self.get(path)
        if given is None:
            self._put("student.training_args.lr_scheduler_type", "constant", self.student)
            return
        parts = given if isinstance(given, list) else [given]
        schedulers, milestones = [], None
        for part in parts:
            if isinstance(part, Mapping) and "milestones" in part:
                milestones = part["milestones"]
            elif isinstance(part, Mapping) and str(part.get("name")).startswith(_PYTORCH_SCHEDULES):
                schedulers.append({"name": part["name"].removeprefix(_PYTORCH_SCHEDULES), **(part.get("kwargs") or {})})
            else:
                self.refuse(path, f"has the entry {part}; write name: {_PYTORCH_SCHEDULES}… with kwargs, or milestones")
                return
        kwargs = {"schedulers": schedulers, "milestones": milestones, "interval": updates if updates > 1 else None}
        self._put("student.training_args.lr_scheduler_type", "sequential", path)
        self._put(
            "student.training_args.lr_scheduler_kwargs",
            {key: one for key, one in kwargs.items() if one is not None},
            path,
        )

    # Checkpoints and trackers

    def _translate_checkpoints(self, updates: int) -> None:
        if self.section("checkpointing").get("enabled") is False or "checkpointing" not in self.source:
            self._put("save_steps", 0, "checkpointing")
        else:
            path = "checkpointing.save_period"
            self._put_steps("save_steps", path if self.get(path) is not None else "distillation.save_steps", updates)
            self._put("resume_from_checkpoint", True, "checkpointing")  # as NeMo-RL does
        metric, path = self.get("checkpointing.metric_name"), "checkpointing.metric_name"
        keep, latest = self.get("checkpointing.keep_top_k"), self.get("checkpointing.ft_keep_latest_k")
        validates = self.result.get("validation.data_args.sources") is not None
        if metric is None or (str(metric).startswith("val") and not validates):
            self.result.put("checkpoint_config.best_metric", None, self.written("checkpointing"))
            self._put("max_ckpt_to_keep", keep, "checkpointing.keep_top_k")
            return
        kind, colon, name = str(metric).partition(":")
        if metric not in _METRICS and (kind not in ("val", "train") or not colon):
            self.refuse(path, f"= {format_value(metric)} must be val: or train: and the name of a metric, or null")
        self._put("checkpoint_config.best_metric", _METRICS.get(metric, f"{kind}/{name}"), path)
        higher = self.get("checkpointing.higher_is_better")
        self._put("checkpoint_config.best_mode", "min" if higher is False else "max", "checkpointing.higher_is_better")
        self._put("checkpoint_config.keep_best", keep, "checkpointing.keep_top_k")
        if keep is not None:  # the best ones, and the newest to resume from
            self._put("max_ckpt_to_keep", latest or 1, "checkpointing.keep_top_k")

    def _translate_trackers(self) -> None:
        names = [name for name in ("tensorboard", "wandb", "mlflow", "swanlab") if self.get(f"logger.{name}_enabled")]
        known = [name for name in names if name in TRACKERS]
        for name in names:
            if name not in known[:1]:
                why = (
                    "only one tracker is supported"
                    if name in known
                    else "it is not built in; a plug-in can register it"
                )
                self.result.notices.append(f"logger.{name}_enabled has no effect: {why}.")
        if "logger" not in self.source:
            return
        if not known:
            self._put("track_with", "none", "logger")
            return
        self._put("track_with", known[0], f"logger.{known[0]}_enabled")
        if known[0] != "tensorboard":
            self._put("tracker_kwargs", dict(self.section(f"logger.{known[0]}")), f"logger.{known[0]}")
        elif self.get("logger.log_dir") is not None:
            self._put("tracker_kwargs.log_dir", f"{self.get('logger.log_dir')}/tensorboard", "logger.log_dir")


def _moved_keys(table: str) -> Iterator[str]:
    """The keys of a section that are moved, and those of sections in it."""
    prefix = f"{table}." if table else ""
    for path in (*MOVED, *(kind for kind in READ if kind)):
        if path.startswith(prefix):
            yield path.removeprefix(prefix).partition(".")[0]


def _nearest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _hold_back_pending(result: Translation) -> None:
    """Remove Limbeck's keys that this version lacks, with a notice of the settings that would have become them."""
    known = {path for path, _ in walk_keys(DistillConfig)}
    lacking = [path for path in sorted(PENDING) if not any(key == path or key.startswith(f"{path}.") for key in known)]
    held = []
    if "checkpoint_config.keep_best" in lacking and (keep := result.get("checkpoint_config.keep_best")) is not None:
        result.put("max_ckpt_to_keep", keep, result.derived["checkpoint_config.keep_best"])
    for path in lacking:
        if result.pop(path) is not None:
            held += [
                result.derived.pop(key) for key in list(result.derived) if key == path or key.startswith(f"{path}.")
            ]
    if held:
        result.notices.append(f"These settings are not built yet and have no effect: {', '.join(dict.fromkeys(held))}.")
    if "validation.rollout" in lacking and result.get("checkpoint_config.best_metric") == "val/accuracy":
        result.values["checkpoint_config"]["best_metric"] = None
    if result.section("validation") == {}:
        result.pop("validation")
