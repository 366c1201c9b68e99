"""A process alone trains in bfloat16 with float32 masters: cast once per step, gradients summed in float32."""

from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.config.schema import TrainingArgs
from limbeck.strategies.optimizer import make_optimizer
from limbeck.strategies.torch_engine import TorchEngine
from strategies.engines import ALONE, micro_batches, whole_state

SIZE = 32


class Root(torch.nn.Module):
    """The loss of a micro-batch x is x · Σ weights, so its gradient is x at every weight."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(SIZE, SIZE, bias=False)
        torch.nn.init.ones_(self.model.weight)
        self.dtypes = []

    def forward(self, x):
        self.dtypes.append(self.model.weight.dtype)
        return SimpleNamespace(loss=(self.model.weight * x.to(self.model.weight.dtype)).sum())


def make_engine(learning_rate=0.05):
    root = Root()
    args = TrainingArgs(learning_rate=learning_rate, weight_decay=0.0)
    return TorchEngine(root, make_optimizer(root, args), ALONE, compute_dtype=torch.bfloat16)


def run(engine, *values):
    for _ in engine.forward_backward(micro_batches(*(torch.tensor(value) for value in values))):
        pass


class Casts(TorchDispatchMode):
    """Counts copies of the weight from float32 to bfloat16."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "_foreach_copy_", "copy_"):
            first = arguments[-1] if name != "_to_copy" else arguments[0]
            tensors = first if isinstance(first, list) else [first]
            self.count += sum(t.numel() == SIZE * SIZE and t.dtype is torch.float32 for t in tensors)
        return function(*arguments, **(named or {}))


def test_weights_are_cast_once_per_step_whatever_the_number_of_micro_batches():
    engine = make_engine()
    for count in (1, 5):
        with Casts() as casts:
            run(engine, *[1.0] * count)
            engine.step()
        assert casts.count == 1
    assert set(engine.root.dtypes) == {torch.bfloat16}


def test_gradients_of_micro_batches_are_summed_in_float32():
    engine = make_engine()
    run(engine, 1.0, *[0.001953125] * 8)  # 2⁻⁹ is below half of bfloat16's spacing at 1
    assert engine.step().item() == SIZE * (1 + 8 * 2**-9)


def test_masters_take_steps_that_bfloat16_cannot_hold_and_a_checkpoint_keeps_them():
    engine = make_engine(learning_rate=1e-5)
    for _ in range(3):
        run(engine, 1.0)
        engine.step()
    assert (engine.root.model.weight == 1).all()  # the copy
    ((_, weight),) = engine.iter_weights()
    torch.testing.assert_close(weight, torch.full_like(weight, 1 - 3e-5), rtol=0, atol=1e-6)
    other = make_engine(learning_rate=0.05)
    other.load_state_dict(whole_state(engine))
    ((_, loaded),) = other.iter_weights()
    assert loaded.dtype is torch.float32 and torch.equal(loaded, weight)
    other.offload()
    other.reload()
    for _ in range(2):
        run(other, 1.0)
        other.step()
    assert (other.root.model.weight < 0.95).all()  # the copy follows loaded and moved masters


def test_the_sums_of_a_step_begin_at_zero():
    engine = make_engine()
    for _ in range(2):
        run(engine, 1.0)
        assert engine.step().item() == SIZE
    run(engine, 1.0)
    held = engine.held_tensors()
    assert [t.dtype for t in held["gradients"]] == [torch.float32]
    assert sorted(str(t.dtype) for t in held["parameters"]) == ["torch.bfloat16", "torch.float32"]
