"""Whatever a configuration contains, it is accepted or refused with sentences; never another error, and no hang.

``LIMBECK_FUZZ=200 pytest tests/config/test_random_configurations.py`` tries 200 configurations of each dialect, 1400 in all.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzing import VALUES, count, mutate, refusal

from limbeck.config import LoadedConfig, load_arguments, load_config, render_config
from limbeck.config.dialects.hyperpod import SETTINGS
from limbeck.config.dialects.nemo_rl import DIALECT
from limbeck.config.dialects.nemo_rl_table import MOVED, READ
from limbeck.config.schema import DistillConfig, walk_keys
from limbeck.train.build.objective import make_objective, make_objectives

COUNT = count(default=15)
EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = {"data_args": {"file_name": "rows.jsonl"}}
DISTILLKIT = {
    "project_name": "kit",
    "model": "small",
    "dataset": {"train_dataset": {"repo_id": "owner/rows", "split": "train"}, "eval_dataset": {"disk_path": "held"}},
    "teacher": {"kind": "hf", "path": "large", "kwargs": {"torch_dtype": "bfloat16"}, "top_k": 32},
    "sequence_length": 512,
    "output_path": "out",
    "use_flash_attention": True,
    "loss_functions": [
        {"function": "cross_entropy", "weight": 0.25},
        {"function": "kl", "weight": 0.5, "temperature": 2.0, "missing_probability_handling": "zero"},
        {"function": "hs_mse", "weight": 0.25},
    ],
    "layer_mapping": [[1, 2], [2, 4]],
    "training_args": {"num_train_epochs": 2, "per_device_train_batch_size": 2, "bf16": True, "packing": True},
    "frozen_modules": ["model.embed_tokens"],
    "frozen_res": ["mlp$"],
}
MODELOPT = {
    "student_pretrain": "small",
    "teacher_pretrain": "large",
    "student": ROWS,
    "distillation_config": {
        "logit_layers": ["output_layer", "output_layer"],
        "intermediate_layer_pairs": [["decoder.final_layernorm", "decoder.layers.3.input_layernorm", "cosine"]],
        "skip_lm_loss": False,
        "kd_loss_scale": 10.0,
        "logit_kl_temperature": 2.0,
        "logit_kl_topk": 8,
    },
}
HYPERPOD: dict[str, Any] = {}
for setting in SETTINGS:
    section, _, leaf = f".{setting.key}".rpartition(".")
    if setting.default is not None:
        HYPERPOD.setdefault(section[1:], {})[leaf] = setting.default
HYPERPOD |= HYPERPOD.pop("")
ON_POLICY = {
    "student_pretrain": "small",
    "teacher_pretrain": "large",
    "student": ROWS,
    "max_steps": 5,
    "kd_objective": "reverse_kl",
    "rollout": {"max_new_tokens": 32, "temperature": 0.7, "on_policy_fraction": 0.5},
    "features": {"pairs": [["model.layers.0", "model.layers.1", "mse"]], "weight": 0.5},
    "checkpoint_config": {"best_metric": "val/kd", "keep_best": 2},
}


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / path).read_text())


VALID: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "native": lambda: [read("tiny/distill.yaml"), read("mixture/distill.yaml"), ON_POLICY],
    "roll": lambda: [read("qwen2.5-7B-distill_fsdp2/distill_fsdp2.yaml")],
    "nemo_rl": lambda: [read("configs/distillation_math_cl.yaml")],
    "distillkit": lambda: [DISTILLKIT],
    "modelopt": lambda: [MODELOPT],
    "hyperpod": lambda: [HYPERPOD],
}
KEYS = [path for path, _ in walk_keys(DistillConfig)]
FLAGS = [f"--{setting.flag}" for setting in SETTINGS]


def mutate_text(text: str, chance: random.Random) -> str:
    """One change of the lines or characters."""
    lines = text.splitlines(keepends=True)
    at, kind = chance.randrange(len(lines)), chance.choice(["drop", "duplicate", "indent", "cut", "insert"])
    if kind == "drop":
        del lines[at]
    elif kind == "duplicate":
        lines.insert(chance.randrange(len(lines) + 1), lines[at])
    elif kind == "indent":
        lines[at] = " " * chance.randrange(1, 4) + lines[at]
    elif kind == "cut":
        return text[: chance.randrange(len(text))]
    else:
        place = chance.randrange(len(text))
        return text[:place] + chance.choice("{}[]:,&*!|>'\"#%@`-?\t\0\x07\u2028é0~") + text[place:]
    return "".join(lines)


def check(loaded: LoadedConfig) -> None:
    """What ``limbeck config`` does with a configuration."""
    render_config(loaded)
    make_objective(loaded.config, torch.device("cpu"))
    make_objectives(loaded.config, torch.device("cpu"))


def nemo_rl_places() -> list[tuple[str, str]]:
    """Every key that the dialect translates: its section, and its name."""
    inside = {"dataset": ["data.train", "data.validation", "data.default"]}
    read = [(place, key) for table, keys in READ.items() for place in inside.get(table, [table]) for key in keys]
    return sorted({*read, *((path.rpartition(".")[0], path.rpartition(".")[2]) for path in MOVED)})


def test_a_value_of_another_kind_in_a_file_of_nemo_rl_is_accepted_or_refused_with_sentences() -> None:
    (valid,) = VALID["nemo_rl"]()
    for place, key in nemo_rl_places():
        for value in (["a"], [["a"]], [{}], [2], {"a": 1}):
            values = copy.deepcopy(valid)
            section = values
            for name in place.split(".") if place else ():
                section = section.setdefault(name, {})
            section[key] = value
            refusal(lambda: DIALECT.translate(values, {}), f"{place}.{key} = {value}")  # noqa: B023


@pytest.mark.parametrize("dialect", list(VALID))
@pytest.mark.slow
def test_a_mutated_configuration_is_accepted_or_refused_with_sentences(dialect: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    chance, refused = random.Random(f"fuzz/{dialect}"), 0
    file = tmp_path / "run.yaml"
    for _ in range(COUNT):
        values = copy.deepcopy(chance.choice(VALID[dialect]()))
        for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
            mutate(values, chance, KEYS)
        text = yaml.safe_dump(values, allow_unicode=True)
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            text = mutate_text(text, chance) or " "
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        overrides = [f"{chance.choice(KEYS)}={chance.choice(VALUES)}"] if chance.random() < 0.2 else []
        name = dialect if dialect in ("roll", "nemo_rl", "distillkit", "hyperpod") and chance.random() < 0.5 else None
        refused += refusal(lambda: check(load_config(file, overrides, name)), f"{overrides} {name}\n{text}") is not None  # noqa: B023
    assert 0 < refused < COUNT


def test_mutated_arguments_are_accepted_or_refused_with_sentences(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    chance, refused = random.Random("fuzz/arguments"), 0
    valid = ["--teacher_model", "large", "--student_model", "small", "--dataset_name", "rows.jsonl", "--alpha", "0.3"]
    for _ in range(COUNT):
        argv = list(valid)
        for _ in range(chance.choice([0, 1, 1, 2, 3])):
            at, kind = chance.randrange(len(argv) + 1), chance.choice(["drop", "flag", "value", "override"])
            if kind == "drop":
                del argv[at : at + 1]
            elif kind == "flag":
                argv.insert(at, chance.choice(FLAGS))
            elif kind == "value":
                argv[at : at + 1] = [str(chance.choice(VALUES))]
            else:
                argv.append(f"{chance.choice(KEYS)}={chance.choice(VALUES)}")
        refused += refusal(lambda: check(load_arguments(argv, "hyperpod")), str(argv)) is not None  # noqa: B023
    assert 0 < refused < COUNT
