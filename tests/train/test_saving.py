"""Checkpoints: what they hold, which of them stay, where the links point, and which of them a run refuses."""

import json
import os
import stat
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from runs import weights
from safetensors.torch import load_file
from strategies.engines import ALONE, whole_state
from tiny import TEMPLATE, make_model
from transformers import AutoTokenizer

from limbeck import LimbeckError
from limbeck.data.templates import NAMED
from limbeck.strategies.shards import whole_box
from limbeck.train.build.run import Run, build_run
from limbeck.train.checkpoint import (
    best_checkpoints,
    find_damage,
    find_resume,
    finish_checkpoint,
    list_checkpoints,
    load_checkpoint,
    point,
    prune,
    refuse_earlier_checkpoints,
    refuse_later_checkpoints,
    start_checkpoint,
)
from limbeck.train.loop import train_step
from limbeck.train.saving import find_checkpoint, shareable
from limbeck.train.tensor_files import write_tensors


def names(folder: Path) -> set[str]:
    return {path.name for path in list_checkpoints(folder)}


def write(folder: Path, step: int, metric: float | None = None, **changes) -> Path:
    """A checkpoint with a student of one file."""
    given = {"masters": {"w": torch.full((2,), float(step))}, "optimizer": {}, "state": {"data": step}, **changes}
    temporary = start_checkpoint(folder, step)
    (temporary / "model.safetensors").write_bytes(b"student")
    (temporary / "model.safetensors").chmod(0o600)
    files = {f"training/{kind}.safetensors": given[kind] for kind in ("masters", "optimizer")}
    written = {name: write_tensors(temporary / name, tensors, {}) for name, tensors in files.items()}
    (temporary / "training" / "state.json").write_text(json.dumps(given["state"]))
    return finish_checkpoint(temporary, step, written, metric)


@pytest.fixture
def build(configure):
    """``build(**changes)`` → a run whose background work has ended; saves are complete when they return."""
    runs: list[Run] = []
    settings = {"eval_steps": 0, "max_steps": 4, "checkpoint_config.async_save": False}

    def make(**changes) -> Run:
        runs.append(build_run(configure(**{**settings, **changes}), ALONE, ExitStack()))
        return runs[-1]

    yield make
    for run in runs:
        run.source.close()
        for tracker in run.trackers:
            tracker.close()


def test_the_links_name_the_newest_and_the_best_and_both_stay(build, tmp_path):
    saver, out = build(max_ckpt_to_keep=2).saver, tmp_path / "out"
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 1.0), (5, 4.0)):
        saver.save(step, {}, {"val/loss": loss, "val/ce": -loss})
        assert (out / "student").resolve() == out / f"checkpoint-{step}"
        assert (out / "best").resolve() == out / f"checkpoint-{1 if step == 1 else 2}"
    assert names(out) == {"checkpoint-2", "checkpoint-5"}


@pytest.mark.parametrize(
    ("chosen", "best"),
    [
        ({"best_mode": "max"}, "checkpoint-3"),
        ({"best_metric": "val/ce"}, "checkpoint-3"),
        ({"best_metric": "val/ce", "best_mode": "max"}, "checkpoint-2"),
        ({"best_metric": None}, None),
    ],
)
def test_the_best_is_chosen_by_the_configured_metric(build, tmp_path, chosen, best):
    run = build(max_ckpt_to_keep=0, **{f"checkpoint_config.{key}": value for key, value in chosen.items()})
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        run.saver.save(step, {}, {"val/loss": loss, "val/ce": -loss})
    run.saver.save(4, {}, {})  # without validation
    link = tmp_path / "out" / "best"
    assert (link.resolve().name if link.is_symlink() else None) == best
    assert len(names(tmp_path / "out")) == 4


def test_a_checkpoint_holds_trained_parameters_by_their_own_names_and_the_position(build, tmp_path):
    run = build(**{"student.model_args.freeze_module_prefix": "model.embed_tokens"})
    train_step(run)
    run.saver.save(1, {"epoch": 3}, {"val/loss": 0.5})
    path = tmp_path / "out" / "checkpoint-1"
    masters = load_file(path / "training" / "masters.safetensors")
    assert masters.keys() == weights(path).keys() - {"model.embed_tokens.weight"}
    for name, tensor in masters.items():
        torch.testing.assert_close(tensor, weights(path)[name], rtol=0, atol=0)
    optimizer = load_file(path / "training" / "optimizer.safetensors")
    assert {key.rpartition("|")[0].removeprefix("model.") for key in optimizer} == masters.keys()
    state = json.loads((path / "training" / "state.json").read_text())
    assert (state["data"], state["scaler"], state["taid"]) == ({"epoch": 3}, {}, None)
    assert state["config"]["max_steps"] == 4
    assert json.loads((path / "manifest.json").read_text())["metric"] == 0.5
    assert find_damage(path) is None


