"""A run that cannot work, or that has diverged, ends with one LimbeckError that says what to change."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import metric_by_step
from tiny import make_model

from limbeck import DistillPipeline, LimbeckError
from limbeck.train.checkpoint import list_checkpoints


def test_a_damaged_checkpoint_is_an_error_that_names_an_intact_one(configure):
    config = configure()
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-5", "checkpoint-10", "checkpoint-12"]
    with (out / "checkpoint-12" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(LimbeckError, match=r"checkpoint-12 is damaged \(model.safetensors.*checkpoint-10"):
        DistillPipeline(configure(resume_from_checkpoint=True, max_steps=14)).run()
    (out / "checkpoint-10" / "training" / "optimizer.safetensors").unlink()
    with pytest.raises(LimbeckError, match=r"checkpoint-10 is damaged.*missing.*checkpoint-5"):
        DistillPipeline(configure(resume_from_checkpoint=str(out / "checkpoint-10"))).run()


def test_different_tokenizers_are_an_error_before_training(configure, tmp_path, assets):
    shutil.copytree(assets / "teacher", tmp_path / "other")
    text = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(LimbeckError, match=r"differ in 2 of"):
        DistillPipeline(configure(teacher_pretrain=str(tmp_path / "other"))).run()
    assert not (tmp_path / "out").exists()


def test_an_edited_manifest_is_an_error_and_an_unreadable_one_is_never_the_best(configure):
    DistillPipeline(configure(max_steps=4, save_steps=2, eval_steps=2)).run()
    out = Path(configure().output_dir)
    manifest = out / "checkpoint-4" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 4', '"step": 3'))
    with pytest.raises(LimbeckError, match=r"manifest.json has been changed.*checkpoint-2"):
        DistillPipeline(configure(max_steps=6, resume_from_checkpoint=True)).run()
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-2" / "manifest.json").rename(out / "saved")
    DistillPipeline(configure(max_steps=1, output_dir=str(out / "other"))).run()
    (out / "checkpoint-2" / "manifest.json").write_text("{")
    from limbeck.train.checkpoint import best_checkpoints

    assert best_checkpoints(out, "min") == []


def test_a_diverged_run_ends_with_an_error_and_saves_nothing(configure):
    config = configure(max_grad_norm=0.0, **{"student.training_args.learning_rate": 1e18})
    with pytest.raises(LimbeckError, match="the run has diverged"):
        DistillPipeline(config).run()
    assert not list_checkpoints(Path(config.output_dir))


def test_packing_is_an_error_for_a_model_that_cannot_separate_documents(configure, assets, tmp_path):
    make_model(tmp_path / "recurrent", kind="mamba", state_size=4)
    changes = {"student.use_sequence_packing": True, "student.training_args.per_device_train_batch_size": 2}
    student = {"student_pretrain": str(tmp_path / "recurrent"), "tokenizer": str(assets / "teacher")}
    with pytest.raises(LimbeckError, match="does not separate packed rows"):
        DistillPipeline(configure(**changes, **student)).run()


def test_rows_longer_than_the_positions_of_the_model_are_an_error(configure, tmp_path):
    make_model(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(LimbeckError, match=r"longest row has \d+ tokens.*supports 8"):
        DistillPipeline(configure(student_pretrain=str(tmp_path / "short"))).run()


def test_resuming_with_edited_data_of_the_same_size_is_an_error(configure, assets, tmp_path):
    copy = tmp_path / "rows.jsonl"
    shutil.copy(assets / "rows.jsonl", copy)
    changes = {"student.data_args.file_name": [str(copy)], "max_steps": 2, "eval_steps": 0}
    DistillPipeline(configure(**changes)).run()
    copy.write_text(copy.read_text().replace("It is", "It was"))
    with pytest.raises(LimbeckError, match="position in the data"):
        DistillPipeline(configure(**{**changes, "max_steps": 4}, resume_from_checkpoint=True)).run()


def test_an_unknown_best_metric_is_an_error_before_anything_is_loaded(configure):
    with pytest.raises(LimbeckError, match=r"best_metric = 'val/accuracy' .*val/kd"):
        DistillPipeline(
            configure(
                **{"checkpoint_config.best_metric": "val/accuracy", "checkpoint_config.best_mode": "max"},
                student_pretrain="/nowhere",
            )
        ).run()


def test_a_device_mapping_of_more_devices_than_processes_is_an_error(configure):
    with pytest.raises(LimbeckError, match=r"names 2 devices, but this is one of 1 processes"):
        DistillPipeline(configure(**{"student.device_mapping": [0, 1]})).run()


def test_an_output_dir_with_checkpoints_is_an_error_for_a_new_run(configure):
    DistillPipeline(configure(max_steps=1)).run()
    with pytest.raises(LimbeckError, match="contains checkpoints of an earlier run"):
        DistillPipeline(configure(max_steps=2)).run()


def test_an_unknown_tracker_is_an_error_before_anything_is_loaded(configure):
    with pytest.raises(LimbeckError, match="track_with = wand is not a known tracker"):
        DistillPipeline(configure(track_with="wand", student_pretrain="/nowhere")).run()


def test_a_missing_model_folder_is_an_error(configure, tmp_path):
    with pytest.raises(LimbeckError, match="there is no folder"):
        DistillPipeline(configure(teacher_pretrain=str(tmp_path / "nowhere"))).run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains with it")
def test_flex_attention_on_a_cpu_runs_a_teacher_and_is_an_error_for_a_student(configure, tmp_path):
    packed = {
        "max_steps": 1,
        "student.use_sequence_packing": True,
        "student.training_args.per_device_train_batch_size": 2,
    }
    found = []
    with torch.compiler.set_stance("force_eager"):  # compiling is slow and does not change the result
        for kind in ("flex_attention", "sdpa"):
            out = tmp_path / kind
            changes = {"teacher.model_args.attn_implementation": kind, "output_dir": str(out)}
            DistillPipeline(configure(**packed, **changes)).run()
            found.append(metric_by_step(out, "train/loss")[1])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    config = configure(**{"student.model_args.attn_implementation": "flex_attention"})
    with pytest.raises(LimbeckError, match="flex_attention has no backward pass on a CPU; use sdpa or auto"):
        DistillPipeline(config).run()
