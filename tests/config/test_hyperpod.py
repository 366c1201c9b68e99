"""The flags and the configuration file of the HyperPod sample as Limbeck's keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.config import DistillConfig, load_arguments, load_config
from limbeck.config.dialects.hyperpod import SETTINGS
from limbeck.errors import LimbeckError
from limbeck.registry import DIALECTS

Write = Callable[..., Path]

# Every flag of the sample's two lists, with the Limbeck key that it sets, its value and the key's value.
FLAGS: list[tuple[str, str, str, Any]] = [
    ("project_name", "mine", "exp_name", "mine"),
    ("dataset_name", "owner/rows", "student.data_args.sources", [{"hub": "owner/rows", "split": "train"}]),
    ("dataset_name", "rows.jsonl", "student.data_args.sources", [{"path": "rows.jsonl"}]),
    ("num_samples", "100", "student.data_args.num_samples", 100),
    ("seed", "7", "seed", 7),
    ("teacher_model", "large", "teacher.model_args.model_name_or_path", "large"),
    ("student_model", "small", "student.model_args.model_name_or_path", "small"),
    ("max_length", "512", "sequence_length", 512),
    ("chat_template", "{{ messages }}", "student.data_args.template", "{{ messages }}"),
    ("hub_location", "me/student", "checkpoint_config.save_to_hub.repo_id", "me/student"),
    ("output_dir", "/fsx", "output_dir", "/fsx"),
    ("num_train_epochs", "2", "student.training_args.num_train_epochs", 2),
    ("per_device_train_batch_size", "4", "student.training_args.per_device_train_batch_size", 4),
    ("gradient_accumulation_steps", "16", "student.training_args.gradient_accumulation_steps", 16),
    ("learning_rate", "1e-4", "student.training_args.learning_rate", 1e-4),
    ("weight_decay", "0.1", "student.training_args.weight_decay", 0.1),
    ("warmup_ratio", "0.2", "student.training_args.warmup_ratio", 0.2),
    ("lr_scheduler_type", "linear", "student.training_args.lr_scheduler_type", "linear"),
    ("save_steps", "5", "save_steps", 5),
    ("logging_steps", "9", "logging_steps", 9),
    ("resume_from_checkpoint", "/fsx/checkpoint-5", "resume_from_checkpoint", "/fsx/checkpoint-5"),
    ("temperature", "3", "kd_temperature", 3.0),
    ("alpha", "0.3", "distill_loss_weight", 0.3),
]
DEFAULTS = {
    "exp_name": "distil-logits",
    "student.data_args.sources": [{"hub": "mlabonne/FineTome-100k", "split": "train"}],
    "student.data_args.num_samples": None,
    "student.data_args.template": "chatml",
    "student.data_args.default_system": "You are a helpful assistant.",
    "seed": 42,
    "teacher.model_args.model_name_or_path": "arcee-ai/Arcee-Spark",
    "student.model_args.model_name_or_path": "Qwen/Qwen2-1.5B",
    "student.model_args.dtype": "bf16",
    "student.model_args.unfrozen_parameters": None,
    "sequence_length": 4096,
    "student.training_args.num_train_epochs": 3,
    "student.training_args.per_device_train_batch_size": 1,
    "student.training_args.gradient_accumulation_steps": 8,
    "student.training_args.learning_rate": 2e-5,
    "student.training_args.weight_decay": 0.05,
    "student.training_args.warmup_ratio": 0.1,
    "student.training_args.lr_scheduler_type": "cosine",
    "save_steps": 1000,
    "logging_steps": 1,
    "resume_from_checkpoint": False,
    "kd_objective": "forward_kl",
    "kd_temperature": 2.0,
    "temperature_squared": True,
    "distill_loss_weight": 0.5,
    "logits_topk": 0,
    # The sample's default is an account of somebody else's.
    "checkpoint_config.save_to_hub.repo_id": None,
}


def arguments(*argv: str) -> DistillConfig:
    return load_arguments(argv, "hyperpod").config


def at(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config


def test_the_defaults_are_those_of_the_sample() -> None:
    config = arguments()
    assert {path: at(config, path) for path in DEFAULTS} == DEFAULTS


def test_checkpoints_are_kept_on_fsx_where_it_is_mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("limbeck.config.dialects.hyperpod.FSX", tmp_path / "fsx")
    assert arguments().output_dir == "./output"
    (tmp_path / "fsx").mkdir()
    assert arguments().output_dir == str(tmp_path / "fsx" / "model")
    assert arguments("--output_dir", "mine").output_dir == "mine"


@pytest.mark.parametrize(("flag", "value", "path", "expected"), FLAGS)
def test_a_flag_sets_its_key_and_is_its_origin(flag: str, value: str, path: str, expected: Any) -> None:
    loaded = load_arguments([f"--{flag}", value], "hyperpod")
    assert at(loaded.config, path) == expected
    key = path if path in loaded.origins else f"{path}.repo_id"
    assert loaded.origins[key] == f"--{flag}" or flag in ("teacher_model", "student_model")
    assert at(arguments(f"--{flag}={value}"), path) == expected


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_only_flags_that_are_given_override_the_file(write: Write, suffix: str) -> None:
    """One property for all settings: the file decides, unless the flag is given, and then the flag does."""
    nested: dict[str, Any] = {}
    by_flag = {setting.flag: setting for setting in SETTINGS}
    values = {flag: value for flag, value, *_ in FLAGS}
    for flag, value in values.items():
        *parents, leaf = by_flag[flag].key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    file = write((yaml.safe_dump if suffix == ".yaml" else json.dumps)(nested), f"cfg{suffix}")
    from_file = arguments("--config_file", str(file))
    from_flags = arguments(*(word for flag, value in values.items() for word in (f"--{flag}", value)))
    assert from_file == from_flags != arguments()
    overridden = load_arguments(["--config_file", str(file), "--alpha", "0.9"], "hyperpod")
    assert overridden.origins["distill_loss_weight"] == "--alpha"
    expected = from_file.model_dump()
    assert overridden.config.model_dump() == {**expected, "distill_loss_weight": 0.9}
    if suffix == ".yaml":  # `limbeck train` reads the same file
        assert DIALECTS.get("hyperpod").recognises(nested)
        assert load_config(file).config == from_file
        assert (
            load_config(file).origins["kd_temperature"].startswith("derived from distillation.temperature (cfg.yaml:")
        )


@pytest.mark.parametrize(
    ("argv", "dtype"),
    [
        ([], "bf16"),
        (["--bf16"], "bf16"),
        (["--no-bf16"], "fp32"),
        (["--fp16"], "fp16"),
        (["--fp16", "--no-bf16"], "fp16"),
    ],
)
def test_precision(argv: list[str], dtype: str) -> None:
    config = arguments(*argv)
    assert (config.student.model_args.dtype, config.teacher.model_args.dtype) == (dtype, dtype)


def test_a_precision_flag_replaces_the_precision_of_the_file(write: Write) -> None:
    file = write("training: {bf16: true, fp16: false}", "cfg.yaml")
    assert arguments("--config_file", str(file), "--fp16").student.model_args.dtype == "fp16"
    assert arguments("--config_file", str(file)).student.model_args.dtype == "bf16"


@pytest.mark.parametrize(
    ("argv", "repository", "notice"),
    [
        ([], None, None),
        (["--save_location", "fsx"], None, None),
        (["--hub_location", "me/x"], "me/x", None),
        (["--save_location", "both", "--hub_location", "me/x"], "me/x", None),
        (["--save_location", "hub", "--hub_location", "me/x"], "me/x", "also stay in output_dir"),
        (["--save_location", "fsx", "--hub_location", "me/x"], None, "--hub_location has no effect"),
    ],
)
def test_where_the_student_is_saved(argv: list[str], repository: str | None, notice: str | None) -> None:
    loaded = load_arguments(argv, "hyperpod")
    assert loaded.config.checkpoint_config.save_to_hub.repo_id == repository
    assert loaded.notices == [] if notice is None else notice in loaded.notices[0]


def test_the_training_section_takes_training_arguments(write: Write) -> None:
    text = """
        training:
          max_steps: 12
          adam_beta2: 0.95
          max_grad_norm: 0.5
          save_total_limit: 2
          gradient_checkpointing: true
          gradient_checkpointing_kwargs: {use_reentrant: false}
          report_to: [tensorboard]
          push_to_hub: true
          hub_model_id: me/x
          hub_private_repo: false
          overwrite_output_dir: true
    """
    loaded = load_arguments(["--config_file", str(write(text, "cfg.yml"))], "hyperpod")
    config = loaded.config
    assert (config.max_steps, config.student.training_args.num_train_epochs) == (12, None)
    assert (config.student.training_args.adam_beta2, config.max_grad_norm, config.max_ckpt_to_keep) == (0.95, 0.5, 2)
    assert config.student.model_args.disable_gradient_checkpointing is False
    assert config.track_with == "tensorboard"
    hub = config.checkpoint_config.save_to_hub
    assert (hub.repo_id, hub.private) == ("me/x", False)
    assert any("training.overwrite_output_dir" in notice for notice in loaded.notices)


def test_limbecks_keys_may_be_added(write: Write) -> None:
    config = arguments("--alpha", "0.4", "logits_topk=8", "validation.data_args.file_name=[a.json]")
    assert (config.logits_topk, config.distill_loss_weight) == (8, 0.4)
    assert [one.path for one in config.validation_sources] == [["a.json"]]
    file = write("models: {student: s, teacher: t}\nlogits_topk: 4\n")
    assert load_config(file, ["student.use_sequence_packing=true"]).config.student.use_sequence_packing
    assert load_config(file).config.logits_topk == 4


def test_parity_reproduces_the_arithmetic_of_the_sample() -> None:
    config = arguments("--parity")
    assert set(config.objective_faults) == {
        "trained_padding", "zero_padded_vocabulary", "every_token", "mean_of_micro_batches"
    }  # fmt: skip
    assert config.distill_on_prompt
    assert not arguments().objective_faults


def test_flash_attention_is_set_for_both_models() -> None:
    config = arguments("--use_flash_attention")
    assert {role.model_args.attn_implementation for role in (config.student, config.teacher)} == {"flash_attention_2"}


def test_a_spectrum_file_lists_the_trained_parameters(write: Write) -> None:
    file = write("unfrozen_parameters:\n- layers.0\n- lm_head\n", "spectrum.yaml")
    loaded = load_arguments(["--layers_to_unfreeze", str(file)], "hyperpod")
    assert loaded.config.student.model_args.unfrozen_parameters == ["layers.0", "lm_head"]
    assert loaded.origins["student.model_args.unfrozen_parameters"] == "--layers_to_unfreeze"
    native = write(f"student_pretrain: s\nteacher_pretrain: t\nstudent: {{data_args: {{file_name: d}}, model_args: "
                   f"{{unfrozen_parameters: {file}}}}}\n")  # fmt: skip
    assert load_config(native).config.student.model_args.unfrozen_parameters == ["layers.0", "lm_head"]


def test_metrics_go_to_the_project_of_weights_and_biases(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert arguments("--project_name", "mine").track_with == "tensorboard"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("limbeck.config.dialects.files.find_spec", lambda name: name)
    config = arguments("--project_name", "mine")
    assert (config.track_with, config.tracker_kwargs) == ("wandb", {"project": "mine"})
    config = arguments("--project_name", "mine", "--config_file", str(write("training: {report_to: [mlflow, wandb]}")))
    assert config.trackers == {"mlflow": {}, "wandb": {"project": "mine"}}


def test_folders_and_files_are_local_datasets(tmp_path: Path) -> None:
    def source(name: str) -> dict[str, Any]:
        return arguments("--dataset_name", name, "--dataset_split", "test").student.data_args.sources[0]

    for folder, marker in (("one", "state.json"), ("several", "dataset_dict.json"), ("plain", "README.md")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / marker).write_text("{}")
    assert source(str(tmp_path / "one")) == {"path": str(tmp_path / "one")}
    assert source(str(tmp_path / "several")) == {"path": str(tmp_path / "several"), "split": "test"}
    assert source(str(tmp_path / "plain")) == {"hub": str(tmp_path / "plain"), "split": "test"}
    assert source("./missing.parquet") == {"path": "./missing.parquet"}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--alhpa", "1"], "--alhpa is not a flag, did you mean --alpha?"),
        (["--alph", "1"], "--alph is not a flag, did you mean --alpha?"),
        (["--hub_token", "secret"], "--hub_token is not a flag"),
        (["--alpha"], "expected one argument"),
        (["--alpha", "2"], "--alpha: distill_loss_weight = 2 must be at most 1"),
        (["--num_samples", "many"], "--num_samples: student.data_args.num_samples = many is not a whole number"),
        (["--fp16", "--bf16"], "--fp16 and --bf16 contradict each other"),
        (["--save_location", "hub"], "--save_location = hub needs a repository; set hub_location to OWNER/NAME."),
        (["--save_location", "s3"], "--save_location = s3 is not one of hub, fsx, both"),
        (["--hub_location", "nobody"], "--hub_location: checkpoint_config.save_to_hub.repo_id = nobody"),
        (["--config_file", "cfg.toml"], "must end in .json, .yaml or .yml"),
        (["--config_file", "nowhere.json"], "--config_file nowhere.json cannot be read"),
        (["--layers_to_unfreeze", "nowhere.yaml"], "--layers_to_unfreeze: nowhere.yaml cannot be read"),
        (
            ["--alpha", "0.2", "distill_loss_weight=0.3"],
            "--alpha = 0.2 contradicts distill_loss_weight = 0.3; keep one",
        ),
        (["nonsense"], "nonsense is neither a flag nor a setting"),
        (["kd_temprature=3"], "command line: kd_temprature is not a key; did you mean kd_temperature?"),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(LimbeckError) as caught:
        arguments(*argv)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        ("a: [", "cfg.yaml", "is not YAML"),
        ("{", "cfg.json", "is not JSON"),
        ("- 1", "cfg.yaml", "holds no section of keys"),
        ("distillation: {temprature: 2}", "cfg.yaml", "cfg.yaml:1: distillation.temprature is not a key of HyperPod's"),
        ("training: {optim: sgd}", "cfg.yaml", "cfg.yaml:1: training.optim = sgd is not supported"),
        ("training: {neftune_noise_alpha: 5}", "cfg.yaml", "is not an argument that Limbeck can translate"),
        (
            "training: {report_to: [wandb, neptune]}",
            "cfg.yaml",
            "must be one of tensorboard, wandb, mlflow, swanlab, none",
        ),
        ("training: {deepspeed: ds.json}", "cfg.yaml", "accelerate launch --use_deepspeed"),
        ("training: {bf16: true, fp16: true}", "cfg.yaml", "training.fp16 and training.bf16 contradict"),
        ("training: {push_to_hub: true}", "cfg.yaml", "set hub_model_id"),
        ("unfrozen_parameters: 3", "spectrum.yaml", "has no list unfrozen_parameters"),
    ],
)
def test_mistakes_in_a_file_name_file_and_key(write: Write, text: str, name: str, sentence: str) -> None:
    flag = "--layers_to_unfreeze" if name == "spectrum.yaml" else "--config_file"
    with pytest.raises(LimbeckError) as caught:
        arguments(flag, str(write(text, name)))
    assert sentence in str(caught.value)


def test_an_empty_file_is_allowed(write: Write) -> None:
    assert arguments("--config_file", str(write("", "cfg.yaml"))) == arguments()
