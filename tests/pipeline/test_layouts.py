"""Models sliced over ranks, and rows divided among them, give what one process gives."""

import pytest
from tiny import make_model

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.errors import LimbeckError

from .conftest import assert_same_weights, forget_after
from .test_ranks import metrics, rows, train

KEYS = ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss", "val/top1_agreement")
TP, CP = "tensor_model_parallel_size", "context_parallel_size"


def layout(role: str, **sizes: int) -> dict:
    return {f"{role}.strategy_args.strategy_config.{key}": value for key, value in sizes.items()}


def both(**sizes: int) -> dict:
    return {**layout("student", **sizes), **layout("teacher", **sizes)}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Students of several kinds. The vocabulary is uneven, padded, or both, and tied to the embeddings or not."""
    folder = tmp_path_factory.mktemp("layouts")
    return {
        "tied": make_model(folder / "tied", vocab_size=333, tie_word_embeddings=True),
        "llama": make_model(folder / "llama", kind="llama", vocab_size=325, num_key_value_heads=1),
        "qwen3": make_model(folder / "qwen3", kind="qwen3", head_dim=8, num_key_value_heads=2),
    }


CASES = {
    "tp2": (2, None, {**rows(8), **both(**{TP: 2})}),
    "tp2-tied-uneven": (2, "tied", {**rows(4, 2), **layout("student", **{TP: 2})}),
    "teacher-tp2-student-dp2": (2, None, {**rows(4), **layout("teacher", **{TP: 2})}),
    "cp2": (2, None, {**rows(8), **both(**{CP: 2})}),
    "dp2-tp2-few-key-heads": (4, "llama", {**rows(4), **both(**{TP: 2})}),
    "cp2-tp2-normed-heads": (4, "qwen3", {**rows(8), **layout("student", **{TP: 2, CP: 2}), **layout("teacher", **{TP: 4})}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layout_gives_the_losses_and_the_student_of_one_process(configure, settings, models, tmp_path, case):
    ranks, student, changes = CASES[case]
    common = {"max_steps": 5, "student.training_args.warmup_steps": 0}
    if student:
        common["student_pretrain"] = str(models[student])
    DistillPipeline(configure(**common, output_dir=str(tmp_path / "one"))).run()
    train(settings(**common, **changes, output_dir=str(tmp_path / "many")), tmp_path, ranks)
    for key in KEYS:
        assert metrics(tmp_path / "many", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-5, abs=1e-5), key
    assert_same_weights(tmp_path / "one" / "student", tmp_path / "many" / "student", tolerance=1e-5)
