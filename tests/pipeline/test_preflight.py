"""``limbeck cluster check``: says what goes where, and finds what would fail, before anything is loaded."""

import pytest
import torch
import yaml

from limbeck.cli import main
from limbeck.models import load_model
from limbeck.pipeline.preflight import model_memory


@pytest.fixture
def check(settings, tmp_path, monkeypatch, capsys):
    """``check(**changes)`` → exit status, what is printed, what is complained of."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(**changes) -> tuple[int, str, str]:
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(settings(**changes)))
        status = main(["cluster", "check", str(config)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


APART = {"student.device_mapping": [0, 1], "teacher.device_mapping": [2]}


def test_a_run_that_fits_is_told_so_with_what_goes_where(check, assets):
    status, out, err = check(**APART)
    parameters = sum(p.numel() for p in load_model(str(assets / "student"), dtype=torch.float32).parameters())
    assert (status, err) == (0, "")
    assert out.rstrip().endswith("fits")
    assert f"{parameters:,}" in out


def test_memory_is_what_the_parts_of_a_run_hold(configure, assets):
    student = load_model(str(assets / "student"), dtype=torch.float32)
    teacher = load_model(str(assets / "teacher"), dtype=torch.float32)
    count, theirs = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    head = teacher.get_output_embeddings().weight.numel()
    one, asked = model_memory(configure())
    assert (one.per_rank, asked.per_rank) == (16 * count, 4 * theirs)
    many, shards = model_memory(configure(**{"student.device_mapping": [0, 1], "teacher.device_mapping": [2, 3]}))
    assert (many.per_rank, shards.per_rank) == (8 * count, 2 * (theirs - head) + 4 * head)
    whole = {"student.strategy_args.strategy_config.replicate": True, "teacher.strategy_args.strategy_name": "hf_infer"}
    copies = model_memory(configure(**{"student.device_mapping": [0, 1], "teacher.device_mapping": [2, 3]}, **whole))
    assert [load.per_rank for load in copies] == [16 * count, 4 * theirs]
    adapters, _ = model_memory(configure(**{"student.model_args.lora_target": "all-linear"}))
    assert 4 * count < adapters.per_rank < 8 * count
    (alone,) = model_memory(configure(**{"teacher.service": "judge"}))
    assert alone.role == "student"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"student.device_mapping": [0, 1, 2], "student.strategy_args.strategy_config.fsdp_size": 2},
            "student: strategy_config.fsdp_size = 2 does not divide the 3 processes",
        ),
        ({**APART, "student.model_args.dtype": "fp16"}, "fp16 trains on several ranks with deepspeed_train only"),
        ({**APART, "num_nodes": 2, "num_gpus_per_node": 2}, "num_nodes = 2, but there are 1 machine(s); set RAY_ADDRESS"),
        ({"teacher_pretrain": "/nowhere/at/all"}, "there is no folder '/nowhere/at/all' to load the teacher from"),
        (
            {
                **APART,
                "teacher_pretrain": None,
                "teacher.model_args.from_scratch": True,
                "teacher.model_args.model_config_kwargs": {
                    "model_type": "qwen2", "hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200,
                },
            },
            "of memory; use more machines, smaller models or LoRA",
        ),
    ],
    ids=["divisibility", "dtype", "machines", "checkpoint", "memory"],
)  # fmt: skip
def test_each_thing_that_does_not_fit_is_a_sentence(check, changes, sentence):
    status, out, err = check(**changes)
    assert status == 2
    assert sentence in err
    assert all(line.startswith(("limbeck: ", "note: ")) for line in err.splitlines())
    assert "fits" not in out


def test_a_ray_that_is_joined_is_asked_what_it_has(check):
    ray = pytest.importorskip("ray")
    from limbeck.cluster.session import ray_session

    with ray_session(4):
        slots = int(ray.cluster_resources()["CPU"])
        assert check(**APART)[0] == 0
        status, _, err = check(**{**APART, "teacher.device_mapping": list(range(2, slots + 1))})
        assert status == 2
        assert f"needs {slots + 1} free CPU slots on one machine" in err
        status, _, err = check(**{**APART, "teacher.service": "judge"})
        assert status == 2
        assert "there is no teacher service called judge on this Ray (served: none)" in err