@pytest.mark.parametrize(("template", "saved"), [("chatml", NAMED["chatml"]), (None, TEMPLATE), ("native", TEMPLATE)])
def test_the_tokenizer_is_saved_with_the_template_of_the_run(build, tmp_path, template, saved):
    run = build(**{"student.data_args.template": template})
    run.saver.save(1, {}, {})
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "student").chat_template == saved
    assert run.data.tokenizer.chat_template == TEMPLATE, "the run itself is not changed"


def test_a_tied_head_is_saved_once_also_in_another_precision_than_it_is_trained_in(build, tmp_path):
    folder = make_model(tmp_path / "tied", tie_word_embeddings=True)
    run = build(student_pretrain=str(folder), **{"student.model_args.dtype": "bf16"})
    run.saver.save(1, {}, {})
    saved = weights(tmp_path / "out" / "checkpoint-1")
    assert saved.keys() == weights(folder).keys()
    assert "lm_head.weight" not in saved


def test_a_restored_run_has_weights_moments_position_and_learning_rate(build, tmp_path):
    first = build()
    for _ in range(2):
        train_step(first)
    position = first.requests.state_dict()
    first.saver.save(2, position, {})
    second = build(resume_from_checkpoint=True)
    assert (second.step, second.resumed_from) == (2, tmp_path / "out" / "checkpoint-2")
    assert second.source.state_dict() == position
    assert second.learning_rate == first.learning_rate == pytest.approx(1e-3 / 2)
    assert {group["lr"] for group in second.engine.optimizer.param_groups} == {first.learning_rate}
    for kind in ("model", "optimizer"):
        expected, found = (getattr(whole_state(run.engine), kind) for run in (first, second))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_the_loss_scale_of_fp16_is_restored(build):
    half = {"student.model_args.dtype": "fp16"}
    first = build(**half)
    train_step(first)
    first.engine._scaler.update(1024.0)
    first.saver.save(1, first.requests.state_dict(), {})
    assert build(**half, resume_from_checkpoint=True).engine.state_dict().scaler["scale"] == 1024.0


def test_the_schedule_of_taid_is_restored(build, tmp_path):
    taid = {"kd_objective": "taid"}
    first = build(**taid, max_steps=20)
    for _ in range(5):
        train_step(first)
    first.saver.save(5, first.requests.state_dict(), {})
    second = build(**taid, max_steps=20, resume_from_checkpoint=True)
    assert second.taid.state() == first.taid.state()
    assert second.taid.state() != build(**taid, max_steps=20, output_dir=str(tmp_path / "new")).taid.state()


def test_a_checkpoint_of_another_objective_is_refused(build):
    run = build()
    run.saver.save(1, run.requests.state_dict(), {})
    with pytest.raises(LimbeckError, match=r"checkpoint-1 .* than taid"):
        build(kd_objective="taid", resume_from_checkpoint=True)


def test_a_checkpoint_of_another_student_is_refused(build, tmp_path):
    run = build()
    run.saver.save(1, run.requests.state_dict(), {})
    other = make_model(tmp_path / "other", layers=3)
    same_shapes = {"student.model_args.model_config_kwargs": {"rope_parameters": {"rope_theta": 7.0}}}
    frozen = {"student.model_args.freeze_module_prefix": "model.layers.1"}
    for change, sentence in (
        ({"student_pretrain": str(other)}, r"another student: num_hidden_layers is 2 in its config.json and 3 in"),
        (same_shapes, r"another student: rope_parameters\.rope_theta is \S+ in its config.json and 7.0 in"),
        (frozen, r"other frozen parameters.*layers\.1\..* differs"),
    ):
        with pytest.raises(LimbeckError, match=sentence):
            build(**change, resume_from_checkpoint=True)
    build(resume_from_checkpoint=True, **{"student.model_args.model_config_kwargs": {"initializer_range": 0.5}})


