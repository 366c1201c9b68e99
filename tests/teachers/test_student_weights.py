"""The student's own weights as the teacher: those of the start, and their moving average."""

import pytest
import torch
from runs import assert_same_weights, forget_after, metrics
from tiny import make_model
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.models import body
from limbeck.strategies.world import World
from limbeck.teachers.protocol import TeacherContext
from limbeck.teachers.student_weights import load_averaged

INITIAL = {"teacher_pretrain": None, "teacher.source": "student_initial"}
AVERAGE = {"teacher_pretrain": None, "teacher.source": "student_average", "teacher.source_kwargs": {"decay": 0.6}}
LORA = {"student.model_args.lora_target": "all-linear"}
ON_POLICY = {"rollout.max_new_tokens": 6, "distill_loss_weight": 1.0}


@pytest.mark.parametrize("changes", [{}, LORA])
def test_the_initial_student_teaches_what_its_checkpoint_would(configure, assets, tmp_path, changes):
    checkpoint = {"teacher_pretrain": str(assets / "student")}
    for name, teacher in {"own": INITIAL, "same": checkpoint}.items():
        DistillPipeline(configure(**teacher, **changes, max_steps=4, output_dir=str(tmp_path / name))).run()
    assert metrics(tmp_path / "own", "train/train_distill_loss")[0] == pytest.approx(0, abs=1e-6)
    for key in ("train/loss", "val/kd"):
        assert metrics(tmp_path / "own", key) == metrics(tmp_path / "same", key)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_average_is_that_of_the_weights_after_each_step(configure, tmp_path, tied, dtype):
    folder = str(make_model(tmp_path / "student", tie_word_embeddings=tied))
    config = configure(**AVERAGE, student_pretrain=folder, **{"student.model_args.dtype": dtype})
    teacher = load_averaged(TeacherContext(config, World(0, 1, torch.device("cpu")), 64, 100))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    teacher.load(model.state_dict().items())
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        teacher.update(model.state_dict().items())
        expected = {name: 0.6 * old + 0.4 * model.state_dict()[name] for name, old in expected.items()}
    held = dict(teacher.model.body.named_parameters())
    for name, _ in body(model).named_parameters():
        right = expected[f"model.{name}"]
        torch.testing.assert_close(held[name].float(), right, rtol=1e-2 if dtype == "bf16" else 1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.model.head.weight.float(), expected["lm_head.weight"], rtol=1e-2, atol=1e-5)
    for name, average in teacher.averages.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-5)
    assert ("lm_head.weight" in teacher.averages) is not tied


@pytest.mark.parametrize("changes", [{}, ON_POLICY | LORA])
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(configure, tmp_path, changes):
    changes = AVERAGE | changes | {"max_steps": 6, "save_steps": 3, "eval_steps": 0}
    for name in ("whole", "parts"):
        DistillPipeline(configure(**changes, output_dir=str(tmp_path / name))).run()
    forget_after(tmp_path / "parts", 3)
    resumed = configure(**changes, output_dir=str(tmp_path / "parts"), resume_from_checkpoint=True)
    DistillPipeline(resumed).run()
    assert_same_weights(tmp_path / "whole" / "student", tmp_path / "parts" / "student")
    assert metrics(tmp_path / "whole", "train/train_distill_loss")[-1] > 0


def test_a_checkpoint_of_another_teacher_has_no_average(configure):
    DistillPipeline(configure(**INITIAL, max_steps=1)).run()
    with pytest.raises(LimbeckError, match="has no average of the student's weights"):
        DistillPipeline(configure(**AVERAGE, max_steps=2, resume_from_checkpoint=True)).run()


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"teacher.source": "student_initial"}, "teacher_pretrain is another model than that of teacher.source"),
    (AVERAGE | {"teacher.source_kwargs": {"decay": 1}}, "decay = 1 must be a number from 0 to below 1"),
    (AVERAGE | {"teacher.source_kwargs": {"decays": 1}}, "decays is not read by teacher.source = student_average"),
    (AVERAGE | {"teacher.strategy_args.strategy_config.tensor_model_parallel_size": 2}, "cannot be averaged in place"),
])  # fmt: skip
def test_what_cannot_be_averaged_is_refused(configure, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        configure(**changes)
