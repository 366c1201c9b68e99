"""Runs with intermediate features: the value of the loss, splits into micro-batches and ranks, and projections."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_same_weights, forget_after, metrics, rows, train, training_state, weights
from safetensors.torch import load_file
from tiny import make_model
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.data import BatchStream, StreamSettings, tokenize_files
from limbeck.models import ModelSource, load_tokenizer

PAIRS = [
    ["model.layers.0.mlp", "model.layers.1.mlp", "mse"],
    ["model.layers.1", "model.layers.2", "smooth_l1"],
    ["model.norm", "model.norm"],
]
TOTAL = "train/features/total"


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """A teacher of the same width as the student."""
    return str(make_model(tmp_path_factory.mktemp("wide") / "teacher", layers=4, seed=3))


def first_batch(config, assets, packing=False):
    examples, _ = tokenize_files(
        list(config.student.data_args.file_name),
        load_tokenizer(ModelSource(str(assets / "student"))),
        sequence_length=64,
    )
    stream = BatchStream(
        examples,
        StreamSettings(seed=42, sequence_length=64, per_device_batch_size=8, pad_id=0, packing=packing),
    )
    return next(stream).micro_batches[0]


def states(folder, batch):
    """[batch, time, width] after each layer, and after the final norm."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(
            batch.input_ids, position_ids=batch.position_ids, output_hidden_states=True, use_cache=False
        ).hidden_states


