"""What frozen parameters cost: no gradient, and no optimizer state."""

from contextlib import ExitStack

import torch
from strategies.engines import ALONE

from limbeck.train.build.run import build_run
from limbeck.train.loop import train_step


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(configure, tmp_path):
    """A file as `limbeck spectrum` writes it: only its entries have gradients and optimizer state, and change."""
    trained = {"model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}
    (tmp_path / "spectrum.yaml").write_text("unfrozen_parameters:\n" + "".join(f"- {name}\n" for name in trained))
    config = configure(**{"student.model_args.unfrozen_parameters": str(tmp_path / "spectrum.yaml")}, max_steps=3)
    gradients = []
    with ExitStack() as resources:
        run = build_run(config, ALONE, resources)
        parameters = dict(run.student.model.named_parameters())
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        step, optimizer = run.engine.step, run.engine.optimizer
        run.engine.step = lambda: gradients.append({n for n, p in parameters.items() if p.grad is not None}) or step()
        train_step(run)
    assert gradients == [trained]
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert held == 2 * sum(parameters[name].numel() for name in trained)
    assert {name for name in parameters if not torch.equal(before[name], parameters[name])} == trained
