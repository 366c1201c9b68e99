"""``limbeck check`` prints the placement and the first batch, and finds what would fail, before a model is loaded."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from limbeck import DistillPipeline
from limbeck.cli import main
from limbeck.cluster.actors import versions
from limbeck.errors import LimbeckError
from limbeck.launch import preflight
from limbeck.launch.first_batch import describe_data
from limbeck.models import ModelSource, load_model
from limbeck.plan.memory import student_memory, teacher_memory
from limbeck.registry import NEEDS_NO_MODEL, TEACHERS


@pytest.fixture
def check(settings, tmp_path, monkeypatch, capsys):
    """``check(**changes)``: exit status, standard output and standard error of the command."""
    for variable in ("RAY_ADDRESS", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)

    def run(**changes) -> tuple[int, str, str]:
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(settings(**changes)))
        status = main(["check", str(config)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


STUDENT = "student.strategy_args.strategy_config"
APART = {"student.device_mapping": [0, 1], "teacher.device_mapping": [2]}


def test_a_run_that_fits_prints_its_placement(check, assets):
    status, out, err = check(**APART)
    parameters = sum(p.numel() for p in load_model(ModelSource(str(assets / "student")), torch.float32).parameters())
    assert (status, err) == (0, "")
    assert out.startswith("versions: python ") and "\nfits\n" in out
    assert "first batch of each rank: 8×" in out.splitlines()[-1]
    assert f"{parameters:,}" in out
    if not torch.cuda.is_available():
        assert "no GPU was found, so device_mapping counts CPU slots" in out


def test_the_data_is_read_as_in_training(check, configure, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"question": "one?", "answer": "two"}\n{"question": "three?"}\n')
    data = {"student.data_args.file_name": [str(rows)]}
    status, out, err = check(**data)
    assert status == 2 and "\nfits\n" in out
    assert err.startswith(f"limbeck: {rows}:2 ") and err.count("\n") == 1
    rows.write_text('{"question": "one?", "answer": "two"}\n')
    with pytest.raises(LimbeckError, match="1 row"):  # less than one step
        describe_data(configure(**data))
    environment = {"rollout.environment": "exact", "rollout.max_new_tokens": 8}
    assert describe_data(configure(**environment)).endswith("\nfirst batch: written by the student when it trains")
    with pytest.raises(LimbeckError, match="a row has no reference answer in the column result"):
        describe_data(configure(**environment, **{"rollout.environment_kwargs": {"answer_key": "result"}}))
    with pytest.raises(LimbeckError, match="num_generations = 3 does not divide the 8 samples of a step"):
        describe_data(configure(**environment, **{"rollout.num_generations": 3}))


def test_the_position_of_a_checkpoint_must_fit(check, configure):
    run = configure(max_steps=1)
    DistillPipeline(run).run()
    resumed = {"resume_from_checkpoint": True, "max_steps": 2}
    status, out, err = check(**resumed)
    assert (status, err) == (0, "") and "first batch of each rank after step 1: 8×" in out
    status, _, err = check(**resumed, **{"student.training_args.per_device_train_batch_size": 4})
    assert status == 2 and "rows_per_step = 8, and this run has 4" in err
    (checkpoint,) = Path(run.output_dir).glob("checkpoint-1")
    (checkpoint / "manifest.json").write_text("{}")
    assert check(**resumed)[0] == 2


def test_versions_and_trackers_are_checked(check, monkeypatch):
    monkeypatch.setattr(
        preflight, "requires", lambda name: ["torch>=999", "numpy>=1", 'hypothesis>999; extra == "dev"']
    )
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, out, err = check(track_with="wandb")
    assert status == 2 and "\nfits\n" not in out
    note, library, tracker = err.splitlines()
    assert note.startswith("note: hypothesis ")
    assert library.startswith("limbeck: torch ") and library.endswith("needs >=999; pip install 'torch>=999'.")
    assert tracker.endswith("install it with: pip install 'limbeck[wandb]'.")


def test_everything_that_is_missing_is_an_error_before_anything_starts(check, tmp_path):
    (tmp_path / "empty").mkdir()
    row = str(tmp_path / "row.jsonl")
    files = {"student_pretrain": str(tmp_path / "empty"), "teacher_pretrain": str(tmp_path / "none")}
    status, out, err = check(**APART, **files, **{"validation.data_args.file_name": [row]})
    assert status == 2 and "parameters" not in out
    student, teacher, data = err.splitlines()
    assert student.startswith(f"limbeck: there is no config.json in {str(tmp_path / 'empty')!r}, so the student cannot")
    assert teacher.startswith(f"limbeck: there is no folder {str(tmp_path / 'none')!r} to load the teacher from;")
    assert data.startswith(f"limbeck: The data file {row} does not exist")


def test_a_damaged_model_is_an_error_and_the_other_is_still_checked(check, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", ')
    status, out, err = check(**APART, student_pretrain=str(tmp_path))
    assert status == 2 and " teacher " in out
    assert "not a valid JSON file. Check the files in that folder" in err and err.count("\n") == 1


@pytest.mark.slow
def test_memory_is_what_the_models_of_a_run_hold(configure, assets):
    student = load_model(ModelSource(str(assets / "student")), torch.float32)
    teacher = load_model(ModelSource(str(assets / "teacher")), torch.float32)
    count, theirs = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    parameters = sum(1 for _ in student.parameters())
    # Of each parameter 4 bytes for weight, gradient and both moments of Adam, whose step counts are numbers of their own.
    steps, buffers = 4 * parameters, 4 * sum(b.numel() for b in student.buffers())
    frozen_buffers = 4 * sum(b.numel() for b in teacher.buffers())
    head = teacher.get_output_embeddings().weight.numel()
    counts = [sum(p.numel() for p in part.parameters()) for part in (student.model.embed_tokens, *student.model.layers)]
    alone = configure()
    assert student_memory(alone).per_rank == 16 * count + steps + buffers
    assert teacher_memory(alone).per_rank == 4 * theirs + frozen_buffers
    apart = configure(**{"student.device_mapping": [0, 1], "teacher.device_mapping": [2, 3]})
    # The first rank has the larger half of an odd vocabulary, and receives the teacher's output head.
    rows, width = student.get_input_embeddings().weight.shape
    odd = rows % 2
    assert student_memory(apart).per_rank == 8 * (count + 2 * odd * width) + steps + buffers + 4 * head
    body = theirs - head + odd * head // rows
    assert teacher_memory(apart).per_rank == 2 * body + 4 * head + frozen_buffers
    copies = {f"{STUDENT}.replicate": True, "teacher.strategy_args.strategy_name": "hf_infer"}
    whole = configure(**{"student.device_mapping": [0, 1], "teacher.device_mapping": [2, 3]}, **copies)
    assert student_memory(whole).per_rank == 16 * count + steps + buffers + 4 * head
    assert teacher_memory(whole).per_rank == 4 * theirs + frozen_buffers
    adapters = student_memory(configure(**{"student.model_args.lora_target": "all-linear"}))
    assert 4 * count < adapters.per_rank < 8 * count
    sizes = {"student.device_mapping": [0, 1], f"{STUDENT}.tensor_model_parallel_size": 2}
    whole_on_both = sum(p.numel() for name, p in student.named_parameters() if "norm" in name)
    sliced = 16 * whole_on_both + 8 * (count - whole_on_both + 2 * odd * width)
    assert student_memory(configure(**sizes)).per_rank == sliced + steps + buffers
    deep = {"student.device_mapping": [0, 1, 2, 3], f"{STUDENT}.pipeline_model_parallel_size": 2}
    stages = student_memory(configure(**deep))
    first = 8 * (counts[0] + counts[1])  # two ranks hold each stage
    assert stages.per_stage == pytest.approx((first, 8 * count - first), rel=0.005)
    assert [stages.held_by(rank) for rank in range(4)] == [*stages.per_stage] * 2


def test_a_teacher_without_a_model_takes_no_memory(check):
    TEACHERS.register("mine", NEEDS_NO_MODEL)(lambda context: None)
    status, out, _ = check(teacher_pretrain=None, **{"teacher.source": "mine"})
    assert status == 0 and " student " in out and " teacher " not in out


def test_memory_that_sizes_do_not_determine_is_a_notice(check):
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    status, out, err = check(
        **{"student.strategy_args.strategy_name": "deepspeed_train", f"{STUDENT}.zero_optimization": offload}
    )
    assert status == 0 and "\nfits\n" in out
    assert err.startswith("note: memory is not checked: student") and "offload_optimizer" in err
    assert " teacher " in out and " student " not in out


@pytest.mark.parametrize(
    ("stage", "accumulate", "bytes_each"),
    [(1, 1, 4 + 4 / 2 + 12 / 2), (1, 2, 4 + 4 + 12 / 2), (2, 1, 4 + 16 / 2), (3, 1, 20 / 2)],
)
@pytest.mark.slow
def test_memory_of_a_zero_stage_is_what_it_does_not_shard_and_its_shards(
    configure, assets, stage, accumulate, bytes_each
):
    count = sum(p.numel() for p in load_model(ModelSource(str(assets / "student")), torch.float32).parameters())
    zero = {
        "student.strategy_args.strategy_name": "deepspeed_train",
        f"{STUDENT}.zero_optimization": {"stage": stage},
        "student.training_args.gradient_accumulation_steps": accumulate,
    }
    load = student_memory(configure(**{"student.device_mapping": [0, 1]}, **zero))
    assert load.per_rank == pytest.approx(bytes_each * count, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"student.device_mapping": [0, 1, 2], "student.strategy_args.strategy_config.fsdp_size": 2},
            "student: strategy_config.fsdp_size = 2 does not divide the 3 processes",
        ),
        (
            {"student.device_mapping": [0, 1, 2], f"{STUDENT}.tensor_model_parallel_size": 3},
            "tensor_model_parallel_size = 3 does not divide the 4 attention heads",
        ),
        (
            {"student.device_mapping": list(range(6)), f"{STUDENT}.pipeline_model_parallel_size": 6},
            "pipeline_model_parallel_size = 6 is more than the layers of",
        ),
        ({**APART, "student.model_args.dtype": "fp16"}, "fp16 trains on several ranks with deepspeed_train and"),
        (
            {**APART, "logits_transfer_backend": "nccl-only"},
            "logits_transfer_backend = nccl-only does not send from CPU to CPU, where the workers are; use gloo (or ray).",
        ),
        ({**APART, "num_nodes": 2, "num_gpus_per_node": 2}, "num_nodes = 2, but there are 1 machine(s); set RAY_ADDRESS"),
        ({"output_dir": f"{__file__}/run"}, "cannot be written to: Not a directory; set another output_dir"),
        ({"teacher_pretrain": "/nowhere/at/all"}, "there is no folder '/nowhere/at/all' to load the teacher from"),
        (
            {
                **APART,
                "teacher_pretrain": None,
                "teacher.model_args.from_scratch": True,
                "teacher.model_args.model_config_kwargs": {
                    "model_type": "qwen2", "hidden_size": 49152, "intermediate_size": 262144, "num_hidden_layers": 20,
                },
            },
            "of memory; use more machines, smaller models or LoRA",
        ),
    ],
    ids=["divisibility", "heads", "layers", "dtype", "transport", "machines", "output", "checkpoint", "memory"],
)  # fmt: skip
def test_each_problem_is_one_sentence(check, changes, sentence):
    status, out, err = check(**changes)
    assert status == 2
    assert sentence in err
    assert all(line.startswith(("limbeck: ", "note: ")) for line in err.splitlines())
    assert "\nfits\n" not in out


@pytest.mark.parametrize(
    ("processes", "changes", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, {f"{STUDENT}.tensor_model_parallel_size": 2}, ""),
        ({}, {f"{STUDENT}.tensor_model_parallel_size": 2}, "does not divide the 1 process"),
        ({"WORLD_SIZE": "3"}, {f"{STUDENT}.tensor_model_parallel_size": 2}, "does not divide the 3 processes"),
        ({"WORLD_SIZE": "many"}, {}, "WORLD_SIZE = 'many' is not a number of processes; unset it"),
        ({"WORLD_SIZE": "4"}, {}, "device_mapping names GPU 3, but there are 2"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, {"num_nodes": 2, "num_gpus_per_node": 2}, ""),
    ],
)
def test_the_ranks_of_a_launcher_are_counted(check, monkeypatch, processes, changes, sentence):
    machine = preflight.Machine("box", 8, 2, 2**40, 2**40, versions())
    monkeypatch.setattr(preflight, "this_machine", lambda: machine)
    for name, number in processes.items():
        monkeypatch.setenv(name, number)
    status, out, err = check(**changes)
    assert (status, "first batch of each rank" in out) == ((2, False) if sentence else (0, True)), err
    assert sentence in err


@pytest.mark.parametrize(("gpu_memory", "fits"), [(2**20, True), (2**19, False)])
def test_roles_that_share_a_gpu_add_up(check, monkeypatch, gpu_memory, fits):
    machine = preflight.Machine("box", 8, 1, 2**40, gpu_memory, versions())
    monkeypatch.setattr(preflight, "this_machine", lambda: machine)
    status, _, err = check()  # 0.61 MB of the student and 0.37 MB of the teacher
    assert (status == 0) is fits
    assert ("device 0 (box) would hold 0.97 MB" in err) is not fits


@pytest.mark.workers
def test_the_resources_of_a_joined_ray_are_checked(check):
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
        assert "there is no teacher service named judge on this Ray (services: none)" in err
