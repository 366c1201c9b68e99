"""What writing in the training process holds: copies of weights and the cache of keys and values of the generator ``hf``."""

from __future__ import annotations

from limbeck.config import DistillConfig
from limbeck.config.schema.rollout_rules import lockstep_obstacle
from limbeck.models.dtypes import compute_dtype
from limbeck.plan.micro_batch import longest_row
from limbeck.plan.models import count_parameters, outline
from limbeck.rollout.hf import cache_bytes
from limbeck.rollout.student import writing_dtype
from limbeck.strategies.base import dims_of


def copies_weights(config: DistillConfig) -> bool:
    """Whether the generator ``hf`` writes with a copy of the student's weights; with ``copy: auto`` too."""
    return _student_writes(config) and not (config.rollout is not None and config.rollout.in_lockstep)


def _student_writes(config: DistillConfig) -> bool:
    rollout = config.rollout
    if rollout is None or rollout.generator != "hf":
        return False
    return "student" in rollout.origins or config.effective_validation.rollout is not None


def leaves_copy_open(config: DistillConfig) -> bool:
    """Whether the memory of the GPUs decides between a copy and lockstep."""
    is_auto = config.rollout is not None and config.rollout.generator_kwargs.get("copy", "auto") == "auto"
    return is_auto and copies_weights(config) and lockstep_obstacle(config) is None


def with_copy(config: DistillConfig, *, copy: bool) -> DistillConfig:
    """``config`` with ``rollout.generator_kwargs.copy`` set."""
    assert config.rollout is not None
    arguments = {**config.rollout.generator_kwargs, "copy": copy}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"generator_kwargs": arguments})})


def add_writing(config: DistillConfig, peak: dict[str, int], most: dict[str, int], ranks: int, device: str) -> None:
    """Add what models hold that write in the training process to the bytes ``peak`` and ``most`` of a step, by tag.

    Copies of weights are beside activations unless they are offloaded, a cache of keys and values only with
    ``max_staleness``. Fake tensors must be in use.

    ranks: number of the student's. device: type of the devices.

    Raises:
        LimbeckError: if a model that writes keeps state other than keys and values.
    """
    answers, rollout = _answers_at_a_time(config, ranks), config.rollout
    if rollout is None or not answers:
        return
    copies, caches, dtype = {}, {}, writing_dtype(device)
    for role, count in answers.items():
        worker, copied = (config.student, not rollout.in_lockstep) if role == "student" else (config.teacher, True)
        model = outline(config, worker.model_args, dtype if copied else compute_dtype(worker), role)
        if copied:
            copies["copy" if role == "student" else "teacher copy"] = count_parameters(model) * dtype.itemsize
        caches[role] = cache_bytes(model, min(count, rollout.slots), longest_row(config)[0] - 1)
    # A thread writes with the student while the teacher writes; else one of them writes at a time.
    most.update(copies, cache=sum(caches.values()) if rollout.max_staleness else max(caches.values()))
    held = ["parameters", "optimizer", "teacher", "copy", "teacher copy", "cache"] + ["gathered"] * rollout.in_lockstep
    writing = {tag: most[tag] for tag in held if tag in most}
    if not (rollout.offload or config.offloads_colocated):
        peak.update(copies)
    if rollout.max_staleness:
        peak["cache"] = caches.get("student", 0)
    if sum(writing.values()) > sum(peak.values()):
        peak.clear()
        peak.update(writing)


def _answers_at_a_time(config: DistillConfig, ranks: int) -> dict[str, int]:
    """By the role of each model that writes in the training process, the most answers that it is given at a time on a rank."""
    rollout, validation = config.rollout, config.effective_validation.rollout
    if rollout is None:
        return {}
    training, found = config.student.training_args, {}
    samples = training.per_device_train_batch_size * training.gradient_accumulation_steps
    samples *= dims_of(config.student, ranks, "student").data_size
    prompts = -(-samples // rollout.num_generations // ranks)  # one rank writes all answers to a prompt
    if _student_writes(config):
        in_training = prompts * rollout.num_generations if "student" in rollout.origins else 0
        in_validation = 0
        if validation is not None:
            rows = (
                validation.max_samples or rollout.slots * ranks
            )  # as many as have slots, of a number that is not known
            in_validation = -(-rows // ranks) * validation.num_generations
        found["student"] = max(in_training, in_validation)
    if "teacher" in rollout.origins:
        found["teacher"] = prompts  # it writes one answer to each, as often as there are answers
    return found
