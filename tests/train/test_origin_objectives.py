"""Samples of several origins, each with its own objective and weight, in one loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import metrics, nested
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.config import load_mapping
from limbeck.data.masks import IGNORE
from limbeck.data.stream import StreamSettings, make_step
from limbeck.models import body, enable_varlen_attention, hidden_states, output_head
from limbeck.objectives import Objective
from limbeck.teachers.signals import Signal
from limbeck.train.build.objective import make_objectives, objective_indices
from limbeck.train.samples import Sample, to_examples
from limbeck.train.student import LossSettings, StudentWithLoss, TrainInput

DOCS = Path(__file__).parents[2] / "docs" / "on-policy.md"
WEIGHTS = {"student": 1.0, "dataset": 0.5, "replay": 2.0}
OBJECTIVES = (
    Objective.of("skewed_reverse_kl", kd_weight=1.0, temperature=2.0, parameters={"skew": 0.2}),
    Objective.of("forward_kl", kd_weight=0.25, parameters={}),
)
INDICES = {"student": 0, "dataset": 1, "replay": 0}


def closed_form(origin, student_logits, teacher_logits, labels):
    """The summed loss of the supervised positions of one row."""
    at = labels != IGNORE
    z, t, y = student_logits[at], teacher_logits[at], labels[at]
    if INDICES[origin] == 0:
        p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
        loss = (q * (q / (0.8 * p + 0.2 * q)).log()).sum(-1)
    else:
        p, log_q = t.softmax(-1), z.log_softmax(-1)
        loss = 0.25 * (p * (p.log() - log_q)).sum(-1) - 0.75 * log_q.gather(-1, y[:, None])[:, 0]
    return WEIGHTS[origin] * loss.sum()


def count_weights(samples):
    return sum(WEIGHTS[sample.origin] * sample.num_answer_tokens for sample in samples)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_mixed_step_is_the_sum_of_the_closed_forms_of_its_rows(assets, packing):
    models = [
        AutoModelForCausalLM.from_pretrained(assets / name, dtype=torch.float64) for name in ("student", "teacher")
    ]
    student, teacher = models
    vocab = min(output_head(model).weight.shape[0] for model in models)
    random = np.random.default_rng(0)
    origins = ["student", "dataset", "dataset", "replay", "student", "dataset", "dataset", "replay"]
    samples = []
    for row, origin in enumerate(origins):
        prompt, answer = (random.integers(3, vocab, size).tolist() for size in (3 + row, 2 + row % 4))
        samples.append(Sample.written(row, 0, origin, prompt, answer, None, True))
    expected = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids, labels = torch.tensor(sample.tokens[None].astype(np.int64)), torch.tensor(sample.labels.astype(np.int64))
        of_student, of_teacher = (model(ids).logits[0, :, :vocab] for model in models)
        expected = expected + closed_form(sample.origin, of_student, of_teacher.detach(), labels) / count_weights(
            samples
        )
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()

    settings = StreamSettings(64, 2, pad_id=0, accumulation_steps=4, packing=packing)
    step = make_step(to_examples(samples, INDICES, WEIGHTS), settings)
    assert step.normalizer == pytest.approx(count_weights(samples))
    assert any(sum(len(at) > 0 for at in batch.objectives) == 2 for batch in step.micro_batches)
    if packing:
        for model in models:
            enable_varlen_attention(model, "tiny")
    root = StudentWithLoss(student, LossSettings(Objective.of("tvd"), vocab, objectives=OBJECTIVES))
    total = 0.0
    for batch in step.micro_batches:
        with torch.no_grad():
            found = hidden_states(
                body(teacher), batch.input_ids, batch.position_ids, batch.documents, cu_seqlens=batch.cu_seqlens
            )
        signal = Signal(found.flatten(0, 1)[batch.supervised], output_head(teacher))
        loss = root(TrainInput(batch, signal, step.normalizer))
        loss.loss.backward()
        total += loss.loss.item()
        assert loss.distillation.kd > 0
    assert total == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-14)


def test_a_shard_of_the_context_keeps_the_objective_of_each_position(assets):
    samples = [
        Sample.written(row, 0, origin, [5, 6, 7], [8, 9, 10, 11], None, True) for row, origin in enumerate(INDICES)
    ]
    step = make_step(to_examples(samples, INDICES), StreamSettings(64, 3, pad_id=0, packing=True))
    (batch,) = step.micro_batches
    whole = [set(batch.supervised[at].tolist()) for at in batch.objectives]
    shards = [batch.shard_for_context_parallel(rank, 2)[0] for rank in range(2)]
    for index, positions in enumerate(whole):
        assert positions == {p for one in shards for p in one.supervised[one.objectives[index]].tolist()}


def keys(text):
    """The YAML block of the documentation that contains ``text``."""
    (block,) = [one for one in DOCS.read_text().split("```yaml\n")[1:] if text in one.split("```")[0]]
    return block.split("```")[0]


def test_distillm_2_is_six_lines_and_trains(settings):
    block = keys("skewed_reverse_kl")
    assert len(block.strip().splitlines()) == 6
    given = yaml.safe_load(block)
    given["rollout"] |= {"max_new_tokens": 6, "temperature": 1.0}
    base = settings(max_steps=2, eval_steps=0, save_steps=0)
    config = load_mapping({**base, **given}).config
    assert objective_indices(config) == {"student": 0, "teacher": 1}
    student, teacher = make_objectives(config, torch.device("cpu"))
    assert "reverse" in repr(student.divergence_fn) and "forward" in repr(teacher.divergence_fn)
    DistillPipeline(config).run()
    output = Path(config.output_dir)
    assert np.isfinite(metrics(output, "train/loss")).all()
    assert sum(metrics(output, "rollout/teacher_share")) + sum(
        metrics(output, "rollout/on_policy_share")
    ) == pytest.approx(2)
    assert 0 < sum(metrics(output, "rollout/teacher_share")) < 2


def test_cross_entropy_applies_to_answers_of_others_only(configure):
    config = configure(
        **{"distill_loss_weight": 0.25, "rollout.on_policy_fraction": 0.5, "rollout.replay.fraction": 0.5}
    )
    indices, objectives = objective_indices(config), make_objectives(config, torch.device("cpu"))
    weights = {origin: objectives[index].kd_weight for origin, index in indices.items()}
    assert weights == {"student": 1.0, "dataset": 0.25, "replay": 1.0}
    assert indices["student"] == indices["replay"]
    assert objective_indices(configure(**{"distill_loss_weight": 1.0, "rollout.on_policy_fraction": 0.5})) == {}


def test_replayed_samples_have_the_objective_of_the_student_unless_it_is_set(configure):
    changes = {
        "kd_objective": "alpha_beta",
        "kd_objective_kwargs": {"alpha": 0.3},
        "rollout.on_policy_fraction": 0.5,
        "rollout.replay.fraction": 0.5,
        "rollout.objectives.student.kd_objective": "js_divergence",
        "rollout.objectives.student.js_beta": 0.2,
    }
    assert objective_indices(configure(**changes)) == {"student": 0, "dataset": 1, "replay": 0}
    other = configure(**changes, **{"rollout.objectives.replay.js_beta": 0.3})
    assert objective_indices(other) == {"student": 0, "dataset": 1, "replay": 2}
    assert make_objectives(other, torch.device("cpu"))[0] != make_objectives(other, torch.device("cpu"))[2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rollout.objectives.student.distill_loss_weight": 0.5},
            "student.distill_loss_weight = 0.5 adds cross-entropy",
        ),
        ({"kd_objective": "taid"}, "distill_loss_weight and the origins .* kd_objective: taid supports only one"),
        ({"loss_balance": "modelopt"}, "loss_balance: modelopt supports only one"),
        ({"objective_faults": ["every_token"]}, "objective_faults supports only one"),
        (
            {"rollout.objectives.student.kd_objective_kwargs": {"alpha": 1.0}},
            "student.kd_objective_kwargs.alpha is not read by kd_objective = forward_kl",
        ),
        ({"rollout.objectives.student.kd_objective": "reversed_kl"}, "did you mean reverse_kl"),
        ({"rollout.objectives.writer.weight": 1.0}, "rollout.objectives.writer"),
        ({"teacher_pretrain": None, "distill_loss_weight": 0.0}, "rollout needs a teacher for what the student writes"),
    ],
)
def test_what_needs_one_objective_or_other_keys_is_refused(configure, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        configure(**{"rollout.on_policy_fraction": 0.5, **changes})


def test_keys_of_origins_without_samples_have_a_notice(settings):
    given = nested({"rollout.objectives.teacher.weight": 2.0, "rollout.objectives.student.js_beta": 0.1})
    loaded = load_mapping({**settings(distill_loss_weight=1.0), **given})
    notices = "\n".join(loaded.notices)
    assert "rollout.objectives.teacher.weight has no effect: it is for samples of the origin teacher" in notices
    assert "rollout.objectives.student.js_beta has no effect: it is only read by js_divergence" in notices