def test_adapters_of_another_rank_or_scale_are_refused_and_another_base_is_named(build, tmp_path):
    lora = {"student.model_args.lora_target": "all-linear", "student.model_args.lora_rank": 4}
    run = build(**lora)
    run.saver.save(1, run.requests.state_dict(), {})
    for change, sentence in (
        (
            {"student.model_args.lora_rank": 8},
            r"checkpoint-1 has LoRA adapters with rank = 4, and .*lora_rank gives 8;",
        ),
        (
            {"student.model_args.lora_alpha": 100},
            r"checkpoint-1 has LoRA adapters with alpha = 8, and .*lora_alpha gives 100;",
        ),
    ):
        with pytest.raises(LimbeckError, match=sentence):
            build(**{**lora, **change}, resume_from_checkpoint=True)
    build(**lora, **{"student.model_args.lora_alpha": 8}, resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match="belong to the weights of"):
        build(**lora, student_pretrain=str(make_model(tmp_path / "other", seed=3)), resume_from_checkpoint=True)


def test_a_run_refuses_checkpoints_of_an_earlier_run_and_later_ones(configure, tmp_path):
    out = tmp_path / "out"
    assert find_checkpoint(configure()) is None
    assert find_checkpoint(configure(resume_from_checkpoint=True)) is None
    for step in (1, 2, 10):
        write(out, step)
    with pytest.raises(LimbeckError, match="checkpoints of an earlier run"):
        find_checkpoint(configure())
    assert find_checkpoint(configure(resume_from_checkpoint=True)) == out / "checkpoint-10"
    with pytest.raises(LimbeckError, match=r"also .* checkpoint-10,"):
        find_checkpoint(configure(resume_from_checkpoint=str(out / "checkpoint-2")))
    elsewhere = configure(resume_from_checkpoint=str(out / "checkpoint-2"), output_dir=str(tmp_path / "new"))
    assert find_checkpoint(elsewhere) == out / "checkpoint-2"


def test_later_checkpoints_are_refused_if_they_are_whole(tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    refuse_later_checkpoints(second, tmp_path)
    with pytest.raises(LimbeckError, match=r"also .* checkpoint-2,"):
        refuse_later_checkpoints(first, tmp_path)
    (second / "manifest.json").unlink()
    refuse_later_checkpoints(first, tmp_path)
    other = write(tmp_path / "other", 5)
    with pytest.raises(LimbeckError, match=r"also .* checkpoint-1,"):
        refuse_later_checkpoints(other, tmp_path)
    refuse_earlier_checkpoints(True, tmp_path)


def test_what_resume_from_checkpoint_names(tmp_path):
    for setting in (False, "false", "", True, "true", "latest"):
        assert find_resume(setting, tmp_path) is None
    for step in (9, 10):
        write(tmp_path, step)
    for setting in (True, "true", "latest"):
        assert find_resume(setting, tmp_path) == tmp_path / "checkpoint-10"
    assert find_resume(False, tmp_path) is None
    assert find_resume(str(tmp_path / "checkpoint-9"), tmp_path) == tmp_path / "checkpoint-9"
    assert find_resume(str(tmp_path), tmp_path / "other") == tmp_path / "checkpoint-10"
    point(tmp_path / "best", tmp_path / "checkpoint-9")
    assert find_resume(str(tmp_path / "best"), tmp_path) == tmp_path / "best"
    with pytest.raises(LimbeckError, match=r"is not a folder; .*checkpoint-9, .*checkpoint-10"):
        find_resume(str(tmp_path / "checkpoint-11"), tmp_path)
    with pytest.raises(LimbeckError, match=r"is not a folder; .*checkpoint-10\."):
        find_resume("/nowhere/checkpoint-1", tmp_path)


@pytest.mark.parametrize(
    ("keep", "mode", "left"),
    [
        (0, "min", {1, 2, 3, 4}),
        (1, "min", {2, 4}),
        (2, "min", {2, 4}),
        (3, "min", {2, 3, 4}),
        (4, "min", {1, 2, 3, 4}),
        (2, "max", {1, 4}),
    ],
)
def test_the_oldest_go_and_the_best_and_the_newest_stay(tmp_path, keep, mode, left):
    for step, metric in ((1, 5.0), (2, 1.0), (3, 2.0), (4, 3.0)):
        write(tmp_path, step, metric)
    prune(tmp_path, keep, best_checkpoints(tmp_path, mode)[:1])
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}


