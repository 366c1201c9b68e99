"""A plan equals what real ranks hold, counts what they send, and refuses what cannot run."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from ranks import run_on_ranks
from tiny import make_model

from limbeck.cli import main
from limbeck.config import load_mapping
from limbeck.errors import UnknownMemory
from limbeck.plan.estimate import make_plan, refusal
from limbeck.plan.gpus import GPUS
from limbeck.plan.simulate import simulate
from limbeck.registry import NEEDS_NO_MODEL, TEACHERS

STUDENT, TEACHER = "student.strategy_args.strategy_config", "teacher.strategy_args.strategy_config"
OFFLOADED = (
    "student.strategy_args={strategy_name: deepspeed_train, strategy_config: "
    "{zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}}"
)


def zero(name: str, stage: int) -> dict:
    buckets = {"reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000, "stage3_prefetch_bucket_size": 50_000}
    return {"strategy_name": name, "strategy_config": {"zero_optimization": {"stage": stage, **buckets}}}


APART = {"student.device_mapping": [0, 1], "teacher.device_mapping": [2]}
CASES = {
    "sharded": {},
    "recomputed, frozen, accumulated": {
        "student.model_args.disable_gradient_checkpointing": False,
        "student.model_args.freeze_module_prefix": "model.embed_tokens",
        "student.training_args.gradient_accumulation_steps": 2,
    },
    "packed, replicated": {
        "student.use_sequence_packing": True,
        f"{STUDENT}.replicate": True,
        "teacher.strategy_args.strategy_name": "hf_infer",
    },
    "tensor parallelism": {
        f"{STUDENT}.tensor_model_parallel_size": 2,
        f"{TEACHER}.tensor_model_parallel_size": 2,
    },
    "context parallelism": {f"{STUDENT}.context_parallel_size": 2},
    "LoRA": {"student.model_args.lora_target": "all-linear"},
    "remote, hidden states": APART,
    "remote, top-k": {**APART, "logits_topk": 8, "student.model_args.dtype": "bf16"},
    "remote, logits": {**APART, "teacher.signal": "logits"},
    "pipeline parallelism": {
        f"{STUDENT}.pipeline_model_parallel_size": 2,
        f"{TEACHER}.pipeline_model_parallel_size": 2,
        "student.training_args.gradient_accumulation_steps": 4,
    },
    **{
        f"ZeRO-{stage}": {
            "student.strategy_args": zero("deepspeed_train", stage),
            "teacher.strategy_args": zero("deepspeed_infer", 3),
            "student.training_args.gradient_accumulation_steps": accumulate,
            "student.model_args.dtype": dtype,
        }
        for stage, accumulate, dtype in ((1, 1, "fp32"), (2, 2, "bf16"), (3, 2, "fp32"))
    },
}


def plan(values: dict, nodes: int = 1, per_node: int = 2):
    return make_plan(load_mapping(values).config, nodes, per_node, GPUS["H100"])


@pytest.mark.processes
def test_a_plan_equals_what_two_real_ranks_hold(from_config, tmp_path):
    files = []
    for number, changes in enumerate(CASES.values()):
        values = from_config(**changes, output_dir=str(tmp_path / f"out-{number}"))
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(values))
    output = run_on_ranks(2, str(Path(__file__).with_name("held.py")), *map(str, files))
    (measured,) = (json.loads(line[1:]) for line in output.splitlines() if line.startswith("@"))
    for number, (name, changes) in enumerate(CASES.items()):
        for step in simulate(load_mapping(from_config(**changes)).config, 3 if "remote" in name else 2, "cpu"):
            if step.role == "teacher":
                continue
            held = measured[step.rank][number]
            peak = held.pop("peak")
            assert {part: step.most.get(part, 0) for part in held} == held, name
            assert step.total == pytest.approx(peak, rel=0.1), name


@pytest.mark.slow
def test_a_sampled_token_is_sent_as_one_number(from_config):
    sampled = {"kd_objective": "policy_gradient", "distill_loss_weight": 1.0, "rollout": {}, "distill_on_prompt": False}
    steps = simulate(load_mapping(from_config(**APART, **sampled)).config, 3, "cpu")
    hidden = simulate(load_mapping(from_config(**APART)).config, 3, "cpu")
    sent, whole = ([step.signal for step in of if step.role == "teacher"] for of in (steps, hidden))
    assert sent == [4 * steps[-1].micro_tokens] and sent < whole


def test_traffic_is_what_fsdp_gathers_and_reduces(from_config):
    (group,) = plan(from_config(), 2, 2).groups
    whole = 4 * group.step.parameters["student"]
    sent = {kind: size for (kind, _), size in group.step.sent.items()}
    assert sent["reduce_scatter"] == whole  # every gradient once, in float32
    assert sent["all_gather"] > whole  # the layers twice, the root once, and the teacher's layers
    assert {each.link for each in group.traffic} == {"between nodes"}


@pytest.mark.slow
def test_hybrid_sharding_gathers_within_a_node(from_config):
    (group,) = plan(from_config(**{f"{STUDENT}.fsdp_size": 4}), 2, 4).groups
    links = {(each.collective, each.ranks): each.link for each in group.traffic}
    assert links["reduce_scatter", 4] == "within the node"
    assert links["all_reduce", 2] == "between nodes"
    (whole,) = plan(from_config(), 2, 4).groups
    assert group.step.most["parameters"] == pytest.approx(2 * whole.step.most["parameters"], rel=0.01)


@pytest.mark.slow
def test_roles_with_their_own_devices_are_planned_separately(from_config):
    apart = {"student.device_mapping": [0, 1], "teacher.device_mapping": [2]}
    made = plan(from_config(**apart), 1, 4)
    student, teacher = made.groups
    assert (student.step.devices, teacher.step.devices) == ((0, 1), (2,))
    # One teacher rank serves both student ranks, whose traffic now includes the signal.
    colocated = plan(from_config(), 1, 2).groups[0]
    assert teacher.step.flops["teacher"] == 2 * colocated.step.flops["teacher"]
    assert [each.bytes for each in student.traffic if each.collective == "signal"] == [student.step.signal]
    assert student.step.most["teacher"] < teacher.step.most["teacher"]  # the head alone
    assert made.overlapped == max(student.overlapped, teacher.overlapped)
    shared = plan(from_config(**{**apart, "teacher.device_mapping": [1]}), 1, 2)
    assert shared.needed == student.step.total + teacher.step.total


@pytest.mark.slow
def test_pipeline_stages_are_planned_separately_and_wait_for_each_other(from_config):
    accumulate = {"student.training_args.gradient_accumulation_steps": 4}
    (whole,) = plan(from_config(**accumulate)).groups
    first, last = plan(from_config(**accumulate, **{f"{STUDENT}.pipeline_model_parallel_size": 2})).groups
    assert (first.place, last.place) == ("rank 0 of student and teacher", "rank 1 of student and teacher")
    assert [group.step.flops["loss"] for group in (first, last)] == [0, whole.step.flops["loss"]]
    assert first.step.flops["student"] + last.step.flops["student"] == whole.step.flops["student"]
    # Each stage works for four micro-batches' time, and waits for one more while the pipeline fills and drains.
    busy = last.seconds["student"] + last.seconds["loss"]
    assert last.seconds["waiting for other stages"] == pytest.approx(busy / 4)
    assert [each.ranks for each in first.traffic if each.collective == "receive"] == [2]


@pytest.mark.slow
def test_a_product_of_layouts_divides_one_student(from_config):
    sizes = ("tensor", "context", "pipeline")
    changes = {f"{STUDENT}.{name}_{'model_' * (name != 'context')}parallel_size": 2 for name in sizes}
    accumulate = {"student.training_args.gradient_accumulation_steps": 4}
    stages = plan(from_config(**changes, **accumulate), 1, 16).groups
    assert [stage.step.rank for stage in stages] == [0, 4]
    size = stages[0].step.parameters["student"]
    # Eight ranks hold a stage: its matrices in two slices, the rest in all of them.
    held = 8 * sum(stage.step.most["parameters"] for stage in stages)
    assert 4 * size < held < 4 * size * 1.02
    (whole,) = plan(from_config(**accumulate), 1, 2).groups
    assert 4 * sum(stage.step.flops["student"] for stage in stages) == whole.step.flops["student"]


@pytest.mark.slow
def test_deepspeed_shards_what_its_stage_shards(from_config, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    held = []
    for stage in (1, 2, 3):
        (group,) = plan(from_config(**{"student.strategy_args": zero("deepspeed_train", stage)}), 2, 4).groups
        held.append({name: size / group.step.parameters["student"] for name, size in group.step.most.items()})
    # Of 8 ranks each has an eighth of the float32 masters and of two moments, and from the third stage on of the parameters.
    assert [each["optimizer"] for each in held] == pytest.approx([12 / 8] * 3, rel=0.01)
    assert [each["parameters"] for each in held] == pytest.approx([4, 4, 4 / 8], rel=0.01)
    assert "LOCAL_RANK" not in os.environ  # accelerate would take a later Trainer for one of several ranks


@pytest.mark.slow
def test_what_a_library_allocates_is_not_counted_as_activations(from_config):
    (alone,) = simulate(load_mapping(from_config()).config, 1, "cpu")
    for changes in ({}, *({"student.strategy_args": zero("deepspeed_train", stage)} for stage in (1, 2, 3))):
        (sharded,) = simulate(load_mapping(from_config(**changes)).config, 2, "cpu")
        # Sharding changes neither; what is gathered for a pass would come on top.
        assert sharded.activations == pytest.approx(alone.activations, rel=0.001), changes
        assert sharded.most["activations"] == pytest.approx(alone.most["activations"], rel=0.01), changes
        assert sharded.most["gathered"] > 0, changes


def test_a_teacher_without_a_model_cannot_be_planned(from_config):
    TEACHERS.register("mine", NEEDS_NO_MODEL)(lambda context: None)
    config = from_config(teacher_pretrain=None, **{"teacher.source": "mine"})
    with pytest.raises(UnknownMemory, match=r"does not know what teacher\.source = mine holds in memory"):
        plan(config)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_student_with_experts_is_planned_in_any_precision(from_config, tmp_path, dtype):
    shape = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    student = make_model(tmp_path, kind="qwen3_moe", **shape)
    (group,) = plan(
        from_config(student_pretrain=str(student), **{"student.model_args.dtype": dtype}), per_node=1
    ).groups
    assert group.step.total > 0


def test_a_plan_that_does_not_fit_names_remedies(from_config):
    made = plan(from_config())
    small = replace(made, gpu=replace(GPUS["H100"], memory=made.needed))
    assert made.fits and not small.fits
    sentence = str(refusal(small))
    for part in ("most of it for activations", "gradient_checkpointing=false", "--gpu A100-40GB"):
        assert part in sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H1000"], "use one of A100"),
        (["--nodes", "0"], "both must be 1 or more"),
        (["--gpus-per-node", "6", f"{STUDENT}.fsdp_size=4"], "does not divide the 6"),
        (["--gpus-per-node", "3", f"{STUDENT}.tensor_model_parallel_size=2"], "does not divide the 3 processes"),
        (["--gpus-per-node", "3", f"{STUDENT}.tensor_model_parallel_size=3"], "does not divide the 4 attention heads"),
        (["student.model_args.dtype=fp16"], "bf16"),
        (["student.device_mapping=[0]", "teacher.device_mapping=[8]"], "names device 8"),
        ([OFFLOADED], "plan without it"),
        ([f"{STUDENT}.pipeline_model_parallel_size=3"], "does not divide the 8 processes"),
        (["--gpus-per-node", "4", f"{STUDENT}.pipeline_model_parallel_size=4"], "more than the layers"),
    ],
)
def test_an_impossible_layout_is_one_sentence(from_config, tmp_path, capsys, arguments, message):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(from_config()))
    assert main(["plan", str(file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not dist.is_initialized()


@pytest.mark.slow
def test_rows_are_as_long_as_both_models_take(from_config, tmp_path, capsys):
    longer, whole = (plan(from_config(sequence_length=length)) for length in (512, 256))
    assert longer.groups == whole.groups
    (notice,) = longer.notices
    assert "sequence_length = 512" in notice and "rows of 256 tokens" in notice and not whole.notices
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(from_config(sequence_length=512)))
    assert main(["plan", str(file)]) == 0
    assert notice in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_prints_tables_and_json(from_config, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(from_config(compile_model="auto")))
    words = ["plan", str(file), "--gpus-per-node", "2", "--gpu", "a100"]
    assert main(words) == 0
    assert "optimizer state" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] and printed["gpu"]["name"] == "A100"
    assert printed["compiled"] and 0 < printed["efficiency"]["models"] < printed["efficiency"]["loss"] < 1
    assert sum(printed["groups"][0]["peak"].values()) == printed["needed"]


@pytest.mark.slow
def test_the_expected_time_and_memory_are_those_that_were_measured_on_an_h100():
    """Measured by benchmarks/step_gpu.py, 0.5B<-1.5B, full rows, PyTorch 2.11: seconds of a step, and peak memory."""
    common = {
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 2,
        "model_type": "llama",
        "tie_word_embeddings": True,
    }
    shapes = {
        "student": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        "teacher": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    }
    model_args = {
        role: {"from_scratch": True, "dtype": "bf16", "model_config_kwargs": common | shape}
        for role, shape in shapes.items()
    }
    settings = {
        "tokenizer": "unread",
        "sequence_length": 1024,
        "student": {
            "model_args": model_args["student"] | {"disable_gradient_checkpointing": True},
            "training_args": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
            "data_args": {"file_name": "unread.jsonl"},
        },
        "teacher": {"model_args": model_args["teacher"]},
    }
    uncompiled = plan(settings | {"compile_model": False}, per_node=1)
    assert uncompiled.expected == pytest.approx(0.372, rel=0.2)
    assert uncompiled.needed == pytest.approx(25.25e9, rel=0.05)
    assert replace(uncompiled, compiled=True).expected == pytest.approx(0.241, rel=0.05)
    assert uncompiled.overlapped < uncompiled.expected
    table = Path(__file__).parents[3] / "shared/gpu/README.md"
    if table.exists():  # compiled layers, aligned products, activations recomputed
        row = next(line for line in table.read_text().splitlines() if "the same with gradient checkpointing" in line)
        seconds, _, peak = (float(cell.strip(" *GB").replace(" ", "")) for cell in row.split("|")[2:5])
        settings["student"]["model_args"]["disable_gradient_checkpointing"] = False
        recomputed = plan(settings, per_node=1)
        assert recomputed.expected == pytest.approx(seconds, rel=0.2)
        assert recomputed.needed == pytest.approx(peak * 1e9, rel=0.05)
