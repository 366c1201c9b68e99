"""The dialect of NeMo-RL: upstream's files, the fork's keys, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from limbeck.config import LoadedConfig, load_config, render_config
from limbeck.config.dialects.nemo_rl import DIALECT
from limbeck.config.dialects.nemo_rl_table import FIXED, NO_MEANING
from limbeck.errors import LimbeckError
from limbeck.strategies.parallel_dims import ParallelDims

Load = Callable[..., LoadedConfig]
Mistakes = Callable[..., list[str]]

REFERENCES = Path(__file__).resolve().parents[3] / "shared" / "references" / "configs" / "nemo-rl"

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "configs" / "distillation_math_cl.yaml"
CALCULATOR = Path(__file__).resolve().parents[2] / "examples" / "rollout" / "calculator.py"

UPSTREAM = """
distillation: {num_prompts_per_step: 16, num_generations_per_prompt: 2, max_num_steps: 7, val_period: 5, topk_logits_k: 8}
loss_fn: {kl_type: reverse, zero_outside_topk: true}
policy: &model
  model_name: small
  tokenizer: {name: "${..model_name}", chat_template: null}
  precision: bfloat16
  train_global_batch_size: 16
  train_micro_batch_size: 2
  max_total_sequence_length: 64
  make_sequence_length_divisible_by: "${mul:${.dtensor_cfg.tensor_parallel_size}, 6}"
  max_grad_norm: null
  dtensor_cfg: {enabled: true, tensor_parallel_size: 2, context_parallel_size: 1, activation_checkpointing: true}
  megatron_cfg: {enabled: false, anything: 1}
  dynamic_batching: {enabled: true, train_mb_tokens: 128, sequence_length_round: 8}
  sequence_packing: {enabled: false, train_mb_tokens: 1}
  optimizer: {name: torch.optim.AdamW, kwargs: {lr: 1e-4, betas: [0.8, 0.99], fused: false}}
  scheduler:
    - {name: torch.optim.lr_scheduler.LinearLR, kwargs: {start_factor: 0.5, total_iters: 3}}
    - {name: torch.optim.lr_scheduler.ConstantLR, kwargs: {factor: 1.0}}
    - milestones: [3]
  generation: {backend: hf, max_new_tokens: 32, temperature: 0.7, top_k: null, stop_strings: [stop], port_range_low: 3000}
teacher:
  <<: *model
  model_name: large
  dtensor_cfg: {enabled: true, tensor_parallel_size: 4, context_parallel_size: 1}
data:
  train: {dataset_name: DeepScaler}
  validation: {dataset_name: gsm8k, split: test}
  default: {prompt_file: ask.txt, env_name: math}
checkpointing: {enabled: true, checkpoint_dir: ckpt, metric_name: "train:loss", higher_is_better: false, save_period: 4}
logger: {log_dir: logs, tensorboard_enabled: true}
cluster: {gpus_per_node: 8, num_nodes: 1}
"""

FORK = """
distillation: {lambda: 0.9, kl_type: forward, max_length: 48}
data: {dataset_name: math_cl, prompt_template: math_distillation}
student: &model
  model_name: small
  tokenizer: small
  max_total_sequence_length: 64
  precision: float32
  train_global_batch_size: 8
  name_prefix: distillation_policy
  dtensor_cfg: {enabled: true, tensor_parallel_size: 1, context_parallel_size: 1, sequence_parallel: false,
                activation_checkpointing: false, cpu_offload: false, custom_parallel_plan: null}
  dynamic_batching: {enabled: false, train_mb_tokens: 16384}
  sequence_packing: {enabled: false, train_mb_tokens: 16384}
