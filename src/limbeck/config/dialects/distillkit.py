"""The dialect of DistillKit's YAML file: online distillation from a model. Compressed offline datasets are refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from limbeck.config.compose import format_error
from limbeck.config.dialects import training_arguments
from limbeck.config.dialects.base import Source
from limbeck.config.dialects.files import use_wandb
from limbeck.config.locations import SourceLocation, find_location
from limbeck.config.schema import Contradiction, DistillConfig, TeacherConfig
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value
from limbeck.errors import LimbeckError

DEFAULT = "DistillKit's default"

MOVED = {
    "model": "student_pretrain",
    "teacher.path": "teacher_pretrain",
    "sequence_length": "sequence_length",
    "output_path": "output_dir",
    "project_name": "exp_name",
    "trust_remote_code": "student.model_args.trust_remote_code",
    "frozen_res": "student.model_args.frozen_parameters",
    "dataset.seed": "student.training_args.data_seed",
    "dataset.num_samples": "student.data_args.num_samples",
    "dataset.prepared_dataset_path": "student.data_args.cache_path",
}

TRAINING_DEFAULTS = {
    "student.training_args.learning_rate": 2e-5,
    "student.training_args.per_device_train_batch_size": 8,
    "logging_steps": 10,
    "save_steps": 500,
}
"""TRL's defaults, where they are not Limbeck's."""

ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "model_auto_class": ((None, "AutoModelForCausalLM"), "is not supported; Limbeck trains causal language models"),
    "resize_embeddings_to_multiple_of": ((None,), "is not supported; resize the student's embeddings before the run"),
    "force_hidden_state_projection": ((None, False), "is not supported; widths that differ are projected anyway"),
    "dataset.prepacked": ((None, False), "is not supported; set training_args.packing: true and give unpacked rows"),
    "dataset.eos_label_token_ids": (
        (None, []),
        "is not supported; use a template that ends answers with the end token",
    ),
    "dataset.num_eval_samples": ((None,), "is not supported; give a smaller eval_dataset"),
}
"""Keys of which only some values are supported, and the end of the error message for others."""

KEYS = {
    *MOVED,
    *ONLY,
    "dataset.train_dataset",
    "dataset.eval_dataset",
    "teacher.kind",
    "teacher.kwargs",
    "teacher.top_k",
}
KEYS |= {
    "use_flash_attention",
    "loss_functions",
    "layer_mapping",
    "functionary_packing",
    "training_args",
    "model_kwargs",
}
KEYS |= {"frozen_modules"}
OFFLINE = {"teacher.logprob_compressor", "teacher.legacy_logit_compression"}

DIVERGENCES = {"kl": "forward_kl", "jsd": "js_divergence", "tvd": "tvd"}
FEATURES = {"hs_mse": "mse", "hs_cosine": "cosine"}
TAILS = {"zero": "zero", "symmetric_uniform": "bucket"}
LOADING = {
    "attn_implementation": "attn_implementation",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
}
LOADING |= {"torch_dtype": "dtype", "dtype": "dtype"}
SECTIONS = ("teacher.kwargs", "model_kwargs", "training_args", "dataset.eval_dataset")
DEFAULT_LOSSES = [{"function": "cross_entropy", "weight": 0.5}, {"function": "kl", "weight": 0.5, "temperature": 1.0}]


class DistillKitDialect:
    """A YAML file of DistillKit."""

    name = "distillkit"
    system = "DistillKit"

    def recognises(self, source: Source) -> bool:
        """Whether the file has a ``model`` and ``loss_functions``, a ``teacher.kind`` or a ``dataset.train_dataset``."""
        if not isinstance(source, Mapping) or not isinstance(source.get("model"), str):
            return False
        teacher, dataset = source.get("teacher"), source.get("dataset")
        kind = isinstance(teacher, Mapping) and "kind" in teacher
        return kind or "loss_functions" in source or (isinstance(dataset, Mapping) and "train_dataset" in dataset)

    def translate(self, source: Source, locations: dict[str, SourceLocation]) -> Translation:
        if not isinstance(source, Mapping):
            raise LimbeckError(
                "the dialect distillkit reads YAML files, not arguments; use --dialect with another name."
            )
        result = Translation({})
        given = _flatten(source, result)
        for key in SECTIONS:
            if not isinstance(given.get(key) or {}, Mapping):
                result.refuse(key, f"= {format_value(given.pop(key))} must be a section of keys")
        if given.get("teacher.kind") == "dataset" or given.keys() & OFFLINE:
            # One sentence for the whole file, whose other keys would all be errors.
            refusal = Contradiction(
                "teacher.kind", "= dataset is not supported yet: Limbeck reads no compressed offline datasets; use hf"
            )
            raise LimbeckError(format_error(refusal, find_location("teacher.kind", locations) or "DistillKit's file"))
        for key, ours in MOVED.items():
            if given.get(key) is not None:
                result.set(ours, given[key], key)
        for key, (supported, sentence) in ONLY.items():
            if given.get(key) not in supported:
                result.refuse(key, f"= {format_value(given[key])} {sentence}")
        if "dataset.seed" in given and not given["dataset.seed"]:
            result.notices.append("dataset.seed: Limbeck always shuffles the rows; DistillKit does not with 0 or null.")
        if given.get("functionary_packing"):
            result.ignored.append("functionary_packing")
        _models(result, given)
        _datasets(result, given)
        _losses(result, given)
        _training(result, given)
        use_wandb(result, (given.get("project_name") or "distillkit", "project_name"))
        return result


DIALECT = DistillKitDialect()


def _flatten(source: Mapping[str, Any], result: Translation) -> dict[str, Any]:
    """DistillKit's keys by dotted path; those of Limbeck beside them become ``result.values``.

    Any other key is an error; DistillKit ignores it.
    """
    given: dict[str, Any] = {}
    for key, value in source.items():
        if key in ("dataset", "teacher") and isinstance(value, Mapping):
            given |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            given[key] = value
    for key in [key for key in given if key not in KEYS | OFFLINE]:
        section, _, name = key.rpartition(".")
        if (section == "teacher" and name in TeacherConfig.model_fields) or key in DistillConfig.model_fields:
            result.put(key, copy.deepcopy(given[key]), key)
            del result.derived[key]
        else:
            result.refuse(key, "is a key of neither DistillKit nor Limbeck")
    return given


def _models(result: Translation, given: Mapping[str, Any]) -> None:
    if given.get("teacher.kind") not in (None, "hf"):
        result.refuse("teacher.kind", f"= {format_value(given['teacher.kind'])} is not hf or dataset")
    if given.get("use_flash_attention"):
        result.set("student.model_args.attn_implementation", "flash_attention_2", "use_flash_attention")
    for role, key in (("student", "model_kwargs"), ("teacher", "teacher.kwargs")):
        for name, value in (given.get(key) or {}).items():
            if name in LOADING:
                result.set(f"{role}.model_args.{LOADING[name]}", value, key)
            elif name in ("device_map", "low_cpu_mem_usage", "use_cache"):
                result.ignored.append(f"{key}.{name}")
            else:
                result.refuse(f"{key}.{name}", f"is not supported; known are {', '.join(LOADING)}")
    modules = given.get("frozen_modules") or []
    if not isinstance(modules, list):
        result.refuse("frozen_modules", f"= {format_value(modules)} must be a list of names of modules")
    elif modules:
        # A prefix that ends in a dot is the module of exactly this name.
        result.set("student.model_args.freeze_module_prefix", [f"{name}." for name in modules], "frozen_modules")
    if given.get("frozen_res") is not None:
        result.set("student.model_args.parameter_match", "regex", "frozen_res")


def _datasets(result: Translation, given: Mapping[str, Any]) -> None:
    train, held_out = given.get("dataset.train_dataset"), given.get("dataset.eval_dataset")
    if not isinstance(train, Mapping) or not (train.get("repo_id") or train.get("disk_path")):
        result.refuse("dataset.train_dataset", "must have repo_id or disk_path")
        return
    result.set("student.data_args.sources", [_source(train)], "dataset.train_dataset")
    if not held_out:
        return
    source = _source(held_out)
    if not source.keys() & {"path", "hub"}:
        result.refuse("dataset.eval_dataset", "must have repo_id or disk_path")
        return
    if source.keys() - {"path", "hub", "split"} or source.get("split") not in (None, "train"):
        result.refuse(
            "dataset.eval_dataset",
            "has a split, revision or config_name, which validation data cannot have; save it with datasets' save_to_disk and "
            "name the folder in disk_path",
        )
        return
    name = source.get("path") or f"hub:{source['hub']}"
    result.set("validation.data_args.file_name", [name], "dataset.eval_dataset")


def _source(dataset: Mapping[str, Any]) -> dict[str, Any]:
    if dataset.get("disk_path"):
        split = {} if dataset.get("split") is None else {"split": dataset["split"]}
        return {"path": dataset["disk_path"], **split}
    names = {"repo_id": "hub", "config_name": "config", "split": "split", "revision": "revision"}
    return {ours: dataset[key] for key, ours in names.items() if dataset.get(key) is not None}


def _losses(result: Translation, given: Mapping[str, Any]) -> None:
    """Σ wᵢ Lᵢ / Σ wᵢ with at most one divergence, and cross-entropy beside it."""
    key = "loss_functions"
    terms = given.get(key) or DEFAULT_LOSSES
    if not isinstance(terms, list) or not all(
        isinstance(term, Mapping) and isinstance(term.get("function"), str) and _is_number(term.get("weight"))
        for term in terms
    ):
        result.refuse(key, "is not a list of losses, each with function and weight")
        return
    origin = key if given.get(key) else DEFAULT
    by_kind: dict[str, list[Mapping[str, Any]]] = {"ce": [], "kd": [], "features": []}
    for term in terms:
        name = term.get("function")
        kind = (
            "ce"
            if name == "cross_entropy"
            else "kd"
            if name in DIVERGENCES
            else "features"
            if name in FEATURES
            else None
        )
        if kind is None:
            known = ("cross_entropy", *DIVERGENCES, *FEATURES)
            result.refuse(key, f"has the loss {name}, which is not supported; use {', '.join(known)}")
            return
        by_kind[kind].append(term)
    if len(by_kind["kd"]) > 1 or len(by_kind["features"]) > 1:
        result.refuse(key, "has several divergences or several losses of hidden states; keep one of each")
        return
    ce, kd = (float(sum(term["weight"] for term in by_kind[kind])) for kind in ("ce", "kd"))
    if ce + kd <= 0:
        result.refuse(key, "needs cross_entropy or a divergence with a weight above 0")
        return
    result.set("distill_loss_weight", kd / (ce + kd), origin)
    if by_kind["kd"]:
        _divergence(result, by_kind["kd"][0], given.get("teacher.top_k"), origin)
    elif given.get("teacher.top_k"):
        result.ignored.append("teacher.top_k")
    _hidden_states(result, given, by_kind["features"], ce + kd, origin)


def _divergence(result: Translation, term: Mapping[str, Any], top_k: Any, origin: str) -> None:
    result.set("kd_objective", DIVERGENCES[str(term["function"])], origin)
    result.set("kd_temperature", 1.0 if term.get("temperature") is None else term["temperature"], origin)
    result.set("temperature_squared", True, origin)
    if top_k is None:
        return
    result.set("logits_topk", top_k, "teacher.top_k")
    missing = str(term.get("missing_probability_handling") or "zero")
    if missing not in TAILS:
        result.refuse(origin, f"has missing_probability_handling: {missing}, which is not one of {', '.join(TAILS)}")
    else:
        result.set("logits_topk_tail", TAILS[missing], origin)


def _hidden_states(
    result: Translation, given: Mapping[str, Any], terms: list[Mapping[str, Any]], others: float, origin: str
) -> None:
    mapping = given.get("layer_mapping")
    if not terms:
        if mapping:
            result.ignored.append("layer_mapping")
        return
    pairs = mapping if isinstance(mapping, list) else []
    if not pairs or not all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_layer(i) for i in pair) for pair in pairs
    ):
        result.refuse(
            "layer_mapping",
            f"= {format_value(mapping)} is not a list of pairs of layers from 1; write them out, such as [[4, 8], [8, 16]]",
        )
        return
    # Entry i of the hidden states is the output of layer i − 1, counted from 0.
    loss = FEATURES[str(terms[0]["function"])]
    named = [[*(f"model.layers.{index - 1}" for index in pair), loss] for pair in pairs]
    result.set("features.pairs", named, "layer_mapping")
    result.set("features.mask", "supervised", "layer_mapping")
    weight = float(terms[0]["weight"])
    result.set("features.weight", weight / others, origin)
    result.notices.append(
        f"loss_functions: DistillKit divides the loss by {others + weight:g}, the sum of all weights, and Limbeck by "
        f"{others:g}, without that of the hidden states; the ratios of the terms are the same."
    )


def _training(result: Translation, given: Mapping[str, Any]) -> None:
    arguments = dict(given.get("training_args") or {})
    if "max_length" in arguments:  # takes precedence over sequence_length
        result.pop("sequence_length")
    dtype = training_arguments.precision(arguments)
    if arguments.get("bf16") and arguments.get("fp16"):
        result.refuse("training_args.fp16", "and training_args.bf16 contradict each other; keep one")
    elif dtype is not None:
        result.default("student.model_args.dtype", dtype, "training_args")
    training_arguments.translate(result, arguments, {name: f"training_args.{name}" for name in arguments})
    for key, value in TRAINING_DEFAULTS.items():
        result.default(key, value, DEFAULT)
    if result.get("max_steps") in (None, -1):
        result.default("student.training_args.num_train_epochs", 3, DEFAULT)
    # TRL learns every token unless it is configured otherwise.
    result.default("distill_on_prompt", True, DEFAULT)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