def test_the_earliest_of_equals_is_the_best_and_one_without_a_metric_never(tmp_path):
    assert best_checkpoints(tmp_path, "min") == []
    for step, metric in ((9, 1.0), (10, 1.0), (11, None), (12, 2.0)):
        write(tmp_path, step, metric)
    assert [path.name for path in best_checkpoints(tmp_path, "min")] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-12",
    ]
    assert best_checkpoints(tmp_path, "max")[0] == tmp_path / "checkpoint-12"


def test_several_best_stay_and_those_of_another_metric_are_not_compared(build, tmp_path):
    best = {"checkpoint_config.best_metric": "val/ce", "checkpoint_config.keep_best": 2}
    run, out = build(max_ckpt_to_keep=1, **best), tmp_path / "out"
    for step, value in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 1.5), (5, 4.0)):
        run.saver.save(step, run.requests.state_dict(), {"val/ce": value})
    assert names(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    saver = build(
        max_ckpt_to_keep=1, resume_from_checkpoint=True, **{**best, "checkpoint_config.best_metric": "val/kd"}
    ).saver
    saver.save(6, {}, {"val/kd": 9.0})
    assert (out / "best").resolve() == out / "checkpoint-6"
    assert names(out) == {"checkpoint-6"}


def test_a_checkpoint_is_read_back_as_it_was_written(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    masters = {"a": shared, "b": shared[0], "c": shared.t()}  # memory that they share
    path = write(tmp_path, 7, 0.25, masters=masters, optimizer={"a|step": torch.tensor(7.0)}, state={"data": [1]})
    read = load_checkpoint(path)
    assert (read.step, read.metric, read.state) == (7, 0.25, {"data": [1]})
    assert read.masters.keys() == masters.keys()
    for name, tensor in masters.items():
        torch.testing.assert_close(read.masters[name][whole_box(tensor.shape)], tensor, rtol=0, atol=0)
    assert read.optimizer["a|step"][()].item() == 7.0
    assert list_checkpoints(tmp_path) == [path]


def test_a_checkpoint_replaces_one_of_the_same_step_and_what_a_kill_left(tmp_path):
    (tmp_path / ".checkpoint-1.writing").mkdir()
    (tmp_path / ".checkpoint-1.writing" / "torn").write_text("half")
    assert not (write(tmp_path, 1, 1.0) / "torn").exists()
    assert load_checkpoint(write(tmp_path, 1, 2.0)).metric == 2.0
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-1"}


@pytest.mark.parametrize("at_once", [True, False])
def test_a_failed_write_is_an_error_and_leaves_the_checkpoints_as_they_were(build, tmp_path, monkeypatch, at_once):
    run, out = build(**{"checkpoint_config.async_save": not at_once}), tmp_path / "out"
    run.saver.save(1, {}, {})
    run.saver.wait()

    def fail(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(
        LimbeckError, match=r"checkpoint-2 could not be written .*No space left.*checkpoint-1 is complete"
    ):
        run.saver.save(2, {}, {})
        assert not at_once
        run.saver.save(3, {}, {})
    assert {entry.name for entry in out.glob("*checkpoint*")} == {"checkpoint-1"}
    monkeypatch.undo()
    run.saver.save(4, {}, {})
    run.saver.wait()
    assert names(out) == {"checkpoint-1", "checkpoint-4"}


@pytest.mark.parametrize("failing", [False, True])
def test_a_run_that_ends_waits_for_its_checkpoint_and_loses_no_error(configure, tmp_path, monkeypatch, capsys, failing):
    """Also when the run ends by an error of its own, which is then the one that is raised."""
    resources = ExitStack()
    run = build_run(configure(eval_steps=0), ALONE, resources)
    held = threading.Event()
    monkeypatch.setattr("os.fsync", lambda _: held.wait() and failing and 1 / 0)
    run.saver.save(1, {}, {})
    assert names(tmp_path / "out") == set()  # the loop goes on while it is written
    threading.Timer(0.1, held.set).start()
    with pytest.raises(KeyboardInterrupt), resources:
        raise KeyboardInterrupt
    assert names(tmp_path / "out") == (set() if failing else {"checkpoint-1"})
    assert ("ZeroDivisionError" in capsys.readouterr().err) == failing


def test_training_does_not_change_what_is_being_written(build, tmp_path, monkeypatch):
    run, held = build(**{"checkpoint_config.async_save": True}), threading.Event()
    train_step(run)
    expected = whole_state(run.engine)
    started = run.saver._write
    monkeypatch.setattr(run.saver, "_write", lambda *args: held.wait() and started(*args))
    run.saver.save(1, {}, {})
    train_step(run)
    held.set()
    run.saver.wait()
    training = tmp_path / "out" / "checkpoint-1" / "training"
    for name, tensor in load_file(training / "optimizer.safetensors").items():
        torch.testing.assert_close(tensor, expected.optimizer[name], rtol=0, atol=0)
    for name, tensor in load_file(training / "masters.safetensors").items():
        torch.testing.assert_close(tensor, expected.model[f"model.{name}"], rtol=0, atol=0)
        torch.testing.assert_close(weights(training.parent)[name], tensor, rtol=0, atol=0)


def test_every_file_can_be_read_by_others_and_is_in_the_manifest(tmp_path):
    path = write(tmp_path, 1)
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert json.loads((path / "manifest.json").read_text())["files"].keys() == files - {"manifest.json"}
    for name in files:
        assert stat.S_IMODE((path / name).stat().st_mode) == 0o644, name


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        assert not list_checkpoints(tmp_path)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr("os.fsync", fsync)
    path = write(tmp_path, 1)
    assert sorted(synced) == sorted(file.stat().st_ino for file in path.rglob("*") if file.is_file())


def test_every_kind_of_damage_is_found(tmp_path):
    def damaged(step: int, change) -> str | None:
        path = write(tmp_path, step)
        assert find_damage(path) is None
        change(path)
        return find_damage(path)

    def edit_manifest(path: Path) -> None:
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(text.replace('"metric": null', '"metric": 1.0'))

    model = "model.safetensors"
    assert damaged(1, lambda path: (path / "manifest.json").unlink()) == "manifest.json is missing"
    assert damaged(2, lambda path: (path / model).unlink()) == "model.safetensors is missing"
    assert damaged(3, lambda path: (path / model).write_bytes(b"longer student")) == (
        "model.safetensors has 14 bytes instead of 7"
    )
    assert damaged(4, lambda path: (path / model).write_bytes(b"strange")) == "model.safetensors has been changed"
    assert damaged(5, edit_manifest) == "manifest.json has been changed"
    assert damaged(6, lambda path: (path / "manifest.json").write_text("{")).startswith("manifest.json cannot be read")
    assert damaged(7, lambda path: (path / "manifest.json").write_text("[]")).startswith("manifest.json cannot be read")


def test_a_damaged_checkpoint_is_refused_with_the_newest_whole_one(tmp_path):
    paths = [write(tmp_path, step) for step in (1, 2, 3, 4)]
    for path in paths[2:]:
        (path / "model.safetensors").unlink()
    with pytest.raises(LimbeckError, match=r"checkpoint-4 is damaged \(.*missing\); .*: \S*checkpoint-2\."):
        load_checkpoint(paths[3])
    for path in paths[:2]:
        (path / "model.safetensors").unlink()
    with pytest.raises(LimbeckError, match=r"missing\); (?!.*checkpoint-[12])"):
        load_checkpoint(paths[3])


def test_a_link_is_replaced_and_is_relative(tmp_path):
    for step in (1, 2):
        (tmp_path / ".student.writing").unlink(missing_ok=True)
        (tmp_path / ".student.writing").symlink_to("nowhere")  # left by a kill
        point(tmp_path / "student", write(tmp_path, step))
        assert (tmp_path / "student").readlink() == Path(f"checkpoint-{step}")
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", "student"}


def test_values_that_may_be_secret_are_not_shown(configure):
    secret = {"TOKEN": "s3cr3t"}
    config = configure(
        system_envs=secret, track_with="tensorboard", tracker_kwargs={"log_dir": "s3cr3t"},
        **{"student.system_envs": secret, "teacher.system_envs": secret},
    )  # fmt: skip
    shown = shareable(config)
    assert "s3cr3t" not in json.dumps(shown)
    assert shown["student"]["system_envs"].keys() == shown["system_envs"].keys() == {"TOKEN"}
    assert config.system_envs == secret
