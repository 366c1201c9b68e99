"""A generator on devices of its own: what is refused, whose engines they are, and the form of NeMo-RL."""

import re

import pytest
from test_nemo_rl import UPSTREAM

RUN = """
student_pretrain: student
teacher_pretrain: teacher
distill_loss_weight: 1
student: {data_args: {file_name: [train.jsonl]}, device_mapping: [0, 1]}
rollout: {generator: vllm, device_mapping: "list(range(2, 8))", generator_kwargs: {tensor_parallel_size: 2}}
"""


def test_the_engines_belong_to_the_ranks_in_turn(load):
    config = load(yaml=RUN).config
    assert config.rollout.device_mapping == [2, 3, 4, 5, 6, 7]
    assert config.generator_devices == [4, 2]
    assert load("rollout.device_mapping=[7,9]", yaml=RUN).config.generator_devices == [2, 0]
    assert load("rollout.device_mapping=null", "rollout.generator_kwargs={}", yaml=RUN).config.generator_devices == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["rollout.generator=hf"], "rollout.device_mapping needs a generator in other processes, which hf is not"),
        (["student.device_mapping=null"], "rollout.device_mapping needs the devices of the student"),
        (["student.device_mapping=[0,2]"], "rollout.device_mapping has the device 2 of student.device_mapping"),
        (["teacher.device_mapping=[7]"], "rollout.device_mapping has the device 7 of teacher.device_mapping"),
        (
            ["teacher.device_mapping=[1]"],
            "cannot be combined with worker groups of student and teacher on common devices",
        ),
        (["num_nodes=2", "num_gpus_per_node=4"], "rollout.device_mapping is only supported on one machine"),
        (["num_gpus_per_node=7"], "rollout.device_mapping has device 7 (counted from 0), but num_gpus_per_node = 7"),
        (["rollout.device_mapping=[2,3,4]"], "tensor_parallel_size = 2 does not divide the 3 devices"),
        (["rollout.generator_kwargs.tensor_parallel_size=x"], "tensor_parallel_size = x does not divide the 6 devices"),
        (["rollout.offload=true"], "rollout.offload frees devices that only the generator has"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(mistakes, changes, sentence):
    assert any(sentence in line for line in mistakes(*changes, yaml=RUN))


NEMO_RL = UPSTREAM.replace(
    "backend: hf", "backend: vllm, vllm_cfg: {tensor_parallel_size: 2, gpu_memory_utilization: 0.9}"
)
APART = [
    "policy.generation.colocated={enabled: false, resources: {gpus_per_node: 4, num_nodes: null}}",
    "policy.train_global_batch_size=8",
]


@pytest.fixture
def prompt(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "ask.txt").write_text("Q: {}")


def test_generation_that_is_not_colocated_has_the_last_devices(load, prompt):
    config = load(*APART, "teacher.dtensor_cfg.tensor_parallel_size=2", yaml=NEMO_RL).config
    assert config.device_mapping == [0, 1, 2, 3]
    assert config.rollout.device_mapping == [4, 5, 6, 7]
    assert config.rollout.generator_kwargs == {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.9}
    # 8 samples on 2 data-parallel ranks of the 4 devices that are left
    training = config.student.training_args
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 2)


def test_colocated_generation_has_an_engine_on_every_rank(load, prompt):
    loaded = load("policy.generation.colocated={enabled: true, resources: {gpus_per_node: 4}}", yaml=NEMO_RL)
    assert (loaded.config.rollout.device_mapping, len(loaded.config.device_mapping)) == (None, 8)
    assert loaded.config.rollout.generator_kwargs == {"gpu_memory_utilization": 0.9}
    assert any("policy.generation.vllm_cfg.tensor_parallel_size" in notice for notice in loaded.notices)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "policy.generation.colocated.resources.gpus_per_node=null",
            "gpus_per_node = null must be the number of devices",
        ),
        ("policy.generation.colocated.resources.gpus_per_node=8", "gpus_per_node = 8 must be the number of devices"),
        ("cluster.num_nodes=2", "policy.generation.colocated.enabled = false is only supported on one machine"),
        ("policy.generation.colocated.resource=1", "policy.generation.colocated.resource is not a key"),
    ],
)
def test_generation_that_cannot_be_placed_is_refused(mistakes, prompt, change, sentence):
    lines = mistakes(*APART, f"++{change}", yaml=NEMO_RL)
    assert any(re.search(re.escape(sentence), line) for line in lines), lines
