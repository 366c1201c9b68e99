"""Trackers that need other packages."""

import sys
from types import SimpleNamespace

import pytest

from limbeck.errors import LimbeckError
from limbeck.train.trackers import make_tracker


class UsageError(Exception):
    """As of wandb.errors."""


def fake_wandb(run, fails=False):
    def init(**arguments):
        if fails:
            raise UsageError("no API key\nconfigured")
        run.append(("init", arguments))
        return SimpleNamespace(
            log=lambda values, step: run.append((step, values)), finish=lambda: run.append(("finish", {}))
        )

    return SimpleNamespace(init=init, errors=SimpleNamespace(Error=UsageError))


def test_weights_and_biases_gets_every_line(tmp_path, monkeypatch):
    run = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    tracker = make_tracker("wandb", tmp_path / "logs", {"project": "mine"})
    tracker.log(3, {"train/loss": 0.5})
    tracker.close()
    assert run == [
        ("init", {"dir": str(tmp_path / "logs"), "project": "mine"}),
        (3, {"train/loss": 0.5}),
        ("finish", {}),
    ]


def test_weights_and_biases_that_cannot_start_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb([], fails=True))
    with pytest.raises(LimbeckError, match=r"cannot be used: no API key configured; set WANDB_API_KEY"):
        make_tracker("wandb", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LimbeckError, match="needs the package wandb"):
        make_tracker("wandb", tmp_path, {})