teacher: {<<: *model, model_name: large}
cluster: {enabled: true, num_nodes: 1, gpus_per_node: 2}
"""


@pytest.fixture(autouse=True)
def _prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "ask.txt").write_text("Q: {}")


def test_the_settings_of_upstream_become_those_of_limbeck(load: Load, tmp_path: Path) -> None:
    loaded = load(yaml=UPSTREAM)
    config, student, training = loaded.config, loaded.config.student, loaded.config.student.training_args
    assert loaded.dialect == "nemo_rl"
    assert (config.student_pretrain, config.teacher_pretrain, config.tokenizer) == ("small", "large", None)
    assert (config.kd_objective, config.logits_topk, config.logits_topk_tail) == ("reverse_kl", 8, "zero")
    assert (config.distill_loss_weight, config.kd_temperature, config.temperature_squared) == (1.0, 0.7, False)
    rollout = config.rollout
    assert rollout is not None
    assert (rollout.on_policy_fraction, rollout.num_generations, rollout.max_new_tokens) == (1.0, 2, 32)
    assert (rollout.temperature, rollout.top_k, rollout.stop_strings, rollout.generator) == (0.7, 0, ["stop"], "hf")
    # 32 samples are two optimizer steps of 16: 4 data-parallel ranks x 2 rows x 2 micro-batches
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 2)
    assert (config.max_steps, config.eval_steps, config.save_steps) == (14, 10, 8)
    assert rollout.steps_per_rollout == 2
    assert any("trains 2 optimizer steps" in notice for notice in loaded.notices)
    assert training.lr_scheduler_kwargs == {
        "schedulers": [
            {"name": "LinearLR", "start_factor": 0.5, "total_iters": 3},
            {"name": "ConstantLR", "factor": 1.0},
        ],
        "milestones": [3],
        "interval": 2,
    }
    assert (training.learning_rate, training.adam_beta1, training.adam_beta2) == (1e-4, 0.8, 0.99)
    assert config.max_grad_norm == 0
    assert (config.max_tokens_per_microbatch, student.sequence_length_round_in_train) == (128, 24)
    sizes = [role.strategy_args.strategy_config.tensor_model_parallel_size for role in (student, config.teacher)]
    assert (sizes, student.device_mapping, config.needs_worker_groups) == ([2, 4], list(range(8)), False)
    assert student.model_args.disable_gradient_checkpointing is False
    assert student.data_args.template == "empty"
    assert student.data_args.prompt_file == str(tmp_path / "prompts" / "ask.txt")
    (train,), (valid,) = config.data_sources, config.validation_sources
    assert (train.hub, train.question_key, train.answer_key) == (
        "agentica-org/DeepScaleR-Preview-Dataset",
        "problem",
        "answer",
    )
    assert (valid.hub, valid.config, valid.split) == ("openai/gsm8k", "main", "test")
    assert (config.checkpoint_config.best_metric, config.checkpoint_config.best_mode) == ("train/loss", "min")
    assert (config.output_dir, config.checkpoint_dir, config.resume_from_checkpoint) == ("logs", Path("ckpt"), True)
    assert config.tracker_kwargs == {"log_dir": "logs/tensorboard"}
    ignored = next(notice for notice in loaded.notices if "no effect in Limbeck" in notice)
    assert "policy.generation.port_range_low (run.yaml:" in ignored
    assert re.findall(r"teacher\.[\w.]+", ignored) == ["teacher.make_sequence_length_divisible_by"]  # of its own size
    assert loaded.origins["sequence_length"].startswith("derived from policy.max_total_sequence_length (run.yaml:")


def test_every_enabled_logger_is_a_tracker() -> None:
    logger = {
        "log_dir": "logs", "tensorboard_enabled": True, "wandb_enabled": True, "mlflow_enabled": True,
        "swanlab_enabled": True, "wandb": {"project": "p", "name": "n", "log_nemo_gym_full_result_tables": False},
        "mlflow": {"experiment_name": "e", "tracking_uri": "http://host"}, "swanlab": {"project": "s"},
    }  # fmt: skip
    source = {"policy": {"model_name": "s"}, "data": {"train": {"dataset_name": "gsm8k"}}, "logger": logger}
    translation = DIALECT.translate(source, {})
    assert translation.values["track_with"] == ["tensorboard", "wandb", "mlflow", "swanlab"]
    assert translation.values["tracker_kwargs"] == {
        "tensorboard": {"log_dir": "logs/tensorboard"},
        "wandb": {"project": "p", "name": "n"},
        "mlflow": logger["mlflow"],
        "swanlab": logger["swanlab"],
    }
    assert "logger.wandb.log_nemo_gym_full_result_tables" in translation.ignored


def test_validation_by_writing_becomes_keys_of_limbeck() -> None:
    source = {
        "distillation": {"max_val_samples": 50, "val_at_start": True, "val_at_end": False},
        "policy": {"model_name": "s", "generation": {"val_temperature": 0.5, "val_top_p": 0.9, "val_top_k": 3}},
        "data": {"train": {"dataset_name": "gsm8k"}, "validation": {"dataset_name": "AIME2024", "repeat": 16}},
        "env": {"math": {"num_workers": 2}},
        "logger": {"num_val_samples_to_print": 4},
        "checkpointing": {"enabled": True, "metric_name": "val:accuracy", "keep_top_k": 3}
        | {"checkpoint_must_save_by": "01:02:03:59"},
        "cluster": {"gpus_per_node": 1},
    }
    values = DIALECT.translate(source, {}).values
    rollout = {
        "max_samples": 4,
        "num_generations": 16,
        "print_samples": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
    }
    assert values["validation"] == {
        "at_start": True,
        "at_end": False,
        "rollout": rollout,
        "data_args": {"sources": [{"hub": "AIME2024"}]},
    }
    assert values["rollout"]["environment"] == "math"
    assert values["rollout"]["environment_kwargs"] == {"workers": 2}
    checkpoints = {"best_metric": "val/accuracy", "best_mode": "max", "keep_best": 3, "save_before": "26:03"}
    assert values["checkpoint_config"] == checkpoints
    assert values["max_ckpt_to_keep"] == 1


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("train:loss", "train/loss"),
        ("train:grad_norm", "student/grad_norm"),
        ("train:mean_gen_tokens_per_sample", "rollout/mean_length"),
        ("train:rollout/reward", "rollout/reward"),
        ("train:mean_total_reward", "rollout/reward"),
        ("train:student/grad_norm", "student/grad_norm"),
        ("val:accuracy", "val/accuracy"),
        ("val:val/kd", "val/kd"),
        ("val:avg_length", "val/mean_length"),
    ],
)
def test_a_metric_has_the_name_of_either_system(load: Load, name: str, ours: str) -> None:
    higher = "checkpointing.higher_is_better=true"
    assert load(f"checkpointing.metric_name={name}", higher, yaml=UPSTREAM).config.checkpoint_config.best_metric == ours


@pytest.mark.parametrize("metric", ["val:accuracy", "train:mean_total_reward"])
def test_a_metric_of_checked_answers_needs_an_environment(mistakes: Mistakes, metric: str) -> None:
    keys = (f"++checkpointing.metric_name='{metric}'", "++data.validation.dataset_name=gsm8k")
    (line,) = mistakes(*keys, "++checkpointing.higher_is_better=true", yaml=FORK)
    assert f"checkpointing.metric_name = {metric} needs an environment" in line
    assert line.endswith("add env: {math: {}}.")


def test_the_keys_of_the_fork_are_read_too(load: Load) -> None:
    config = load(yaml=FORK).config
    assert config.rollout is not None
    assert (config.rollout.on_policy_fraction, config.rollout.max_new_tokens) == (0.9, 48)
    assert (config.kd_objective, config.sequence_length, config.logits_topk) == ("forward_kl", 64, 64)
    assert config.student.training_args.gradient_accumulation_steps == 4
    assert [source.hub for source in config.data_sources] == ["pe-nlp/math-cl"]
    assert config.student.data_args.prompt_file is not None
    assert config.student.data_args.prompt_file.endswith("examples/prompts/math_distillation.txt")
    assert (config.student.model_args.dtype, config.validation) == ("fp32", None)


SPELLINGS = [
    (UPSTREAM, "distillation.kl_type", "forward", "loss_fn.kl_type", "reverse", {"kd_objective": "forward_kl"}),
    (FORK, "loss_fn.kl_type", "reverse", "distillation.kl_type", "forward", {"kd_objective": "reverse_kl"}),
    (
        UPSTREAM.replace("reverse", "mixed, mixed_kl_weight: 0.3"),
        "distillation.mixed_kl_weight",
        "0.7",
        "loss_fn.mixed_kl_weight",
        "0.3",
        {"kd_objective_kwargs": {"forward": 0.7}},
    ),
    (
        UPSTREAM,
        "distillation.zero_outside_topk",
        "false",
        "loss_fn.zero_outside_topk",
        "true",
        {"logits_topk_tail": "renormalize"},
    ),
    (UPSTREAM, "distillation.max_steps", "5", "distillation.max_num_steps", "7", {"max_steps": 10}),
    (UPSTREAM, "distillation.eval_steps", "3", "distillation.val_period", "5", {"eval_steps": 6}),
    (UPSTREAM, "distillation.save_steps", "3", "checkpointing.save_period", "4", {"save_steps": 6}),
    (
        UPSTREAM,
        "distillation.teacher_model_path",
        "other",
        "teacher.model_name",
        "large",
        {"teacher_pretrain": "other"},
    ),
    (
        UPSTREAM,
        "data.dataset_name",
        "math_cl",
        "data.train.dataset_name",
        "DeepScaler",
        {"student.data_args.sources": [{"hub": "math_cl"}]},
    ),
    (
        UPSTREAM.replace("dataset_name: DeepScaler", "dataset_name: math_cl, max_samples: 9"),
        "data.max_samples",
        "5",
        "data.train.max_samples",
        "9",
        {"student.data_args.sources": [{"hub": "math_cl", "max_samples": 5}]},
    ),
    (
        UPSTREAM,
        "data.prompt_template",
        "math_distillation",
        "data.default.prompt_file",
        "ask.txt",
        {"student.data_args.prompt_file": str(EXAMPLE.parents[1] / "prompts" / "math_distillation.txt")},
    ),
]
"""A file, the spelling that it does not have with another value, the one that it has with its value, and what is set."""


@pytest.mark.parametrize(
    ("yaml", "key", "value", "other", "present", "expected"), SPELLINGS, ids=[one[1] for one in SPELLINGS]
)
def test_of_two_spellings_the_one_of_the_command_line_counts(
    load: Load, mistakes: Mistakes, yaml: str, key: str, value: str, other: str, present: str, expected: dict[str, Any]
) -> None:
    loaded = load(f"++{key}={value}", yaml=yaml)
    assert {path: attrgetter(path)(loaded.config) for path in expected} == expected
    assert f"{other} (run.yaml:" in loaded.notices[0]
    lines = mistakes(f"++{key}={value}", f"{other}={present}", yaml=yaml)
    assert any("contradicts" in line and key in line and f"{other} = {present}" in line for line in lines), lines


def test_different_spellings_in_a_file_contradict_each_other(mistakes: Mistakes) -> None:
    (line,) = mistakes(yaml=UPSTREAM.replace("distillation: {", "distillation: {kl_type: forward, "))
    assert line == (
        "run.yaml:1: distillation.kl_type = forward contradicts loss_fn.kl_type = reverse (run.yaml:2), which sets the same; "
        "set one of them only."
    )


def test_equal_spellings_are_one_setting(load: Load) -> None:
    same = [f"++{key}={present}" for yaml, key, _, _, present, _ in SPELLINGS if yaml == UPSTREAM]
    same += ["++data.prompt_template=ask"]  # which names the same file
    loaded, plain = load(*same, yaml=UPSTREAM), load(yaml=UPSTREAM)
    assert (loaded.config, loaded.notices) == (plain.config, plain.notices)


def test_the_maximum_length_sets_the_lengths(load: Load, mistakes: Mistakes) -> None:
    def lengths(*overrides: str) -> tuple[int | None, int | None]:
        config = load_config(EXAMPLE, overrides).config
        return config.sequence_length, config.rollout and config.rollout.max_new_tokens

    assert lengths() == (2048, 1536)
    assert lengths("distillation.max_length=512") == (512, 512)
    assert lengths("distillation.max_length=512", "policy.generation.max_new_tokens=512") == (512, 512)
    assert lengths("distillation.max_length=240", "policy.generation.max_new_tokens=8") == (240, 8)
    assert lengths("distillation.max_length=8", "policy.max_total_sequence_length=240") == (240, 8)
    assert lengths("policy.generation.max_new_tokens=256") == (2048, 256)
    assert lengths("policy.max_total_sequence_length=1024") == (1024, 1536)
    assert "distillation.max_length (run.yaml:" in load("++student.generation.max_new_tokens=32", yaml=FORK).notices[0]
    loaded = load("++distillation.max_length=48", yaml=UPSTREAM)
    assert (loaded.config.sequence_length, loaded.config.rollout.max_new_tokens) == (48, 48)
    assert "policy.max_total_sequence_length (run.yaml:" in loaded.notices[0]
    (line,) = mistakes(yaml=UPSTREAM.replace("distillation: {", "distillation: {max_length: 48, "))
    assert "distillation.max_length = 48 contradicts policy.max_total_sequence_length = 64 (run.yaml:" in line
    three = (
        "++distillation.max_length=48",
        "policy.max_total_sequence_length=64",
        "policy.generation.max_new_tokens=32",
    )
    (line,) = mistakes(*three, yaml=UPSTREAM)
    assert "distillation.max_length = 48 contradicts policy.max_total_sequence_length = 64 (command line)" in line


def test_saving_without_a_section_of_checkpoints(load: Load) -> None:
    assert load("++distillation.save_steps=6", yaml=FORK).config.save_steps == 6
    loaded = load("++distillation.save_steps=6", "++checkpointing.enabled=false", yaml=FORK)
    assert loaded.config.save_steps == 0
    assert "distillation.save_steps (command line)" in loaded.notices[0]


@pytest.mark.parametrize(
    ("overrides", "unused"),
    [
        (["++data.train={dataset_name: gsm8k, split: test}", "++data.split=a"], ["data.dataset_name", "data.split"]),
        (["++data.train=[{dataset_name: gsm8k},{dataset_name: DeepScaler}]"], ["data.dataset_name"]),
        (["++data.train.max_samples=5", "++data.default.max_samples=7"], ["data.default.max_samples"]),
    ],
)
def test_a_key_that_no_dataset_reads_is_in_the_notice(load: Load, overrides: list[str], unused: list[str]) -> None:
    notice = load(*overrides, yaml=FORK).notices[0]
    assert re.findall(r"(data[\w.]+) \(", notice) == unused


@pytest.mark.parametrize(
    ("override", "value", "expected"),
    [
        ("data.train.data_path", "rows.jsonl", {"path": ["rows.jsonl"], "question_key": "problem", "answer_key": None}),
        (
            "data.train",
            "{dataset_name: pe-nlp/math-cl, data_path: rows.jsonl, input_key: question}",
            {"path": ["rows.jsonl"], "question_key": "question", "answer_key": "ground_truth_answer"},
        ),
        ("data.train.dataset_name", "rows.jsonl", {"path": ["rows.jsonl"]}),
        ("data.train.dataset_name", "pe-nlp/math-cl", {"hub": "pe-nlp/math-cl", "answer_key": "ground_truth_answer"}),
        (
            "data.train",
            "{dataset_name: ResponseDataset, data_path: rows.jsonl, input_key: q}",
            {"path": ["rows.jsonl"], "question_key": "q", "answer_key": "output"},
        ),
        (
            "data.train",
            "{dataset_name: openai_format, data_path: own/chats}",
            {"hub": "own/chats", "format": "messages"},
        ),
        ("data.train.output_key", "solution", {"answer_key": "solution"}),
        ("data.train.split", "train[:95%]", {"split": "train[:95%]"}),
    ],
)
def test_a_dataset_is_a_name_or_a_file(load: Load, override: str, value: str, expected: dict[str, Any]) -> None:
    (source,) = load(f"{override}={value}", yaml=UPSTREAM).config.data_sources
    assert {key: getattr(source, key) for key in expected} == expected


def test_a_file_of_data_itself_does_not_replace_another_dataset(load: Load) -> None:
    config = load(
        "++data.data_path=rows.jsonl", "++data.output_key=a", "++data.validation.dataset_name=gsm8k", yaml=FORK
    ).config
    (train,), (valid,) = config.data_sources, config.validation_sources
    assert (train.path, train.question_key, train.answer_key) == (["rows.jsonl"], "problem", "a")
    assert (valid.path, valid.hub, valid.answer_key) == (None, "openai/gsm8k", "answer")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "policy.train_global_batchsize=8",
            "policy.train_global_batchsize is not a key of NeMo-RL's distillation; did you",
        ),
        ("distilation={}", "distilation is not a section of NeMo-RL's distillation; did you mean distillation?"),
        ("teacher.megatron_cfg.enabled=true", "teacher.megatron_cfg.enabled = true (Megatron) is not supported yet"),
        ("policy.optimizer.name=torch.optim.SGD", "policy.optimizer.name = torch.optim.SGD is not supported yet"),
        (
            "policy.train_global_batch_size=12",
            "policy.train_global_batch_size = 12 cannot be divided into micro-batches",
        ),
        ("policy.train_global_batch_size=64", "policy.train_global_batch_size = 64 does not divide the 32 samples"),
        ("policy.train_micro_batch_size=none", "policy.train_micro_batch_size = none must be a whole number"),
        (
            "++policy.dtensor_cfg.dp_replicate_size=4",
            "dp_replicate_size = 4 must divide the 4 data parallel ranks and be",
        ),
        (
            "++teacher.dtensor_cfg.dp_replicate_size=3",
            "dp_replicate_size = 3 must divide the 2 data parallel ranks and be",
        ),
        ("policy.dtensor_cfg.context_parallel_size=3", "policy.dtensor_cfg.tensor_parallel_size = 2 times"),
        ("policy.sequence_packing.enabled=true", "policy.sequence_packing.enabled = true contradicts dynamic_batching"),
        (
            "policy.generation.backend=megatron",
            "policy.generation.backend = megatron is not supported; use vllm, or hf",
        ),
        ("loss_fn.kl_type=jsd", "loss_fn.kl_type = jsd is not one of forward, reverse, mixed"),
        (
            "data.train.dataset_name=DeepScale",
            "data.train.dataset_name = DeepScale is not a dataset that Limbeck knows",
        ),
        ("data.train.repeat=2", "data.train.repeat = 2 repeats training data"),
        ("data.validation.prompt_file=other.txt", "data.default.prompt_file is not the same for all datasets"),
        ("data.default.prompt_file=none.txt", "data.default.prompt_file = none.txt is not a text file"),
        ("checkpointing.metric_name='val:'", "checkpointing.metric_name = val: must be val: or train: and the name"),
        ("checkpointing.metric_name='train:global_valid_seqs'", "the nearest metric is train:global_valid_toks"),
        (
            "checkpointing.metric_name='train:natural_termination_rate'",
            "= train:natural_termination_rate is not measured in Limbeck; the nearest metric is train:truncation_rate with",
        ),
        ("checkpointing.metric_name=accuracy", "checkpointing.metric_name = accuracy must be val: or train:"),
        ("checkpointing.checkpoint_must_save_by='3:30'", "checkpointing.checkpoint_must_save_by = 3:30 must be a time"),
        ("policy.generation.top_p=2", "policy.generation.top_p: rollout.top_p = 2 must be at most 1"),
        ("policy.scheduler.0.kwargs=7", "policy.scheduler has the entry {"),
    ],
)
def test_an_unsupported_setting_is_refused_by_its_own_name(mistakes: Mistakes, override: str, sentence: str) -> None:
    lines = mistakes(override, yaml=UPSTREAM)
    assert any(sentence in line and line.startswith(("command line: ", "run.yaml:")) for line in lines), lines


@pytest.mark.parametrize(
    "key",
    [
        "checkpointing.higher_is_better",
        "++checkpointing.enabled",
        "++logger.wandb_enabled",
        "loss_fn.zero_outside_topk",
        "policy.dtensor_cfg.activation_checkpointing",
        "policy.dynamic_batching.enabled",
        "policy.megatron_cfg.enabled",
    ],
)
def test_a_flag_is_true_or_false(mistakes: Mistakes, key: str) -> None:
    (line,) = mistakes(f"{key}=maybe", yaml=UPSTREAM)
    assert line == f"command line: {key.strip('+')} = maybe is not true or false."


def test_an_empty_direction_of_the_metric_is_refused(mistakes: Mistakes) -> None:
    (line,) = mistakes("checkpointing.higher_is_better=null", yaml=UPSTREAM)
    assert line == "command line: checkpointing.higher_is_better = null is not true or false."


@pytest.mark.parametrize("key", ["gpus_per_node", "num_nodes"])
@pytest.mark.parametrize("value", ["x", "0"])
def test_a_wrong_number_of_devices_is_one_error(mistakes: Mistakes, key: str, value: str) -> None:
    (line,) = mistakes(f"cluster.{key}={value}", yaml=UPSTREAM)
    assert line == f"command line: cluster.{key} = {value} must be a whole number of at least 1."


def test_a_missing_number_of_devices_is_one_error(mistakes: Mistakes) -> None:
    (line,) = mistakes("cluster.gpus_per_node=null", yaml=UPSTREAM)
    assert line.startswith("command line: cluster.gpus_per_node is not set; set it")


def test_missing_training_data_is_one_error_that_names_it(mistakes: Mistakes) -> None:
    (line,) = mistakes("data.train=null", yaml=UPSTREAM)
    assert line.startswith("command line: data.train is not set; name a dataset")
    (line,) = mistakes("data.train=null", "++logger.wandb={name: '${data.train.dataset_name}'}", yaml=UPSTREAM)
    assert line == (
        "command line: logger.wandb.name cannot be resolved: it refers to data.train.dataset_name, and data.train is missing "
        "or not a section of keys; set data.train.dataset_name."
    )


def test_a_data_path_is_text(mistakes: Mistakes) -> None:
    (line,) = mistakes("data.default.data_path=5", yaml=UPSTREAM)
    assert line.startswith("command line: data.default.data_path = 5 is not text")


def test_every_fixed_setting_is_refused_with_another_value(mistakes: Mistakes) -> None:
    inside = {"": "", "dataset": "data.train."}
    paths = [
        f"{inside.get(section, f'{section}.')}{key}"
        for section, keys in FIXED.items()
        for key in keys
        if key != "teachers" and "lora_cfg" not in section
    ]
    lines = mistakes(*(f"++{path}=something" for path in paths), yaml=UPSTREAM)
    for path in paths:
        assert any(f"command line: {path} = something " in line for line in lines), path


def test_no_ignored_setting_stops_a_run(load: Load) -> None:
    inside = {"dataset": "data.train"}
    paths = [
        f"{inside.get(section, section)}.{key}"
        for section, keys in NO_MEANING.items()
        for key in keys
        if "lora_cfg" not in section and section not in ("policy.sequence_packing", "policy.tokenizer")
    ]
    notices = load(*(f"++{path}=1" for path in paths), yaml=UPSTREAM).notices
    ignored = next(notice for notice in notices if "no effect in Limbeck" in notice)
    assert all(f"{path} (command line)" in ignored for path in paths)


def test_offloading_and_a_plan_belong_to_the_strategies_of_both_models(load: Load) -> None:
    dtensor = "++{0}.dtensor_cfg.cpu_offload=true", "++{0}.dtensor_cfg.custom_parallel_plan=own.{0}.plan"
    config = load(*(key.format(role) for role in ("policy", "teacher") for key in dtensor), yaml=UPSTREAM).config
    for role, worker in (("policy", config.student), ("teacher", config.teacher)):
        strategy = worker.strategy_args.strategy_config
        assert (strategy.offload_policy, strategy.tensor_parallel_plan) == (True, f"own.{role}.plan")
    student = load("++policy.dtensor_cfg.cpu_offload=true", yaml=UPSTREAM).config.student
    assert student.strategy_args.strategy_config.offload_policy


@pytest.mark.parametrize("yaml", [UPSTREAM, FORK, FORK.replace("teacher: {<<: *model, model_name: large}", "")])
def test_copies_of_the_models_are_groups_of_ranks_that_share_one(load: Load, yaml: str) -> None:
    policy = "policy" if yaml == UPSTREAM else "student"
    sizes = [f"{policy}.dtensor_cfg.context_parallel_size=2", f"{policy}.train_global_batch_size=64"]
    sizes += [f"++{role}.dtensor_cfg.dp_replicate_size=2" for role in (policy, "teacher") if f"\n{role}:" in yaml]
    sizes += ["cluster.gpus_per_node=32", "++distillation.num_prompts_per_step=64"]
    config = load(
        *sizes, *([] if "\nteacher:" in yaml else ["++distillation.teacher_model_path=large"]), yaml=yaml
    ).config
    for role, worker in (("student", config.student), ("teacher", config.teacher)):
        dims = ParallelDims.from_config(worker.strategy_args.strategy_config, 32, role)
        assert (dims.dp_replicate, dims.size) == (2, 32) and dims.dp_shard > 1


def test_an_environment_of_a_plug_in_has_its_turns_and_arguments(load: Load, mistakes: Mistakes) -> None:
    turns = "++distillation.max_rollout_turns=3"
    named = (
        f"++plugins=[{CALCULATOR}]",
        "data.default.env_name=calculator",
        "++env.calculator={answer_key: a, max_calls: 2}",
    )
    rollout = load(turns, *named, "++env.math={num_workers: 2}", yaml=UPSTREAM).config.rollout
    assert rollout is not None
    assert (rollout.environment, rollout.max_turns) == ("calculator", 3)
    assert rollout.environment_kwargs == {"answer_key": "a", "max_calls": 2}
    (line,) = mistakes(turns, yaml=UPSTREAM)
    assert "distillation.max_rollout_turns" in line
    assert "= 3 needs an environment that replies, and math does not" in line
    (line,) = mistakes("data.default.env_name=sliding_puzzle", yaml=UPSTREAM)
    assert "data.default.env_name = sliding_puzzle is not a known environment; use one of" in line


def test_keys_of_the_teacher_that_are_not_read_are_in_the_notice_if_they_differ(load: Load) -> None:
    for key, value in (
        ("tokenizer.name", "other"),
        ("generation.temperature", "0.3"),
        ("train_global_batch_size", "4"),
    ):
        ignored = load(f"++teacher.{key}={value}", yaml=UPSTREAM).notices[0]
        found = set(re.findall(r"(teacher\.[\w.]+) \(command line\)", ignored))
        assert found == {f"teacher.{key}"}
    assert not any("teacher" in notice for notice in load(yaml=FORK).notices)


def test_a_variable_may_stand_beside_the_sections(load: Load) -> None:
    assert load("++who=tiny", "policy.model_name=${who}", yaml=UPSTREAM).config.student_pretrain == "tiny"


def test_only_files_of_nemo_rl_are_recognised() -> None:
    assert not DIALECT.recognises({"student_pretrain": "s", "teacher": {"model_args": {}}})
    assert not DIALECT.recognises({"distillation": {}, "student": {"model_args": {}}})
    assert DIALECT.recognises({"distillation": {}, "student": {"model_name": "s"}})


def test_several_teachers_are_refused_in_one_sentence(mistakes: Mistakes) -> None:
    (line,) = mistakes("teachers=[{model_name: x}]", yaml=UPSTREAM)
    assert line.startswith("command line: teachers: off-policy distillation from several teachers")


@pytest.mark.skipif(not REFERENCES.is_dir(), reason="the reference configurations are not here")
@pytest.mark.parametrize("file", sorted(REFERENCES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_the_reference_configurations_load_unchanged(file: Path, tmp_path: Path) -> None:
    loaded = load_config(file)
    assert loaded.dialect == "nemo_rl"
    config = loaded.config
    assert (config.student.data_args.sources, config.logits_topk) == ([{"hub": "DeepScaler"}], 64)
    whole = tmp_path / "whole.yaml"
    whole.write_text(render_config(loaded))
    assert load_config(whole).config == config


@pytest.mark.parametrize(
    "override",
    [
        "loss_fn.kl_type=[forward]",
        "checkpointing.metric_name=[val:accuracy]",
        "policy.tokenizer.chat_template=[a]",
        "data.train.dataset_name=[DeepScaler]",
        "++data.validation.repeat=[2]",
        "data.default.env_name={a: 1}",
    ],
)
def test_a_list_or_section_in_place_of_a_value_is_refused_in_one_sentence(mistakes: Mistakes, override: str) -> None:
    (line,) = mistakes(override, yaml=UPSTREAM)
    key = override.partition("=")[0].strip("+")
    assert line.startswith(f"command line: {key} = ")
    assert line.endswith(" must be one value, not a list or a section of keys.")


def test_a_file_that_cannot_be_read_as_sections_is_an_error(mistakes: Mistakes) -> None:
    assert any(
        "policy.optimizer = 7 must be a section of keys" in line
        for line in mistakes("policy.optimizer=7", yaml=UPSTREAM)
    )
    (line,) = mistakes("policy.dynamic_batching=true", yaml=UPSTREAM)
    assert "policy.dynamic_batching = true must be a section of keys" in line


def test_arguments_are_refused() -> None:
    with pytest.raises(LimbeckError, match="reads YAML files"):
        DIALECT.translate(["--config", "x"], {})
