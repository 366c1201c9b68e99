"""The models of tests of Megatron, and what FSDP2 makes of them, made once for all files."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_data, make_model

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from strategies.megatron_runs import STUDENTS, TEACHERS, configuration


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Models of ``megatron_runs`` and data."""
    folder = tmp_path_factory.mktemp("megatron")
    make_model(folder / "teacher", hidden=48, layers=4, seed=1, num_key_value_heads=4)
    for path in (folder / "teacher").glob("tokenizer*"):  # Transformers reads one file as another tokenizer for llama
        path.unlink()
    make_data(folder / "rows.jsonl", 96)
    for name, (shape, _) in STUDENTS.items():
        make_model(folder / name, layers=4, **shape)
        if name == "hybrid":
            make_model(folder / TEACHERS[name], seed=1, **shape)
    for student in ("qwen3", "qwen3_moe"):
        weights = load_file(folder / student / "model.safetensors")
        for name in weights:  # as in a fresh model; three times that, attention is so sharp that rounding grows
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weights[name] /= 3
        save_file(weights, folder / student / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def runs_of_fsdp2(folder) -> dict[str, Path]:
    """For each student the folder of its run by one process."""
    outputs = {name: folder / f"{name}-one" for name in STUDENTS}
    for name, output in outputs.items():
        DistillPipeline(load_mapping(configuration(folder, output, name)).config).run()
    return outputs
