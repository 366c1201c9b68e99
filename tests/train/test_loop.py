"""Whole runs: what the student learns, what is saved and measured, and how a run resumes."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import assert_same_weights, forget_after, metric_by_step, weights
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck import DistillPipeline, LimbeckError, divergence
from limbeck.data import tokenize_files
from limbeck.interrupt import StopRequest
from limbeck.models import ModelSource, load_tokenizer
from limbeck.strategies.world import World
from limbeck.train.checkpoint import find_damage, list_checkpoints
from limbeck.train.loop import Surroundings


def start(settings: dict, tmp_path: Path, *overrides: str) -> subprocess.Popen:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "limbeck", "train", str(config), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the run ended or hung too early:\n{process.stdout.read()}")
        time.sleep(0.02)


def test_first_loss_equals_the_loss_of_the_whole_logits(configure, assets):
    """Computes cross-entropy and divergence with one shifted mask from the logits of the unwrapped models."""
    config = configure(max_steps=1, kd_temperature=2.0, distill_loss_weight=0.3, kd_objective="reverse_kl")
    config = config.model_copy(update={"eval_steps": 0})
    files = list(config.student.data_args.file_name)
    examples, _ = tokenize_files(files, load_tokenizer(ModelSource(str(assets / "student"))), sequence_length=64)
    result = DistillPipeline(config.model_copy(update={"validation": None})).run()

    student, teacher = (AutoModelForCausalLM.from_pretrained(assets / name) for name in ("student", "teacher"))
    from limbeck.data import BatchStream, StreamSettings

    stream = BatchStream(
        examples,
        StreamSettings(seed=42, sequence_length=64, per_device_batch_size=8, pad_id=0),
    )
    (batch,) = next(stream).micro_batches
    keep = batch.labels != -100
    with torch.no_grad():
        z_s, z_t = (model(batch.input_ids).logits[keep] for model in (student, teacher))
    ce = torch.nn.functional.cross_entropy(z_s, batch.labels[keep])
    kd = divergence("reverse_kl")(z_s, z_t, 2.0).mean()
    assert result.metrics["train/train_student_loss"] == pytest.approx(ce.item(), rel=1e-4)
    assert result.metrics["train/train_distill_loss"] == pytest.approx(kd.item(), rel=1e-4)
    assert result.metrics["train/loss"] == pytest.approx((0.7 * ce + 0.3 * kd).item(), rel=1e-4)


def test_distillation_reduces_the_divergence_and_the_student_loads_with_transformers(configure):
    config = configure(max_steps=40, distill_loss_weight=1.0, save_steps=0, eval_steps=10)
    result = DistillPipeline(config).run()
    out = Path(config.output_dir)
    divergences = metric_by_step(out, "val/kd")
    assert divergences[40] < 0.7 * divergences[10]
    model = AutoModelForCausalLM.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    assert result.student == out / "checkpoint-40"
    assert tokenizer.chat_template
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 1 plus 2?"}], return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3


def test_every_documented_metric_is_written(configure):
    config = configure(max_steps=2, track_with="tensorboard")
    DistillPipeline(config).run()
    metrics = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    train, val_metrics = metrics[0], metrics[-1]
    for key in (
        "train/loss", "train/train_distill_loss", "train/train_student_loss", "student/lr", "student/grad_norm",
        "train/student_entropy", "train/teacher_entropy", "train/top1_agreement", "train/tokens", "train/padding_share",
        "train/tokens_per_second", "time/data", "time/teacher", "time/student", "time/optimizer", "time/step",
        "train/teacher_forward", "train/student_train_step", "system/peak_memory_gb",
    ):  # fmt: skip
        assert math.isfinite(train[key]), key
    assert {"val/loss", "val/ce", "val/kd", "val/top1_agreement", "student/val_loss"} <= val_metrics.keys()
    assert train["time/data"] + train["time/teacher"] + train["time/student"] <= train["time/step"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.log_dir))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        list(metric_by_step(Path(config.output_dir), "train/loss").values()), rel=1e-6
    )


@pytest.mark.parametrize("packing", [False, True])
def test_resume_is_bit_exact(configure, tmp_path, packing):
    changes = {
        "student.use_sequence_packing": packing,
        "student.training_args.lr_scheduler_type": "cosine",
        "student.training_args.per_device_train_batch_size": 2 if packing else 8,
        "student.training_args.num_train_epochs": 9,
        "student.training_args.gradient_accumulation_steps": 2 if packing else 1,
    }
    config = configure(**changes)
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    shutil.copytree(out, tmp_path / "full", symlinks=True)
    forget_after(out, 5)
    resumed = configure(**changes, resume_from_checkpoint=True)
    assert DistillPipeline(resumed).run().step == 12
    assert_same_weights(tmp_path / "full" / "checkpoint-12", out / "checkpoint-12")
    assert metric_by_step(out, "train/loss") == metric_by_step(tmp_path / "full", "train/loss")


@pytest.mark.parametrize(
    "optimizer",
    ["adafactor", "muon", pytest.param("adamw_8bit", marks=pytest.mark.slow)],  # which torchao compiles
)
def test_the_state_of_every_optimizer_is_in_the_checkpoint(configure, tmp_path, optimizer):
    if optimizer == "adamw_8bit":
        pytest.importorskip("torchao")
    changes = {"student.training_args.optimizer_name": optimizer, "save_steps": 2, "eval_steps": 0, "max_steps": 4}
    DistillPipeline(configure(**changes)).run()
    out = Path(configure().output_dir)
    shutil.copytree(out, tmp_path / "full", symlinks=True)
    forget_after(out, 2)
    DistillPipeline(configure(**changes, resume_from_checkpoint=True)).run()
    assert_same_weights(tmp_path / "full" / "checkpoint-4", out / "checkpoint-4")


@pytest.mark.processes
def test_a_killed_run_resumes_to_the_same_weights(settings, tmp_path):
    keys = {"save_steps": 2, "eval_steps": 0, "max_steps": 60, "validation": None}
    keys["student.training_args.num_train_epochs"] = 10
    whole = settings(**{**keys, "output_dir": str(tmp_path / "whole")})
    whole.pop("validation")
    killed = {**whole, "output_dir": str(tmp_path / "killed")}
    process = start(killed, tmp_path)
    out, at = tmp_path / "killed", random.Random(7).randrange(3, 20)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and len(metric_by_step(out, "train/loss")) >= at, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (out / "checkpoint-60").exists()
    resumed = start(killed, tmp_path, "resume_from_checkpoint=latest")
    assert "Resumed from" in resumed.communicate()[0]
    assert resumed.returncode == 0
    done = start(whole, tmp_path)
    done.communicate()
    assert done.returncode == 0
    assert_same_weights(tmp_path / "whole" / "checkpoint-60", out / "checkpoint-60")


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_a_checkpoint_and_exits(settings, tmp_path, number):
    keys = settings(max_steps=100_000, save_steps=0, eval_steps=0)
    keys["student"]["training_args"]["num_train_epochs"] = 100_000
    keys.pop("validation")
    process, out = start(keys, tmp_path), tmp_path / "out"
    wait_for(lambda: (out / "metrics.jsonl").is_file() and len(metric_by_step(out, "train/loss")) >= 2, process)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, text
    assert "Stopping after this step and saving; press Ctrl-C again to quit without saving." in text
    assert f"Stopped by {number.name}" in text
    (checkpoint,) = list_checkpoints(out)
    assert find_damage(checkpoint) is None


def test_old_checkpoints_are_removed_except_the_best(configure):
    # With such a high learning rate the student becomes worse after a while, so that the best is not the last.
    config = configure(max_steps=30, save_steps=3, max_ckpt_to_keep=2, **{"student.training_args.learning_rate": 0.2})
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    val_metrics = {step: value for step, value in metric_by_step(out, "val/loss").items() if step % 3 == 0}
    best = min(val_metrics, key=lambda step: (val_metrics[step], step))
    assert (out / "best").resolve().name == f"checkpoint-{best}"
    assert {path.name for path in list_checkpoints(out)} == {f"checkpoint-{best}", "checkpoint-30"} | (
        {"checkpoint-27"} if best == 30 else set()
    )
    assert (out / "student").resolve().name == "checkpoint-30"


def test_epochs_may_be_fractional_and_the_shorter_limit_applies(configure, tmp_path):
    epochs = {"student.training_args.num_train_epochs": 0.5}  # 96 rows of 8 make 12 steps
    assert DistillPipeline(configure(**epochs, max_steps=100, output_dir=str(tmp_path / "a"))).run().step == 6
    assert DistillPipeline(configure(**epochs, max_steps=3, output_dir=str(tmp_path / "b"))).run().step == 3


def test_accumulation_does_not_change_the_losses(configure, tmp_path):
    one = configure(max_grad_norm=0.0, output_dir=str(tmp_path / "one"))
    other = configure(
        max_grad_norm=0.0,
        output_dir=str(tmp_path / "other"),
        **{
            "student.training_args.per_device_train_batch_size": 2,
            "student.training_args.gradient_accumulation_steps": 4,
        },
    )
    for config in (one, other):
        DistillPipeline(config).run()
    for key in ("train/loss", "student/grad_norm", "val/loss"):
        first, second = (metric_by_step(Path(config.output_dir), key) for config in (one, other))
        assert first == pytest.approx(second, rel=1e-5), key


def test_dynamic_batches_do_not_change_the_losses(configure, tmp_path):
    runs = []
    for name, changes in (
        ("plain", {}),
        ("dynamic", {"student.use_dynamic_batching_in_train": True, "student.max_tokens_per_microbatch_in_train": 96}),
    ):
        config = configure(output_dir=str(tmp_path / name), **changes)
        DistillPipeline(config).run()
        runs.append(metric_by_step(tmp_path / name, "train/loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_max_grad_norm_zero_does_not_clip(configure, tmp_path):
    free, clipped = (
        configure(max_grad_norm=norm, output_dir=str(tmp_path / str(norm)), max_steps=3, eval_steps=0)
        for norm in (0.0, 1e-6)
    )
    for config in (free, clipped):
        DistillPipeline(config).run()
    before = Path(free.student_pretrain)
    moved = lambda folder: max((a - weights(before)[k]).abs().max() for k, a in weights(folder / "student").items())  # noqa: E731
    assert moved(tmp_path / "0.0") > 1e-3
    assert metric_by_step(tmp_path / "0.0", "student/grad_norm")[1] > 0.1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.slow
def test_half_precision_trains_and_is_saved_in_the_configured_dtype(configure, dtype):
    config = configure(
        **{"student.model_args.dtype": dtype, "teacher.model_args.dtype": "bf16"}, max_steps=20, distill_loss_weight=1.0
    )
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    assert {tensor.dtype for tensor in weights(out / "student").values()} == {
        {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    }
    assert AutoModelForCausalLM.from_pretrained(out / "student", dtype="auto").dtype == (
        torch.bfloat16 if dtype == "bf16" else torch.float16
    )
    values = list(metric_by_step(out, "val/kd").values())
    assert values[-1] < values[0]


def test_lora_trains_adapters_only_and_saves_adapter_and_merged_student(configure, assets):
    config = configure(**{"student.model_args.lora_target": "all-linear", "student.model_args.lora_rank": 4})
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    base, merged = weights(assets / "student"), weights(out / "student")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all("_proj." in name for name in changed)
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(assets / "student")
    adapted = PeftModel.from_pretrained(plain, out / "student" / "adapter")
    ids = torch.arange(10).unsqueeze(0)
    expected = AutoModelForCausalLM.from_pretrained(out / "student")(ids).logits
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
    forget_after(out, 5)
    first = metric_by_step(out, "train/loss")
    DistillPipeline(config.model_copy(update={"resume_from_checkpoint": True})).run()
    assert metric_by_step(out, "train/loss") == first


def test_frozen_parameters_do_not_change(configure, assets):
    config = configure(**{"student.model_args.freeze_module_prefix": "model.embed_tokens,model.layers.0"}, max_steps=3)
    DistillPipeline(config).run()
    before, after = weights(assets / "student"), weights(Path(config.output_dir) / "student")
    for name in before:
        frozen = name.startswith(("model.embed_tokens", "model.layers.0"))
        assert torch.equal(before[name], after[name]) == frozen, name


def test_a_student_is_initialised_from_a_configuration(configure, assets, tmp_path):
    changes = {
        "student.model_args.from_scratch": True,
        "student.model_args.model_config_kwargs": {"num_hidden_layers": 1},
    }
    DistillPipeline(configure(**changes, output_dir=str(tmp_path / "a"), max_steps=2)).run()
    DistillPipeline(configure(**changes, output_dir=str(tmp_path / "b"), max_steps=2)).run()
    assert_same_weights(tmp_path / "a" / "student", tmp_path / "b" / "student")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "student").config.num_hidden_layers == 1


def test_a_teacher_initialised_from_a_configuration_uses_the_students_tokenizer(configure, assets, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(assets / "teacher").config.to_dict()
    changes = {
        "teacher_pretrain": None,
        "teacher.model_args.from_scratch": True,
        "teacher.model_args.model_config_kwargs": {
            key: whole[key] for key in ("model_type", "vocab_size", "hidden_size")
        }
        | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32},
    }
    DistillPipeline(configure(**changes, max_steps=2, save_steps=0, eval_steps=0)).run()
    assert len(metric_by_step(tmp_path / "out", "train/train_distill_loss")) == 2


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_a_padded_vocabulary_does_not_change_the_losses(configure, assets, tmp_path, padded):
    source = AutoModelForCausalLM.from_pretrained(assets / padded)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        source.resize_token_embeddings(source.config.vocab_size + 24, mean_resizing=False)
        source.lm_head.weight.data[-24:].fill_(5.0)  # large logits, so that a loss that includes the padding differs
    source.save_pretrained(tmp_path / "padded")
    load_tokenizer(ModelSource(str(assets / padded))).save_pretrained(tmp_path / "padded")
    plain = configure(output_dir=str(tmp_path / "plain"), max_steps=4)
    wide = configure(output_dir=str(tmp_path / "wide"), max_steps=4, **{f"{padded}_pretrain": str(tmp_path / "padded")})
    for config in (plain, wide):
        DistillPipeline(config).run()
    for key in ("train/train_distill_loss", "train/train_student_loss", "val/kd"):
        assert metric_by_step(tmp_path / "plain", key) == pytest.approx(
            metric_by_step(tmp_path / "wide", key), rel=1e-5
        ), key


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
        ("granite", {"logits_scaling": 4.0}),
        ("phi", {}),  # a bias on the head
    ],
)
def test_output_heads_of_other_model_families_are_supported(configure, assets, tmp_path, kind, changes):
    make_model(tmp_path / "odd", kind=kind, seed=2, **changes)
    # transformers replaces the normalizer of the tokenizer for some families.
    shared = str(assets / "teacher")
    config = configure(student_pretrain=str(tmp_path / "odd"), tokenizer=shared, max_steps=1, eval_steps=1)
    start_of = AutoModelForCausalLM.from_pretrained(tmp_path / "odd")
    DistillPipeline(config).run()
    saved = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "student")
    examples, _ = tokenize_files(
        config.validation_sources[0].path, load_tokenizer(ModelSource(shared)), sequence_length=64
    )
    total = count = 0.0
    for index in range(len(examples)):
        tokens, labels = (torch.tensor(part, dtype=torch.long) for part in examples.row(index))
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(
                saved(tokens.unsqueeze(0)).logits[0].float(), labels, ignore_index=-100, reduction="sum"
            ).item()
        count += int((labels != -100).sum())
    assert metric_by_step(Path(config.output_dir), "val/ce")[1] == pytest.approx(total / count, rel=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(start_of.parameters(), saved.parameters(), strict=True))


def test_cross_entropy_needs_no_teacher(configure, settings):
    keys = settings(distill_loss_weight=0.0, max_steps=3)
    keys.pop("teacher_pretrain"), keys.pop("teacher")
    from limbeck.config import load_mapping

    result = DistillPipeline(load_mapping(keys).config).run()
    assert "train/train_distill_loss" not in result.metrics
    assert result.metrics["train/loss"] == result.metrics["train/train_student_loss"]


def test_resuming_from_an_older_checkpoint_needs_another_output_dir(configure):
    DistillPipeline(configure()).run()
    out = Path(configure().output_dir)
    with pytest.raises(LimbeckError, match="also contains checkpoint-10, checkpoint-12"):
        DistillPipeline(configure(resume_from_checkpoint=str(out / "checkpoint-5"))).run()
    elsewhere = configure(resume_from_checkpoint=str(out / "checkpoint-5"), output_dir=str(out / "branch"))
    assert DistillPipeline(elsewhere).run().student == out / "branch" / "checkpoint-12"
    finished = configure(resume_from_checkpoint=str(out / "checkpoint-12"), output_dir=str(out / "done"))
    assert (DistillPipeline(finished).run().student / "model.safetensors").is_file()


def test_tied_embeddings_are_no_additional_target(configure, tmp_path):
    make_model(tmp_path / "tied", tie_word_embeddings=True)
    lora = {"student.model_args.lora_target": "q_proj", "student.model_args.additional_target": "embed_tokens,lm_head"}
    with pytest.raises(LimbeckError, match=r"additional_target names .* ties its"):
        DistillPipeline(configure(**lora, student_pretrain=str(tmp_path / "tied"))).run()
    untied = configure(**lora, **{"student.model_args.dtype": "bf16"}, max_steps=2)
    DistillPipeline(untied).run()
    from safetensors.torch import load_file

    masters = load_file(Path(untied.output_dir) / "checkpoint-2" / "training" / "masters.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


def test_a_resumed_run_uses_the_learning_rates_of_a_longer_schedule(configure):
    first = configure(max_steps=4, save_steps=0, eval_steps=0)
    DistillPipeline(first).run()
    longer = configure(max_steps=8, save_steps=0, eval_steps=0, resume_from_checkpoint=True)
    DistillPipeline(longer).run()
    rates = metric_by_step(Path(longer.output_dir), "student/lr")
    assert [rates[step] for step in range(5, 9)] == pytest.approx([1e-3 * (8 - step) / 8 for step in range(5, 9)])


def test_values_of_system_envs_are_not_written(configure, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "")  # so that it is restored
    monkeypatch.delenv("MY_TOKEN")
    config = configure(max_steps=1, eval_steps=0, system_envs={"MY_TOKEN": "s3cr3t"})
    DistillPipeline(config).run()
    assert os.environ["MY_TOKEN"] == "s3cr3t"
    for path in Path(config.output_dir).rglob("*.json*"):
        assert "s3cr3t" not in path.read_text(), path


def test_eval_steps_zero_disables_validation(configure):
    result = DistillPipeline(configure(max_steps=2, eval_steps=0)).run()
    assert not [name for name in result.metrics if name.startswith("val/")]


def test_stop_requests_are_polled_after_every_step(configure):
    request = StopRequest()
    config = configure(max_steps=3, logging_steps=100, save_steps=0, eval_steps=0)
    DistillPipeline(config).run_in(World(0, 1, torch.device("cpu")), Surroundings(stop=request))
    assert request.polls == 3
