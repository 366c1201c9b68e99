"""The optimizer and the learning-rate schedule that a configuration describes."""

import math

import pytest
import torch
from tiny import make_model
from transformers import AutoModelForCausalLM

from limbeck import LimbeckError
from limbeck.config.schema import TrainingArgs
from limbeck.strategies.optimizer import check_optimizer, make_optimizer, make_scheduler
from limbeck.strategies.parallel_dims import ParallelDims
from strategies.engines import make_root

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="is in PyTorch 2.9 and later")


def test_weight_decay_acts_on_matrices_only_and_frozen_parameters_are_left_out():
    root = make_root()
    optimizer = make_optimizer(root, TrainingArgs(weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {p: 0.3 if p.ndim == 2 else 0.0 for p in root.parameters() if p.requires_grad}
    assert decay == expected
    assert len(expected) < len(list(root.parameters()))


def test_a_module_of_matrices_alone_has_one_group():
    optimizer = make_optimizer(torch.nn.Linear(2, 2, bias=False), TrainingArgs(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


def test_learning_rate_betas_and_epsilon_are_those_of_the_configuration():
    args = TrainingArgs(learning_rate=0.25, adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=0.125)
    for group in make_optimizer(make_root(), args).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 0.125)


@needs_muon
def test_muon_steps_the_matrices_of_the_layers_and_adamw_the_rest(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "student"))
    optimizer = make_optimizer(model, TrainingArgs(optimizer_name="muon", weight_decay=0.3))
    name = {parameter: name for name, parameter in model.named_parameters()}
    matrices, rest, vectors = ({name[p] for p in group["params"]} for group in optimizer.param_groups)
    assert rest == {"model.embed_tokens.weight", "lm_head.weight"}
    assert matrices == {name[p] for p in model.parameters() if p.ndim == 2} - rest
    assert matrices | rest | vectors == set(name.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]


RUNS = {
    # optimizer: the layouts in which it runs, of those below
    "adamw": {"alone", "fsdp2", "tensor", "deepspeed"},
    "adafactor": {"alone"},
    "adamw_8bit": {"alone"},
    "muon": {"alone", "fsdp2"},
}
LAYOUTS = {
    "alone": (ParallelDims(), False),
    "fsdp2": (ParallelDims(dp_shard=2), False),
    "tensor": (ParallelDims(tp=2), False),
    "deepspeed": (ParallelDims(dp_shard=2), True),
}


@needs_muon
@pytest.mark.parametrize("name", RUNS)
def test_an_optimizer_is_refused_where_it_does_not_run(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
    for layout, (dims, deepspeed) in LAYOUTS.items():
        if layout in RUNS[name]:
            check_optimizer(name, dims, deepspeed=deepspeed)
        else:
            with pytest.raises(LimbeckError, match=f"optimizer_name = {name} does not run "):
                check_optimizer(name, dims, deepspeed=deepspeed)


def test_a_missing_torchao_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(LimbeckError, match=r"needs torchao; pip install 'limbeck\[torchao\]'"):
        check_optimizer("adamw_8bit", ParallelDims())


def rates(args: TrainingArgs, steps: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = make_optimizer(make_root(), args)
    scheduler, found = make_scheduler(optimizer, args, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_steps_win_over_the_ratio():
    args = TrainingArgs(learning_rate=1.0, warmup_steps=2, warmup_ratio=0.5)
    assert rates(args, 10) == pytest.approx([0.0, 0.5] + [(10 - step) / 8 for step in range(2, 10)])


def test_a_ratio_of_the_steps_is_rounded_to_the_nearest():
    # 0.26 · 10 = 2.6 steps, so three.
    args = TrainingArgs(learning_rate=1.0, warmup_ratio=0.26, lr_scheduler_type="constant_with_warmup")
    assert rates(args, 10) == pytest.approx([0.0, 1 / 3, 2 / 3] + [1.0] * 7)


def test_arguments_of_the_schedule_reach_it():
    args = TrainingArgs(
        learning_rate=1.0, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.25}
    )
    expected = [0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates(args, 10) == pytest.approx(expected)
