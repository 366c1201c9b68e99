"""What a run may resume from, and what it reports about settings that have changed."""

import io

import pytest
from strategies.engines import ALONE

from limbeck import DistillPipeline, LimbeckError
from limbeck.train.loop import Surroundings

SHORT = {"max_steps": 2, "eval_steps": 0}


def test_a_model_is_refused_with_what_to_set_instead(configure, assets):
    config = configure(**SHORT, resume_from_checkpoint=str(assets / "student"))
    with pytest.raises(
        LimbeckError, match=r"student' is a model and no checkpoint: .*set student_pretrain to this folder"
    ):
        DistillPipeline(config).run()


def resume(configure, **changes) -> str:
    console = io.StringIO()
    config = configure(**{**SHORT, "max_steps": 3, **changes}, resume_from_checkpoint=True)
    DistillPipeline(config).run_in(ALONE, Surroundings(console=console))
    return console.getvalue()


def test_changed_settings_are_listed_once(configure):
    DistillPipeline(configure(**SHORT)).run()
    text = resume(configure, kd_objective="reverse_kl", **{"student.training_args.learning_rate": 0.5})
    noted = text[text.index("note: settings that have changed since that checkpoint:") :].splitlines()[1:4]
    assert sorted(line.strip() for line in noted) == [
        'kd_objective: "forward_kl" → "reverse_kl"',
        "max_steps: 2 → 3",
        "student.training_args.learning_rate: 0.001 → 0.5",
    ]
    assert text.count("→") == 3
    assert "→" not in resume(configure, kd_objective="reverse_kl", **{"student.training_args.learning_rate": 0.5})


def test_an_error_of_resuming_names_the_changed_settings(configure):
    DistillPipeline(configure(**SHORT)).run()
    key = "student.training_args.per_device_train_batch_size"
    with pytest.raises(LimbeckError, match=rf"(?s)position in the data.*\n{key}: 8 → 4"):
        resume(configure, **{key: 4})
