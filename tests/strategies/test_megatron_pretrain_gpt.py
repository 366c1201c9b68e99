"""The script with Megatron-LM's arguments, run by the ranks of a launcher on megatron-core."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import assert_same_weights, metrics
from tiny import make_model

from limbeck.launch.start import train_from_arguments
from strategies.megatron_runs import needs_megatron

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_gpt.py"
FLAGS = """--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --max-position-embeddings 64 --attention-dropout 0 --hidden-dropout 0
    --seq-length 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 --adam-eps 1e-4 --log-interval 1
    --eval-iters 0 --mock-data --tokenizer-type HuggingFaceTokenizer"""
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --limbeck-strategy megatron"


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_slices_of_matrices_and_optimizer_give_the_losses_of_one_rank(tmp_path):
    teacher = make_model(tmp_path / "teacher", seed=1)
    text = f"{FLAGS} --export-kd-teacher-load {teacher} --tokenizer-model {teacher}"
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_from_arguments(str(SCRIPT), f"{text} --limbeck-strategy fsdp2 --save {one}".split(), "megatron") == 0
    words = f"{text} {LAYOUT} --save {two} plugins=[{Path(__file__).with_name('megatron_on_cpu.py')}]".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(SCRIPT), *words], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((two / "checkpoint-4" / "training" / "state.json").read_text())["config"]
    given = config["student"]["strategy_args"]
    assert given["strategy_name"] == "megatron_train"
    assert given["strategy_config"]["megatron"]["use_distributed_optimizer"]
    losses = metrics(one, "train/loss")
    assert len(losses) == 4 and metrics(two, "train/loss") == pytest.approx(losses, rel=1e-5)
    assert_same_weights(one / "student", two / "student", tolerance=1e-5)
