"""DistillKit's YAML as Limbeck's keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from limbeck.config import LoadedConfig, load_mapping
from limbeck.errors import LimbeckError

ONLINE: dict[str, Any] = {
    "project_name": "kit",
    "model": "small",
    "dataset": {
        "train_dataset": {"repo_id": "owner/rows", "split": "train", "config_name": "main", "revision": "v1"},
        "eval_dataset": {"disk_path": "held-out"},
        "seed": 7,
        "num_samples": 100,
    },
    "teacher": {
        "kind": "hf",
        "path": "large",
        "kwargs": {"torch_dtype": "bfloat16", "device_map": "auto"},
        "top_k": 32,
    },
    "sequence_length": 512,
    "output_path": "out",
    "use_flash_attention": True,
    "loss_functions": [
        {"function": "cross_entropy", "weight": 0.25},
        {"function": "kl", "weight": 0.75, "temperature": 2.0, "missing_probability_handling": "symmetric_uniform"},
    ],
    "training_args": {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "bf16": True,
        "packing": True,
        "dataset_kwargs": {},
    },
    "frozen_modules": ["model.embed_tokens"],
    "frozen_res": ["mlp$"],
}


def load(**changes: Any) -> LoadedConfig:
    values = copy.deepcopy(ONLINE)
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return load_mapping(values)


def test_an_online_configuration_is_recognised_and_translated() -> None:
    loaded = load()
    config, student = loaded.config, loaded.config.student
    assert loaded.dialect == "distillkit"
    assert (config.exp_name, config.output_dir, config.sequence_length) == ("kit", "out", 512)
    assert (student.model_args.model_name_or_path, config.teacher.model_args.model_name_or_path) == ("small", "large")
    assert student.data_args.sources == [{"hub": "owner/rows", "config": "main", "split": "train", "revision": "v1"}]
    assert [one.path for one in config.validation_sources] == [["held-out"]]
    assert (config.data_seed, student.data_args.num_samples) == (7, 100)
    assert (student.model_args.attn_implementation, student.model_args.dtype) == ("flash_attention_2", "bf16")
    assert (config.kd_objective, config.distill_loss_weight, config.kd_temperature) == ("forward_kl", 0.75, 2.0)
    assert (config.temperature_squared, config.logits_topk, config.logits_topk_tail) == (True, 32, "bucket")
    assert (student.training_args.num_train_epochs, student.training_args.per_device_train_batch_size) == (2, 2)
    assert (student.training_args.learning_rate, config.save_steps, config.logging_steps) == (2e-5, 500, 10)
    assert student.model_args.disable_gradient_checkpointing is False
    assert student.use_sequence_packing and config.distill_on_prompt
    assert student.model_args.freeze_module_prefix == "model.embed_tokens."
    assert (student.model_args.frozen_parameters, student.model_args.parameter_match) == (["mlp$"], "regex")
    (notice,) = loaded.notices
    assert "teacher.kwargs.device_map" in notice and "training_args.dataset_kwargs" in notice


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (None, ("forward_kl", 0.5, 1.0)),
        ([{"function": "jsd", "weight": 1, "temperature": 3}], ("js_divergence", 1.0, 3.0)),
        ([{"function": "cross_entropy", "weight": 1}, {"function": "tvd", "weight": 3}], ("tvd", 0.75, 1.0)),
        ([{"function": "cross_entropy", "weight": 2}], ("forward_kl", 0.0, 1.0)),
    ],
)
def test_the_weights_of_the_losses_are_normalised(losses: Any, expected: tuple[Any, ...]) -> None:
    config = load(loss_functions=losses).config
    assert (config.kd_objective, config.distill_loss_weight, config.kd_temperature) == expected


def test_hidden_states_are_features_between_layers() -> None:
    losses = [
        {"function": "cross_entropy", "weight": 1},
        {"function": "kl", "weight": 1, "temperature": 1},
        {"function": "hs_mse", "weight": 4},
    ]
    loaded = load(loss_functions=losses, layer_mapping=[[1, 2], [2, 4]])
    features = loaded.config.features
    assert features.pairs == [["model.layers.0", "model.layers.1", "mse"], ["model.layers.1", "model.layers.3", "mse"]]
    assert (features.weight, features.mask) == (2.0, "supervised")
    assert any("divides the loss by 6" in notice for notice in loaded.notices)


def test_prompts_are_left_out_where_trl_leaves_them_out() -> None:
    assert not load(training_args__assistant_only_loss=True).config.distill_on_prompt


def test_limbecks_keys_may_be_added() -> None:
    config = load(
        max_steps=7, student={"strategy_args": {"strategy_name": "fsdp2_train"}}, teacher__model_args={"revision": "v2"}
    ).config
    assert (config.max_steps, config.student.strategy_args.strategy_name) == (7, "fsdp2_train")
    assert (config.teacher.model_args.revision, config.teacher.model_args.dtype) == ("v2", "bf16")
    assert config.student.data_args.num_samples == 100


def test_zero_renormalises_the_teacher_alone() -> None:
    assert load(loss_functions=[{"function": "kl", "weight": 1, "temperature": 1}]).config.logits_topk_tail == "zero"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": {"kind": "dataset", "logprob_compressor": {}}}, "teacher.kind = dataset is not supported yet"),
        ({"teacher__kind": "vllm"}, "is not hf or dataset"),
        ({"losses": []}, "losses is a key of neither DistillKit nor Limbeck"),
        ({"kd_temperature": 3}, "loss_functions = 2.0 contradicts kd_temperature = 3; keep one"),
        ({"teacher__kwargs": {"load_in_4bit": True}}, "teacher.kwargs.load_in_4bit is not supported"),
        ({"model_auto_class": "AutoModelForImageTextToText"}, "model_auto_class = AutoModelForImageTextToText is not"),
        ({"loss_functions": [{"function": "hinge", "weight": 1}]}, "has the loss hinge, which is not supported"),
        ({"loss_functions": [{"function": "kl"}]}, "is not a list of losses"),
        ({"loss_functions": [{"function": f, "weight": 1} for f in ("kl", "jsd")]}, "several divergences"),
        ({"loss_functions": [{"function": "hs_mse", "weight": 1}]}, "needs cross_entropy or a divergence"),
        (
            {"loss_functions": [{"function": f, "weight": 1} for f in ("kl", "hs_mse")], "layer_mapping": "all"},
            "write them out",
        ),
        ({"dataset__train_dataset": {}}, "dataset.train_dataset must have repo_id or disk_path"),
        ({"dataset__eval_dataset": {"repo_id": "a/b", "split": "test"}}, "dataset.eval_dataset has a split"),
        ({"dataset__prepacked": True}, "dataset.prepacked = true is not supported"),
        ({"training_args__fp16": True}, "training_args.fp16 and training_args.bf16 contradict"),
        ({"training_args__optim": "sgd"}, "training_args.optim = sgd is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LimbeckError) as caught:
        load(**changes)
    assert sentence in str(caught.value)
    assert "dataset is not supported" not in sentence or "\n" not in str(caught.value)
