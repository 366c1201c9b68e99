"""The ranking of weight matrices by Spectrum's signal-to-noise ratio."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from limbeck.cli import main
from limbeck.errors import LimbeckError
from limbeck.models.spectrum import rank_matrices, signal_to_noise

CPU = torch.device("cpu")


def by_definition(matrix: np.ndarray) -> float:
    s = np.linalg.svd(matrix, compute_uv=False)
    sigma = (np.percentile(s, 75) - np.percentile(s, 25)) / 1.349
    edge = sigma * np.sqrt((1 + np.sqrt(min(matrix.shape) / max(matrix.shape))) ** 2)
    return s[s > edge].sum() / s[s <= edge].sum() / s.max()


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 30), st.integers(8, 30), st.integers(0, 3), st.floats(0.1, 30), st.integers(0, 99))
def test_the_ratio_is_that_of_the_definition(rows, columns, rank, strength, seed):
    random = np.random.default_rng(seed)
    # A spread of singular values from near 0, so that some lie below the edge.
    noise = random.normal(size=(rows, columns)) * np.geomspace(1e-3, 1, columns)
    spikes = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns))
    matrix = noise + strength * spikes
    expected = by_definition(matrix)
    if np.isfinite(expected):
        found = signal_to_noise(torch.from_numpy(matrix)).item()
        assert found == pytest.approx(expected, rel=1e-5)
        assert signal_to_noise(torch.from_numpy(matrix.T.copy())).item() == pytest.approx(found, rel=1e-6)


def test_zeros_have_no_signal_and_undefined_values_are_reported(assets):
    assert signal_to_noise(torch.zeros(4, 6)) == 0
    model = AutoModelForCausalLM.from_pretrained(assets / "student")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(LimbeckError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has infinite or undefined values"):
        rank_matrices(model, 50, CPU)


@pytest.mark.parametrize("percent", [1, 34, 50, 67, 100])
def test_the_share_is_taken_of_each_kind(assets, percent):
    model = AutoModelForCausalLM.from_pretrained(assets / "teacher")  # three layers
    ranked = rank_matrices(model, percent, CPU)
    assert len(ranked) == 3 * 7
    for kind in {one.kind for one in ranked}:
        of_kind = [one for one in ranked if one.kind == kind]
        assert [one.snr for one in of_kind] == sorted((one.snr for one in of_kind), reverse=True)
        assert [one.selected for one in of_kind] == [place < max(1, 3 * percent // 100) for place in range(3)]
        weight = dict(model.named_parameters())[of_kind[0].name].detach().numpy()
        assert of_kind[0].snr == pytest.approx(by_definition(weight.astype(np.float64)), rel=1e-5)


def test_stacked_experts_are_one_entry(assets):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Module()])
            self.layers[0].up = torch.nn.Parameter(torch.randn(3, 8, 12))

    model = Experts()
    (one,) = rank_matrices(torch.nn.ModuleDict({"model": model}), 50, CPU)
    matrices = model.layers[0].up.detach().double().numpy()
    assert one.snr == pytest.approx(np.mean([by_definition(matrix) for matrix in matrices]), rel=1e-5)


def test_the_command_writes_the_file_of_the_trained_parameters(assets, tmp_path, capsys):
    file = tmp_path / "spectrum.yaml"
    assert main(["spectrum", str(assets / "teacher"), "--top-percent", "34", "--output", str(file)]) == 0
    written = yaml.safe_load(file.read_text())["unfrozen_parameters"]
    ranked = rank_matrices(AutoModelForCausalLM.from_pretrained(assets / "teacher"), 34, CPU)
    assert written == [one.name for one in ranked if one.selected]
    assert "7 of 21 matrices" in capsys.readouterr().out
    assert main(["spectrum", str(assets / "teacher"), "--top-percent", "0"]) == 2
    assert "--top-percent 0 must be above 0" in capsys.readouterr().err