@pytest.mark.parametrize("mask", ["tokens", "supervised"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_first_loss_equals_that_of_the_unwrapped_models(configure, assets, wide, mask, packing):
    config = configure(
        teacher_pretrain=wide, max_steps=1, eval_steps=0,
        **{"features.pairs": [["model.layers.0", "model.layers.1", "mse"], ["model.norm", "model.norm"]],
           "features.weight": 0.25, "features.mask": mask, "student.use_sequence_packing": packing,
           "student.data_args.file_name": [str(assets / "rows.jsonl")]},
    )  # fmt: skip
    result = DistillPipeline(config).run()
    batch = first_batch(config, assets, packing)
    ours, theirs = states(assets / "student", batch), states(wide, batch)
    if mask == "supervised":
        keep = batch.labels != -100
    else:
        keep = torch.ones_like(batch.labels, dtype=torch.bool)
        if batch.real is not None:
            keep = torch.zeros(keep.numel(), dtype=torch.bool).index_fill_(0, batch.real, True).view_as(keep)
        assert keep.sum() == batch.num_tokens
        assert packing or batch.num_tokens < keep.numel()
    mse = ((ours[1] - theirs[2])[keep] ** 2).mean()
    cosine = 1 - torch.cosine_similarity(ours[-1][keep], theirs[-1][keep], dim=-1).mean()
    found = result.metrics
    assert found["train/features/model.layers.0"] == pytest.approx(mse.item(), rel=1e-4)
    assert found["train/features/model.norm"] == pytest.approx(cosine.item(), rel=1e-4)
    assert found[TOTAL] == pytest.approx((mse + cosine).item() / 2, rel=1e-4)
    logits = 0.5 * found["train/train_student_loss"] + 0.5 * found["train/train_distill_loss"]
    assert found["train/loss"] == pytest.approx(logits + 0.25 * found[TOTAL], rel=1e-5)


def test_training_reduces_the_feature_loss(configure):
    config = configure(max_steps=40, eval_steps=0, save_steps=0, distill_loss_weight=0.0, **{"features.pairs": PAIRS})
    DistillPipeline(config).run()
    totals = metrics(Path(config.output_dir), TOTAL)
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize("mask", ["tokens", "supervised"])
def test_validation_loss_equals_training_loss_on_the_same_rows(configure, mask):
    """All rows in one step with learning rate 0, and the same rows as validation data in batches of other shapes."""
    still = {"max_steps": 1, "eval_steps": 1, "student.training_args.learning_rate": 0, **rows(96)}
    found = DistillPipeline(configure(**still, **{"features.pairs": PAIRS, "features.mask": mask})).run().metrics
    assert found["val/loss"] == pytest.approx(found["train/loss"], rel=1e-5)
    assert found["val/loss"] == pytest.approx(0.5 * found["val/ce"] + 0.5 * found["val/kd"] + found[TOTAL], rel=1e-5)


@pytest.mark.parametrize("mask", ["tokens", "supervised"])
@pytest.mark.slow
def test_micro_batches_give_the_losses_of_one_batch(configure, tmp_path, mask):
    changes = {"features.pairs": PAIRS, "features.mask": mask, "eval_steps": 6}
    DistillPipeline(configure(output_dir=str(tmp_path / "one"), **changes)).run()
    DistillPipeline(configure(output_dir=str(tmp_path / "many"), **changes, **rows(2, 4))).run()
    for key in ("train/loss", TOTAL, "train/features/model.norm", "student/grad_norm", "val/loss"):
        assert metrics(tmp_path / "many", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-5), key


@pytest.mark.processes
@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({**rows(4), "features.projection": "per_pair"}, 2),
        ({**rows(2, 2), "features.projection": "shared", "student.model_args.disable_gradient_checkpointing": False,
          "features.mask": "supervised"}, 2),
    ],
    ids=["fsdp2", "accumulated-recomputed-and-shared"],
)  # fmt: skip
def test_several_ranks_give_the_losses_of_one(configure, settings, tmp_path, changes, ranks):
    common = {"features.pairs": PAIRS, **{key: value for key, value in changes.items() if key.startswith("features")}}
    DistillPipeline(configure(output_dir=str(tmp_path / "one"), **common)).run()
    train(settings(output_dir=str(tmp_path / "many"), **{**changes, **common}), tmp_path, ranks)
    for key in ("train/loss", TOTAL, "train/features/model.layers.0.mlp", "student/grad_norm", "val/loss"):
        assert metrics(tmp_path / "many", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-5), key
    projections = [training_state(tmp_path / name / "checkpoint-12", "masters") for name in ("one", "many")]
    name = "features.losses.projections.0.weight"
    torch.testing.assert_close(projections[1][name], projections[0][name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.slow
def test_resume_is_bit_exact_and_projections_stay_out_of_the_student(configure, tmp_path, recompute):
    changes = {"features.pairs": PAIRS, "student.model_args.disable_gradient_checkpointing": not recompute}
    config = configure(**changes)
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    shutil.copytree(out, tmp_path / "full", symlinks=True)
    forget_after(out, 5)
    DistillPipeline(configure(**changes, resume_from_checkpoint=True)).run()
    assert_same_weights(tmp_path / "full" / "checkpoint-12", out / "checkpoint-12")
    masters = [training_state(folder / "checkpoint-12", "masters") for folder in (tmp_path / "full", out)]
    mine = [name for name in masters[0] if name.startswith("features.")]
    assert len(mine) == 6  # three pairs of different widths, a weight and a bias each
    assert all(masters[0][name].equal(masters[1][name]) for name in masters[0])
    first = training_state(out / "checkpoint-5", "masters")
    assert not any(first[name].equal(masters[0][name]) for name in mine)  # they are trained
    assert not any(name.startswith("features.") for name in weights(out / "checkpoint-12"))
    AutoModelForCausalLM.from_pretrained(out / "student")


def test_resuming_with_other_features_is_an_error(configure):
    config = configure(**{"features.pairs": PAIRS})
    DistillPipeline(config).run()
    forget_after(Path(config.output_dir), 5)
    with pytest.raises(LimbeckError, match="other features"):
        DistillPipeline(configure(resume_from_checkpoint=True)).run()


def test_lora_trains_projections_and_adapters(configure):
    pytest.importorskip("peft")
    config = configure(
        max_steps=2, eval_steps=0, **{"features.pairs": PAIRS, "student.model_args.lora_target": "all-linear"}
    )
    result = DistillPipeline(config).run()
    masters = training_state(result.student, "masters")
    assert {"features.losses.projections.2.bias"} <= masters.keys()
    assert all(name.startswith("features.") or "lora_" in name for name in masters)
    assert not any("features" in name for name in load_file(result.student / "adapter" / "adapter_model.safetensors"))


def test_half_precision_trains(configure, tmp_path):
    changes = {"features.pairs": PAIRS, "max_steps": 1}
    exact = DistillPipeline(configure(**changes)).run().metrics
    bf16 = {"student.model_args.dtype": "bf16", "teacher.model_args.dtype": "bf16"}
    half = DistillPipeline(configure(output_dir=str(tmp_path / "half"), **changes, **bf16)).run().metrics
    assert half[TOTAL] == pytest.approx(exact[TOTAL], rel=2e-2)
    assert half["student/grad_norm"] == pytest.approx(exact["student/grad_norm"], rel=5e-2)


MODELOPT = {
    "logit_layers": ["output_layer", "output_layer"],
    "intermediate_layer_pairs": [["decoder.final_layernorm", "decoder.layers.2.input_layernorm", "mse"]],
}


@pytest.mark.parametrize("skip", [True, False])
def test_a_modelopt_file_trains_with_its_loss_balance(configure, tmp_path, skip):
    keys = {**MODELOPT, "skip_lm_loss": skip, "kd_loss_scale": 10.0, "logit_kl_temperature": 2.0}
    file = tmp_path / "kd.json"
    file.write_text(json.dumps(keys))
    found = DistillPipeline(configure(max_steps=1, distillation_config=str(file))).run().metrics
    kd, ce, total = (found[f"train/{name}"] for name in ("train_distill_loss", "train_student_loss", "loss"))
    assert total == pytest.approx(2 * kd if skip else 11 * ce, rel=1e-5)
    assert found["train/features/model.norm"] == found[TOTAL] > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"features.pairs": [["model.layer.0", "model.norm"]]},
            r"student has no submodule model\.layer\.0; nearest are",
        ),
        ({"features.pairs": [["model.norm", "lm_head"]]}, "teacher has no submodule lm_head"),
        ({"features.pairs": [["model.layers.*", "model.layers.*"]]}, "2 layers of the student and 3 of the teacher"),
        (
            {"features.logit_layers": ["model.norm", "lm_head"]},
            r"output head lm_head, and model\.norm is a layer inside",
        ),
        ({"features.logit_layers": ["lm_head", "model.norm"]}, "the teacher's next-token distribution"),
        ({"features.pairs": [["model.rotary_emb", "model.norm"]]}, "student submodule model.rotary_emb gives"),
        (
            {
                "features.pairs": [["model.layers.0", "model.norm"]],
                "student.model_args.freeze_module_prefix": "model.embed,model.layers.0",
            },
            r"student's model\.layers\.0 are frozen",
        ),
    ],
)
def test_pairs_that_do_not_fit_the_models_are_an_error(configure, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        DistillPipeline(configure(**changes)).run()
