from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from limbeck.config import DistillConfig, render_schema
from limbeck.config.foreign_keys import FOREIGN_KEYS
from limbeck.config.schema import walk_keys
from limbeck.config.validation_errors import explain_unknown_key


def config(**changes: Any) -> DistillConfig:
    student = {"data_args": {"file_name": "data.json"}, **changes.pop("student", {})}
    return DistillConfig(**{"student_pretrain": "small", "teacher_pretrain": "large", "student": student, **changes})


@pytest.mark.processes
def scheduled(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs}


def test_loading_a_configuration_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "student_pretrain: s\nteacher_pretrain: t\nstudent: {data_args: {file_name: d}}\n"
    )
    program = (
        "import sys; from limbeck.config import load_config; load_config('run.yaml');"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False).returncode == 0


def test_every_key_has_a_sentence_and_a_place_in_the_schema_table() -> None:
    table = render_schema()
    for path, field in walk_keys(DistillConfig):
        assert (field.description or "").endswith("."), path
        assert f"| `{path}` |" in table
    assert all(line.replace("\\|", "").count("|") == 5 for line in table.splitlines())


def test_pretrain_fills_only_what_is_unset() -> None:
    filled = config()
    assert filled.student.model_args.model_name_or_path == "small"
    assert filled.teacher.model_args.model_name_or_path == "large"
    other = config(teacher_pretrain=None, teacher={"model_args": {"model_name_or_path": "mine"}})
    assert other.teacher.model_args.model_name_or_path == "mine"
    with pytest.raises(ValidationError, match="keep one"):
        config(teacher={"model_args": {"model_name_or_path": "mine"}})


@pytest.mark.parametrize(
    ("convention", "kd", "teacher", "effective"),
    [
        ("absolute", 2.0, None, 2.0),
        ("absolute", 2.0, 3.0, 3.0),
        ("roll", 2.0, None, 2.0),
        ("roll", 2.0, 3.0, 6.0),
    ],
)
def test_teacher_temperature_follows_its_convention(
    convention: Any, kd: float, teacher: float | None, effective: float
) -> None:
    made = config(kd_temperature=kd, teacher_temperature=teacher, temperature_convention=convention)
    assert made.effective_teacher_temperature == effective


def test_a_student_without_teacher_needs_a_weight_of_zero() -> None:
    assert not config(teacher_pretrain=None, distill_loss_weight=0).has_teacher
    with pytest.raises(ValidationError, match="distill_loss_weight: 0"):
        config(teacher_pretrain=None)


def test_a_model_from_scratch_needs_a_type_and_a_tokenizer_instead_of_a_checkpoint() -> None:
    scratch = {"model_args": {"from_scratch": True, "model_config_kwargs": {"model_type": "llama"}}}
    made = config(student_pretrain=None, student=scratch, tokenizer="tok")
    assert made.tokenizer_name_or_path == "tok"
    with pytest.raises(ValidationError, match="tokenizer is not set"):
        config(student_pretrain=None, student=scratch, teacher_pretrain=None, distill_loss_weight=0)


def test_one_pass_is_the_length_when_nothing_says_otherwise() -> None:
    assert config().num_train_epochs == 1.0
    assert config(max_steps=5).num_train_epochs is None
    assert config(max_steps=5, student={"training_args": {"num_train_epochs": 0.5}}).num_train_epochs == 0.5


def test_folders_and_files_fall_back_to_the_broader_key() -> None:
    made = config(output_dir="out")
    assert (made.checkpoint_dir, made.log_dir) == (Path("out"), Path("out/logs"))
    made = config(output_dir="out", logging_dir="logs", checkpoint_config={"output_dir": "ckpt"})
    assert (made.checkpoint_dir, made.log_dir) == (Path("ckpt"), Path("logs"))
    assert config().validation_sources == []
    (named,) = config(validation={"data_args": {"file_name": "v.json"}}).validation_sources
    assert named.path == ["v.json"]
    (beside,) = config(student={"data_args": {"file_name": "d", "eval_file_name": "e"}}).validation_sources
    assert beside.path == ["e"]


def test_naming_devices_once_is_enough() -> None:
    assert config(teacher={"device_mapping": "range(2)"}).device_mapping == [0, 1]
    assert config(student={"device_mapping": "0,1"}, teacher={"device_mapping": [0, 1]}).device_mapping == [0, 1]
    assert config().device_mapping is None


def test_roles_with_devices_of_their_own_are_groups_with_environments_of_their_own() -> None:
    student, teacher = {"device_mapping": [0, 1]}, {"device_mapping": [2], "system_envs": {"A": "2"}}
    made = config(system_envs={"B": "0"}, student={**student, "system_envs": {"A": "1"}}, teacher=teacher)
    assert made.needs_worker_groups and made.environment == {"B": "0"}
    assert not config(student=student, teacher={"device_mapping": "0,1"}).needs_worker_groups
    assert not config(student=student).needs_worker_groups
    assert not config(
        student=student, teacher=teacher, teacher_pretrain=None, distill_loss_weight=0
    ).needs_worker_groups


