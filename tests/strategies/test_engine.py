"""An engine's weights, states and modes on one process, with a real student."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from runs import weights
from tiny import make_model
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.config.schema import TrainingArgs
from limbeck.strategies.base import MicroBatches
from limbeck.strategies.optimizer import make_optimizer
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.train.build.run import build_run
from limbeck.train.loop import train_step as run_step
from strategies.engines import ALONE, make_inputs, make_root, micro_batches, train_step, whole_state

SHORT = {"max_steps": 2, "save_steps": 0, "eval_steps": 0}
ARGS = TrainingArgs(learning_rate=0.05, weight_decay=0.1)


def make_engine(optimizer: str = "adamw", root: torch.nn.Module | None = None, **options) -> TorchEngine:
    root = make_root() if root is None else root
    return TorchEngine(
        root, make_optimizer(root, ARGS.model_copy(update={"optimizer_name": optimizer})), ALONE, **options
    )


@pytest.mark.parametrize("tied", [False, True])
def test_weights_have_hugging_face_names_and_are_what_a_checkpoint_holds(configure, tmp_path, tied):
    folder = make_model(tmp_path / "model", tie_word_embeddings=tied)
    config = configure(**SHORT, student_pretrain=str(folder), output_dir=str(tmp_path / "out"))
    run = build_run(config, ALONE, ExitStack())
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    start = {name: tensor.clone() for name, tensor in run.engine.iter_weights()}
    assert start.keys() == expected.keys()
    for name, tensor in start.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    run_step(run)
    run_step(run)
    run.saver.save(run.step, run.requests.state_dict(), {})
    run.saver.wait()
    run.source.close()
    now, saved = dict(run.engine.iter_weights()), weights(tmp_path / "out" / "checkpoint-2")
    assert now.keys() - saved.keys() == ({"lm_head.weight"} if tied else set())
    assert saved.keys() <= now.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(now[name], tensor, rtol=0, atol=0)
        assert not torch.equal(tensor, start[name]), name
    if tied:
        torch.testing.assert_close(now["lm_head.weight"], now["model.embed_tokens.weight"], rtol=0, atol=0)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
        torch.testing.assert_close(reloaded.lm_head.weight, now["model.embed_tokens.weight"], rtol=0, atol=0)


def test_the_state_has_trained_parameters_only_and_the_moments_of_each():
    engine = make_engine()
    for inputs in make_inputs(2):
        train_step(engine, inputs)
    state = whole_state(engine)
    trained = {"model.0.weight", "model.0.bias", "model.1.weight"}
    assert engine.trained_names() == state.model.keys() == trained
    entries = ("exp_avg", "exp_avg_sq", "step")
    assert state.optimizer.keys() == {f"{name}|{entry}" for name in trained for entry in entries}
    assert {state.optimizer[f"{name}|step"].item() for name in trained} == {2.0}
    for name, parameter in engine.root.named_parameters():
        if name in trained:
            torch.testing.assert_close(state.model[name], parameter.detach(), rtol=0, atol=0)
            moments = engine.optimizer.state[parameter]
            torch.testing.assert_close(state.optimizer[f"{name}|exp_avg"], moments["exp_avg"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_an_engine_that_loads_a_state_goes_on_as_the_one_that_gave_it(name):
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon is in PyTorch 2.9 and later")
    first, second = make_engine(name, max_norm=0.5), make_engine(name, max_norm=0.5)
    *before, last = make_inputs(4)
    for inputs in before:
        train_step(first, inputs)
    copied = whole_state(first)
    second.optimizer.param_groups[0]["lr"] = first.optimizer.param_groups[0]["lr"] = 0.02
    second.load_state_dict(copied)
    assert second.optimizer.param_groups[0]["lr"] == 0.02  # the schedule sets it, not the state
    assert second.optimizer.param_groups[1]["lr"] == 0.05
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.1, 0.0]
    assert train_step(first, last) == train_step(second, last)
    for (name, one), (_, other) in zip(first.iter_weights(), second.iter_weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    after, resumed = whole_state(first).optimizer, whole_state(second).optimizer
    for key, value in after.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=key)


class Wide(torch.nn.Module):
    """A matrix that is large enough for moments in 8 bits, and a bias that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.model = torch.nn.Linear(4, 2048)

    def forward(self, inputs):
        return SimpleNamespace(loss=self.model(inputs).square().mean())


