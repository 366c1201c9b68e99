"""Runs whose student and teacher are checkpoints of Megatron-LM, and whose student becomes one."""

import pytest
import torch
from runs import assert_same_weights, weights
from tiny import make_model
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_model
from limbeck.models.megatron_checkpoint import write_checkpoint


def test_a_run_is_the_one_of_the_same_models_in_the_format_of_hugging_face(configure, assets, tmp_path, capsys):
    short = {"max_steps": 2, "save_steps": 0, "eval_steps": 0}
    one = DistillPipeline(configure(**short)).run()
    roles = {}
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(assets / role, dtype=torch.float32)
        write_checkpoint(model, tmp_path / role, 1)
        roles[f"{role}_pretrain"] = str(tmp_path / role)
    settings = {
        "output_dir": str(tmp_path / "other"),
        "tokenizer": str(assets / "student"),
        "checkpoint_config.save_megatron": True,
    }
    other = DistillPipeline(configure(**short, **roles, **settings)).run()
    assert "load it in Megatron-LM with --use-checkpoint-args --norm-epsilon 1e-06" in capsys.readouterr().out
    assert_same_weights(one.student, other.student)
    saved = load_model(ModelSource(str(tmp_path / "other" / "megatron")), torch.float32).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(one.student, dtype=torch.float32).state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"checkpoint_config.save_before": "00:01"}, None),
        ({"rollout": {"max_new_tokens": 2, "stop_if": {"mean_length_below": 3, "for_steps": 1}}}, "has passed"),
    ],
)
def test_a_run_that_ends_early_leaves_a_checkpoint_of_megatron_too(changes, error, configure, tmp_path):
    run = DistillPipeline(
        configure(**changes, max_steps=3, save_steps=0, eval_steps=0, **{"checkpoint_config.save_megatron": True})
    )
    if error is None:
        assert run.run().out_of_time
    else:
        with pytest.raises(LimbeckError, match=error):
            run.run()
    saved, trained = (
        load_model(ModelSource(str(tmp_path / "out" / name)), torch.float32).state_dict()
        for name in ("megatron/iter_0000001", "checkpoint-1")
    )
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
STUDENTS = {
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, **EXPERTS},
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
    },
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_run_writes_the_names_of_the_hub(kind, configure, assets, tmp_path):
    """For these kinds they differ from those in memory."""
    folder = make_model(tmp_path / "hf", kind=kind, **STUDENTS[kind])
    write_checkpoint(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "student", 1)
    settings = {"student_pretrain": str(tmp_path / "student"), "tokenizer": str(assets / "student")}
    run = DistillPipeline(configure(**settings, max_steps=1, save_steps=1, eval_steps=0)).run()
    assert run.student.resolve() == (tmp_path / "out" / "checkpoint-1").resolve()
    assert weights(run.student).keys() == weights(folder).keys()


def test_a_student_that_megatron_cannot_load_is_refused_before_training(configure, tmp_path):
    changes = {"student.model_args.model_config_kwargs": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}}
    with pytest.raises(LimbeckError, match=r"a model with RoPE scaling dynamic cannot be written .* of Megatron-LM"):
        DistillPipeline(configure(**changes, **{"checkpoint_config.save_megatron": True})).run()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_checkpoint_without_a_tokenizer_needs_the_key(configure, assets, tmp_path):
    write_checkpoint(AutoModelForCausalLM.from_pretrained(assets / "student"), tmp_path / "student", 1)
    with pytest.raises(LimbeckError, match="is a checkpoint of Megatron-LM, which holds no tokenizer; set tokenizer"):
        DistillPipeline(configure(student_pretrain=str(tmp_path / "student"))).run()
