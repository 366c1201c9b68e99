"""The sbatch script, with stand-ins for ``srun`` and ``scontrol`` that start its command as two tasks of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import assert_same_weights, metrics, rows

from limbeck import DistillPipeline
from limbeck.config import load_config

from .pods import free_port

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "distill.sbatch"
SRUN = """#!/bin/bash
# One task per node: the options are those of srun, up to the command.
while [[ $1 == -* ]]; do shift; done
tasks=()
for node in 0 1; do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_NTASKS=2 "$@" & tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""


@pytest.mark.processes
@pytest.mark.workers
def test_the_tasks_of_a_job_train_as_one_process(settings, tmp_path):
    shared = {"save_steps": 0, "eval_steps": 0, "student.training_args.num_train_epochs": 4}
    for name, batch in (("one", 8), ("two", 4)):
        values = settings(**rows(batch), **shared, max_steps=3, output_dir=str(tmp_path / name))
        values.pop("validation")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    DistillPipeline(load_config(tmp_path / "one.yaml").config).run()
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\nprintf 'localhost\\nother\\n'\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(free_port() - 10_000),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "two.yaml"), "max_steps=3"],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(metrics(tmp_path / "two", "train/loss")) == 3
    assert_same_weights(tmp_path / "one" / "student", tmp_path / "two" / "student", tolerance=1e-4)