def test_moments_in_8_bits_are_saved_exactly():
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        first, second = make_engine("adamw_8bit", Wide()), make_engine("adamw_8bit", Wide())
        *before, last = make_inputs(4)
        for inputs in before:
            train_step(first, inputs)
        state = whole_state(first)
        assert state.optimizer["model.weight|exp_avg.codes"].dtype is torch.uint8
        assert all(type(value) is torch.Tensor for value in state.optimizer.values())
        second.load_state_dict(state)
        assert train_step(first, last) == train_step(second, last)
    for (name, one), (_, other) in zip(first.iter_weights(), second.iter_weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


def test_the_state_of_another_optimizer_is_refused():
    first = make_engine("adafactor")
    train_step(first, make_inputs(1)[0])
    with pytest.raises(LimbeckError, match="state of another optimizer"):
        make_engine().load_state_dict(whole_state(first))


def test_the_loss_scale_of_fp16_is_part_of_the_state():
    first, second = (make_engine(compute_dtype=torch.float16) for _ in range(2))
    train_step(first, torch.full((5, 4), 3e4))  # overflows, which halves the scale
    scale = first.state_dict().scaler["scale"]
    assert scale < second.state_dict().scaler["scale"]
    second.load_state_dict(whole_state(first))
    assert second.state_dict().scaler["scale"] == scale


def test_a_state_without_a_loss_scale_leaves_that_of_an_fp16_engine():
    plain, half = make_engine(), make_engine(compute_dtype=torch.float16)
    before = half.state_dict().scaler
    half.load_state_dict(whole_state(plain))
    assert plain.state_dict().scaler == {}
    assert half.state_dict().scaler == before


class Recorder(torch.nn.Module):
    """Notes mode, gradient mode and precision of every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(4, 2)
        self.passes = []

    def forward(self, inputs):
        outputs = self.model(inputs.to(self.model.weight.dtype))
        self.passes.append((self.training, torch.is_grad_enabled(), outputs.dtype))
        return SimpleNamespace(loss=outputs.float().sum())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_training_and_evaluation_set_their_mode_and_precision(dtype):
    root = Recorder().train(False)
    engine = TorchEngine(root, make_optimizer(root, ARGS), ALONE, compute_dtype=dtype)
    inputs, computed = torch.ones(1, 4), dtype or torch.float32
    for _ in engine.forward_backward(micro_batches(inputs)):
        pass
    assert not engine.evaluate(inputs).loss.requires_grad
    for _ in engine.forward_backward(micro_batches(inputs)):
        pass
    assert root.passes == [(True, True, computed), (False, False, computed), (True, True, computed)]


def test_micro_batches_are_made_one_at_a_time_when_the_engine_is_ready():
    events = []

    def make():
        for number, inputs in enumerate(make_inputs(3)):
            events.append(f"made {number}")
            yield inputs

    for number, _ in enumerate(make_engine().forward_backward(MicroBatches(3, make))):
        events.append(f"computed {number}")
    assert events == [f"{what} {number}" for number in range(3) for what in ("made", "computed")]


def test_held_tensors_are_parameters_gradients_and_moments():
    engine = make_engine()
    assert [len(engine.held_tensors()[kind]) for kind in ("parameters", "gradients", "optimizer")] == [4, 0, 0]
    (inputs,) = make_inputs(1)
    for _ in engine.forward_backward(micro_batches(inputs)):
        pass
    assert len(engine.held_tensors()["gradients"]) == 3
    engine.step()
    assert [len(engine.held_tensors()[kind]) for kind in ("parameters", "gradients", "optimizer")] == [4, 0, 9]


def test_offloading_between_steps_changes_nothing():
    plain, moved = make_engine(), make_engine()
    for inputs in make_inputs(3):
        moved.offload()
        moved.reload()
        assert train_step(plain, inputs) == train_step(moved, inputs)
    for (_, one), (_, other) in zip(plain.iter_weights(), moved.iter_weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_run_clips_to_max_grad_norm(configure, assets, tmp_path):
    """Through the whole build: max_grad_norm and the AdamW settings of the configuration reach the engine's steps."""
    adam = {"learning_rate": 1e-2, "adam_epsilon": 1e-1, "lr_scheduler_type": "constant"}
    changes = {**SHORT, **{f"student.training_args.{key}": value for key, value in adam.items()}}
    moved = {}
    for max_norm in (0.0, 1e-3):
        config = configure(**changes, max_grad_norm=max_norm, output_dir=str(tmp_path / str(max_norm)))
        result = DistillPipeline(config).run()
        start, after = weights(assets / "student"), weights(result.student)
        moved[max_norm] = torch.cat([(after[name] - start[name]).flatten() for name in start]).norm().item()
        assert result.metrics["student/grad_norm"] > 0.1
    # With gradients of norm 0.001 and an epsilon of 0.1, AdamW's updates have a norm of about 0.01 · 0.001 / 0.1 a step.
    assert moved[1e-3] == pytest.approx(2e-4, rel=0.1)
    assert moved[0.0] > 20 * moved[1e-3]
