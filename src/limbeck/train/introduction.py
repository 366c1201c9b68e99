"""What the console prints before the first step."""

from __future__ import annotations

from limbeck.strategies.base import dims_of
from limbeck.train.build.run import Run
from limbeck.train.console import RunConsole


def introduce(run: Run, console: RunConsole) -> None:
    """Print the data, the steps, the parallelism and where the run resumes."""
    config, world = run.config, run.world
    training = config.student.training_args
    console.print(run.data.report)
    console.print(
        f"{run.total_steps} steps of {training.per_device_train_batch_size} × "
        f"{training.gradient_accumulation_steps} × {world.dims.data_size} rows on "
        f"{world.size} × {world.device.type}; output: {config.output_dir}"
    )
    if run.colocated is not None:
        console.print(
            "Student and teacher share devices (is_offload_states): each is offloaded while the other computes, the "
            f"teacher for {config.offload_interval} steps at a time."
        )
    roles = [("student", world.dims)]
    if config.has_teacher and not config.needs_worker_groups:
        roles.append(("teacher", dims_of(config.teacher, world.size, "teacher")))
    for role, dims in roles:
        if dims.model_parallel_size > 1:
            console.print(f"The {role}: {dims.describe()}.")
    stages, micro_batches = world.dims.pp, training.gradient_accumulation_steps
    if stages > 1 and not config.student.use_dynamic_batching_in_train:
        console.print(
            f"With {micro_batches} micro-batches a step each of the {stages} pipeline stages is idle for "
            f"{(stages - 1) / (micro_batches + stages - 1):.0%} of the time; more gradient_accumulation_steps reduce that."
        )
    if run.resumed_from is not None:
        console.print(f"Resumed from {run.resumed_from} at step {run.step}.")
        if run.changed:
            console.print("\n  ".join(["note: settings that have changed since that checkpoint:", *run.changed]))
        if run.step >= run.total_steps:
            console.print(f"It has all of the {run.total_steps} configured steps; nothing is left to do.")
    elif config.resume_from_checkpoint:
        console.print(f"No checkpoint in {config.checkpoint_dir} yet: this is a new run.")
