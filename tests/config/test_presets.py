"""A preset gives the numbers of the system that it is named after, written out here from that system's formula."""

import pytest
import torch

from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.objectives import Logits, fused_linear_distillation
from limbeck.train.build.objective import make_objective

BASE = {"student_pretrain": "s", "teacher_pretrain": "t", "student": {"data_args": {"file_name": "d"}}}


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def top(z_t, z_s, tau, k=64):
    columns = z_t.topk(k).indices
    return (z_t.gather(-1, columns) / tau).log_softmax(-1), (z_s.gather(-1, columns) / 2.0).log_softmax(-1)


def roll(z_s, z_t, ce):  # kd_temperature 2, teacher_temperature 1.5: the teacher's logits are divided by both
    return 0.5 * ce + 0.5 * kl(*top(z_t, z_s, 2.0 * 1.5))


def nemo_rl(z_s, z_t, ce):
    p, q = top(z_t, z_s, 2.0)
    return 0.5 * kl(p, q) + 0.5 * kl(q, p)


def hyperpod(z_s, z_t, ce):
    return 0.5 * 4.0 * kl((z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1)) + 0.5 * ce


def modelopt(z_s, z_t, ce):
    return kl((z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1))


def trl(z_s, z_t, ce):
    p, q = z_t.log_softmax(-1), z_s.log_softmax(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    return 0.5 * kl(p, m) + 0.5 * kl(q, m)


@pytest.mark.parametrize(
    ("formula", "keys"),
    [
        (roll, {"kd_temperature": 2.0, "teacher_temperature": 1.5}),
        (nemo_rl, {"kd_temperature": 2.0}),
        (hyperpod, {}),
        (modelopt, {"kd_temperature": 2.0}),
        (trl, {}),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_presets_give_the_numbers_of_their_system(formula, keys):
    torch.manual_seed(0)
    z_s, z_t, labels = torch.randn(5, 90).double(), 3 * torch.randn(5, 90).double(), torch.randint(0, 90, (5,))
    config = load_mapping({**BASE, **keys, "objective_preset": formula.__name__}).config
    objective, _ = make_objective(config, torch.device("cpu"))
    head = torch.eye(90, dtype=torch.float64)
    loss = fused_linear_distillation(z_s, head, None, None, labels, teacher=Logits(z_t), objective=objective).loss
    ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="none")
    torch.testing.assert_close(loss, formula(z_s, z_t, ce).mean())


def test_what_is_written_stands_above_the_preset():
    loaded = load_mapping({**BASE, "objective_preset": "roll", "logits_topk": 8})
    assert loaded.config.logits_topk == 8
    assert loaded.config.temperature_convention == "roll"
    assert "objective_preset" in loaded.origins["temperature_convention"]


def test_what_a_preset_gives_its_own_divergence_goes_with_it():
    config = load_mapping({**BASE, "objective_preset": "nemo_rl", "kd_objective": "forward_kl"}).config
    assert (config.kd_objective, config.kd_objective_kwargs, config.logits_topk) == ("forward_kl", {}, 64)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(LimbeckError, match=r"objective_preset.*nemo_rl"):
        load_mapping({**BASE, "objective_preset": "nemo"})
