"""Several real processes give what one gives: FSDP2 over gloo, started by torchrun or by device_mapping."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from runs import assert_same_weights, forget_after, launch, metrics, rows, train

from limbeck import DistillPipeline


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, rows(4)),
        (2, {**rows(2, 2), "student.model_args.disable_gradient_checkpointing": False}),
        (2, {**rows(4), "student.strategy_args.strategy_config.replicate": True,
             "teacher.strategy_args.strategy_name": "hf_infer"}),
        (4, {**rows(2), "student.strategy_args.strategy_config.fsdp_size": 2}),
    ],
    ids=["fsdp2", "accumulated-and-recomputed", "replicated", "hsdp"],
)  # fmt: skip
def test_ranks_give_the_losses_of_one(alone, settings, tmp_path, ranks, changes):
    # No warm-up and clipping on: the gradient norm must be global for the weights to agree.
    train(settings(**changes), tmp_path, ranks)
    for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss", "val/top1_agreement"):
        assert metrics(tmp_path / "out", key) == pytest.approx(metrics(alone(), key), rel=1e-5, abs=1e-5), key


@pytest.mark.processes
def test_packed_ranks_give_the_losses_of_one_also_with_a_mixture(configure, settings, assets, tmp_path):
    lines = (assets / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("few", lines[:24]), ("many", lines[24:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sources = [{"path": str(tmp_path / "few.jsonl"), "weight": 1}, {"path": str(tmp_path / "many.jsonl"), "weight": 1}]
    packed = {"student.use_sequence_packing": True, "student.packing_algorithm": "modified_first_fit_decreasing",
              "max_steps": 4, "student.data_args.file_name": None, "student.data_args.sources": sources}  # fmt: skip
    budget = {"student.use_dynamic_batching_in_train": True, "student.max_tokens_per_microbatch_in_train": 64,
              "student.sequence_length_round_in_train": 1}  # fmt: skip
    DistillPipeline(configure(**packed, **rows(4), output_dir=str(tmp_path / "one"))).run()
    train(settings(**packed, **rows(2), **budget, output_dir=str(tmp_path / "many")), tmp_path, 2)
    for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss"):
        assert metrics(tmp_path / "many", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-5, abs=1e-5), key
    assert set(metrics(tmp_path / "many", "train/padding_share")) == {0.0}


@pytest.mark.processes
def test_a_run_goes_on_with_another_number_of_ranks(alone, configure, settings, tmp_path, capsys):
    one, out = alone(), tmp_path / "out"
    train(settings(**rows(4)), tmp_path, 2)
    forget_after(out, 10)
    DistillPipeline(configure(resume_from_checkpoint="latest")).run()
    assert "at step 10" in capsys.readouterr().out
    assert metrics(out, "train/loss")[-1] == pytest.approx(metrics(one, "train/loss")[-1], abs=1e-6)
    forget_after(out, 10)
    train(settings(**rows(4)), tmp_path, 2, "resume_from_checkpoint=latest")
    assert metrics(out, "train/loss")[-1] == pytest.approx(metrics(one, "train/loss")[-1], abs=1e-6)
    assert_same_weights(one / "student", out / "student", tolerance=1e-4)


@pytest.mark.processes
def test_device_mapping_starts_its_own_ranks(settings, tmp_path):
    mapped = settings(**rows(4), max_steps=2, **{"student.device_mapping": "list(range(0,2))"})
    text = launch(mapped, tmp_path, 1)
    assert "4 × 1 × 2 rows on 2 × cpu" in text
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


@pytest.mark.processes
def test_a_mistake_on_several_ranks_is_one_sentence_and_status_two(settings, tmp_path):
    mapped = settings(**rows(4), **{"student.device_mapping": "0,1", "teacher_pretrain": str(tmp_path / "nowhere")})
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(mapped))
    command = [sys.executable, "-m", "limbeck", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("nowhere") == 1


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_reaches_every_rank(settings, tmp_path, number):
    keys = settings(**rows(4), max_steps=10_000, eval_steps=0, save_steps=0, **{"student.device_mapping": "0,1"})
    keys["student"]["training_args"]["num_train_epochs"] = 10_000
    keys.pop("validation")
    config, out = tmp_path / "long.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "limbeck", "train", str(config)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").is_file() and len((out / "metrics.jsonl").read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C goes to all
    else:
        process.send_signal(number)  # a scheduler's goes to the one it knows
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, text
    assert f"Stopped by {number.name}" in text
    assert text.count("Stopping after this step and saving") == 1, "by the main rank only"
    assert (out / "student" / "model.safetensors").is_file()


SLOW_MAIN = """
import os, sys, time
from limbeck.strategies.world import start_world
with start_world(timeout_minutes=1 / 20) as world:  # what any other collective gets
    if world.is_main:
        time.sleep(7)
        if sys.argv[1] == "dies":
            os._exit(7)
    world.barrier()
    print(f"rank {world.rank} goes on", flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("main", ["lives", "dies"])
def test_ranks_wait_for_a_long_tokenisation_but_not_for_a_dead_one(tmp_path, main):
    script = tmp_path / "slow_main.py"
    script.write_text(SLOW_MAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(script), main], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode == 0) == (main == "lives"), done.stderr
    assert done.stdout.count("goes on") == (2 if main == "lives" else 0)


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is in PyTorch 2.9 and later")
def test_muon_on_ranks_gives_the_losses_of_one(configure, settings, tmp_path):
    muon = {"student.training_args.optimizer_name": "muon", "max_steps": 3, "eval_steps": 0, "save_steps": 0}
    DistillPipeline(configure(**muon, output_dir=str(tmp_path / "one"))).run()
    train(settings(**muon, **rows(4), output_dir=str(tmp_path / "many")), tmp_path, 2)
    one, many = (metrics(tmp_path / name, "train/loss") for name in ("one", "many"))
    assert many == pytest.approx(one, rel=2e-4)  # Muon computes in bfloat16
