"""A training step reads no value of a GPU: reading one makes the host wait until all work before it is done."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.data.batch import Batch
from limbeck.models import body, output_head
from limbeck.objectives import Objective, aligned_head
from limbeck.strategies.base import FrozenModel, MicroBatches
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher
from limbeck.train.metrics import LossSums
from limbeck.train.student import LossSettings, StudentWithLoss, TrainInput, to_device

VOCAB = 70  # no multiple of 64
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Notes operators for which the host would wait for a GPU. A ``meta`` tensor stands for one on it: reading one fails."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        reads = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero)
        if packet in (aten.index, aten.index_put, aten.index_put_):
            if any(index is not None and index.dtype is torch.bool for index in args[1]):
                self.found.append(f"{func} with a mask")
        elif packet in reads and args[0].device.type == "meta":
            self.found.append(str(func))
        result = func(*args, **kwargs)
        if packet in (aten._to_copy, aten.copy_):
            source, blocks = (args[1], not any(args[2:])) if packet is aten.copy_ else (args[0], True)
            if source.device != result.device and blocks and not kwargs.get("non_blocking", False):
                self.found.append(f"{func} from {source.device.type} to {result.device.type}")
        return result


class Numbers(TorchFunctionMode):
    """Notes Python numbers that are copied to a GPU, for which the host waits as well."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and result.device.type == "meta" and result is not args[0]:
            self.found.append(func.__name__)
        return result


def model(hidden: int):
    config = LlamaConfig(
        vocab_size=80, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(aligned_head, "_adds_wider", lambda *_: True)  # tried once per process
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta tensors
    monkeypatch.setitem(aligned_head._MULTIPLE, "meta", 64)
    return World(0, 1, torch.device("meta"))


def test_a_step_waits_for_nothing(world):
    frozen = model(24).to("meta", torch.bfloat16).requires_grad_(False)
    teacher = LocalTeacher(FrozenModel(body(frozen), output_head(frozen), 0))
    student = StudentWithLoss(model(16).to("meta"), LossSettings(Objective.of("forward_kl"), VOCAB))
    optimizer = torch.optim.AdamW(student.parameters(), foreach=True)
    engine = TorchEngine(student, optimizer, world, compute_dtype=torch.bfloat16, max_norm=1.0)
    losses = LossSums(world.device)
    ids = torch.ones(2, 8, dtype=torch.int64)
    batch = Batch(ids, ids, None, 16, torch.arange(16))

    def inputs():
        for _ in range(2):
            whole, own = to_device(world, batch)
            yield TrainInput(own, teacher.compute_signal(whole), 32.0, 32.0, 2)

    def step():
        for loss in engine.forward_backward(MicroBatches(2, inputs)):
            losses.add(loss)
        return engine.step()

    step()  # creates the optimizer's state
    with Waits() as waits, Numbers() as numbers:
        step()
    assert waits.found == numbers.found == []
