"""The template of the HyperPod walkthrough, ``kubernetes/distill.yaml-template``, for ``envsubst``.

It is the PyTorchJob of ``limbeck deploy kubernetes`` with the variables of the walkthrough instead of numbers and names::

    python -m limbeck.deploy.hyperpod > kubernetes/distill.yaml-template
"""

from __future__ import annotations

import sys

from limbeck.deploy.job import Job
from limbeck.deploy.kinds import pytorch_job
from limbeck.deploy.manifest import render

SCRIPT = "/distillation/distil_logits_cli.py"
"""Where the image has the script."""

FLAGS = {
    "teacher_model": "${TEACHER_MODEL}",
    "student_model": "${STUDENT_MODEL}",
    "num_samples": "${NUM_SAMPLES}",
    "num_train_epochs": "${NUM_EPOCHS}",
    "gradient_accumulation_steps": "4",  # 100 samples are more than one step on 16 GPUs, unlike with the default
    "save_location": "${SAVE_LOCATION}",
    "hub_location": "${HUB_LOCATION}",
    "output_dir": "${OUTPUT_DIR}",
    "resume_from_checkpoint": "latest",
}
"""Flags of the script, to their values."""

_HEADER = """\
# Manifest of the HyperPod walkthrough, see docs/hyperpod.md: cat distill.yaml-template | envsubst > distill.yaml
# Written by `python -m limbeck.deploy.hyperpod`. The token of the hub is not a variable here, but in the Secret hf-token.
"""


def template() -> str:
    """The text of the template."""
    job = Job(
        image="${IMAGE_URI}",
        pvc="fsx-claim",
        program=(SCRIPT, *(f"--{flag}={value}" for flag, value in FLAGS.items())),
        nodes="${NUM_NODES}",
        gpus_per_node="${GPU_PER_NODE}",
        efa_per_node="${EFA_PER_NODE}",
        instance_type="${INSTANCE_TYPE}",
        fi_provider="${FI_PROVIDER}",
    )
    return _HEADER + render([pytorch_job(job)])


if __name__ == "__main__":
    sys.stdout.write(template())
