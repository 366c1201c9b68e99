import json, subprocess, sys, yaml, pytest
from pathlib import Path
from limbeck.config import load_mapping
from limbeck.plan.simulate import simulate
C = [{}, {"student.training_args.gradient_accumulation_steps": 2,"student.model_args.disable_gradient_checkpointing": False}]
@pytest.mark.parametrize("n", [1,2])
@pytest.mark.parametrize("changes", C)
def test_x(from_config, tmp_path, changes, n):
    values = from_config(**changes)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    if n==1: launcher=[sys.executable]
    command = [*launcher, str(Path(__file__).with_name("held.py")), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    held = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("@"))[1:])
    (planned,) = simulate(load_mapping(values).config, n, "cpu").values()
    print("HELD", held, sum(held["peak"].values())); print("PLAN", planned.steady, planned.peak, planned.total, sum(planned.sent.values()))