def test_environments_are_merged_and_must_not_contradict() -> None:
    made = config(system_envs={"A": 0}, student={"system_envs": {"B": "x"}}, teacher={"system_envs": {"A": "0"}})
    assert made.environment == {"A": "0", "B": "x"}
    with pytest.raises(ValidationError, match="share one process"):
        config(system_envs={"A": 0}, teacher={"system_envs": {"A": 1}})


def test_a_registered_objective_is_an_objective() -> None:
    from limbeck.objectives import divergences

    @divergences.register
    def upside_down_kl() -> Any:
        raise NotImplementedError

    assert config(kd_objective="upside_down_kl").kd_objective == "upside_down_kl"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"student": {"use_dynamic_batching_in_train": True}}, "needs student.max_tokens_per_microbatch_in_train"),
        (
            {"student": {"use_dynamic_batching_in_train": True, "max_tokens_per_microbatch_in_train": 100}},
            "cannot hold one row",
        ),
        ({"student": {"training_args": {"lr_scheduler_type": "cosine_with_min_lr"}}}, "needs min_lr or min_lr_rate"),
        ({"student": {"training_args": {"lr_scheduler_kwargs": {"min_lr": 1}}}}, "which reads none"),
        (
            {"student": {"training_args": scheduled("cosine_with_min_lr", min_lr=1)}},
            "lr_scheduler_kwargs.min_lr = 1 must not be above learning_rate = 5e-05",
        ),
        (
            {
                "max_steps": 10,
                "student": {"training_args": {"warmup_ratio": 0.5, **scheduled("megatron", decay_steps=5)}},
            },
            "warmup_ratio = 0.5, which is 5 steps, must be below student.training_args.lr_scheduler_kwargs.decay_steps = 5",
        ),
        (
            {"max_steps": 10, "student": {"training_args": {"warmup_steps": 10, **scheduled("megatron")}}},
            "warmup_steps = 10 must be below max_steps = 10, where the decay ends",
        ),
        ({"student": {"strategy_args": {"strategy_name": "fsdp2_infer"}}}, "use fsdp2_train"),
        ({"teacher": {"strategy_args": {"strategy_name": "fsdp2_train"}}}, "use fsdp2_infer"),
        (
            {"student": {"strategy_args": {"strategy_config": {"replicate": True, "fsdp_size": 2}}}},
            "contradicts fsdp_size",
        ),
        ({"num_nodes": 2, "student": {"device_mapping": [0]}}, "set num_gpus_per_node too"),
        (
            {"num_gpus_per_node": 2, "student": {"device_mapping": [0]}, "teacher": {"device_mapping": [2]}},
            "teacher.device_mapping has device 2",
        ),
        (
            {
                "student": {"device_mapping": [0]},
                "teacher": {"device_mapping": [1]},
                "features": {"pairs": [["layers.0", "layers.1"]]},
            },
            "not sent between worker groups",
        ),
        ({"tracker_kwargs": {"project": "p"}}, "tracker_kwargs.project is not read by track_with = tensorboard"),
        (
            {"track_with": "wandb", "tracker_kwargs": {"api_key": "k"}},
            "is a secret, which is not read from a file; set WA",
        ),
        ({"track_with": ["wandb", "mlfow"]}, "has mlfow, which is not a known tracker; did you mean mlflow?"),
        (
            {"track_with": ["wandb", "mlflow"], "tracker_kwargs": {"wandb": {"projct": "p"}}},
            "tracker_kwargs.wandb.projct is not read by track_with = wandb",
        ),
        (
            {"track_with": ["wandb", "mlflow"], "tracker_kwargs": {"project": "p"}},
            "tracker_kwargs.project is not one of the trackers .wandb, mlflow.;",
        ),
        (
            {"track_with": ["wandb"], "tracker_kwargs": {"wandb": "p"}},
            "tracker_kwargs.wandb must be a section with the arguments of wandb",
        ),
        ({"student": {"model_args": {"additional_target": "lm_head"}}}, "set student.model_args.lora_target too"),
        (
            {
                "validation": {"data_args": {"file_name": "v"}},
                "student": {"data_args": {"file_name": "d", "eval_file_name": "e"}},
            },
            "keep one",
        ),
    ],
)
def test_contradictory_keys_are_an_error(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        config(**changes)


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_a_key_of_trl_or_transformers_is_answered_with_a_key_of_limbeck(key: str) -> None:
    known = dict(walk_keys(DistillConfig))
    system, instead = FOREIGN_KEYS[key]
    assert explain_unknown_key(key, known) == f"is a key of {system}; use {instead}"
    sections = {path.rpartition(".")[0] for path in known}
    first = next((word for word in re.findall(r"[a-z]\w*(?:\.\w+)*", instead) if "_" in word or "." in word), None)
    assert first is None or first in {*known, *sections}
