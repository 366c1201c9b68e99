"""``DistillTrainer``: training, saving, resuming, and the value of its loss."""

import pytest
import torch
from tiny import make_model, make_tokenizer, rows
from transformers import AutoModelForCausalLM, TrainingArguments

from limbeck import DistillTrainer, divergence


def dataset():
    tokenizer = make_tokenizer()
    ids = [tokenizer(row["question"] + row["answer"])["input_ids"] + [tokenizer.eos_token_id] for row in rows(32)]
    return [{"input_ids": one, "labels": [-100] * 5 + one[5:]} for one in ids]


def collate(examples):
    width = max(len(one["input_ids"]) for one in examples)
    pad = lambda key, value: torch.tensor([one[key] + [value] * (width - len(one[key])) for one in examples])  # noqa: E731
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}


def trainer(tmp_path, **changes):
    student = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "student"))
    teacher = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "teacher", hidden=48, layers=3, seed=1))
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 3, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "logging_steps": 1, **changes,
    }  # fmt: skip
    return DistillTrainer(
        student, teacher, TrainingArguments(str(tmp_path / "out"), **settings), train_dataset=dataset(),
        eval_dataset=dataset(), data_collator=collate, processing_class=make_tokenizer(), kd_weight=0.7, temperature=2.0,
    )  # fmt: skip


def test_it_trains_saves_the_student_only_and_resumes(tmp_path):
    run = trainer(tmp_path)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-6")
    for name, tensor in run._student.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], tensor, rtol=0, atol=0)

    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    for name, tensor in run._student.state_dict().items():
        torch.testing.assert_close(resumed._student.state_dict()[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_its_loss_equals_the_definition_with_any_accumulation(tmp_path):
    run = trainer(tmp_path)
    batch = collate(dataset()[:8])
    keep = batch["labels"][:, 1:] != -100
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name)(batch["input_ids"]).logits[:, :-1][keep]
        for name in ("student", "teacher")
    )
    ce = torch.nn.functional.cross_entropy(student, batch["labels"][:, 1:][keep])
    expected = 0.3 * ce + 0.7 * divergence("forward_kl")(student, teacher, 2.0).mean()
    torch.testing.assert_close(run.compute_loss(run.model, batch), expected, rtol=1e-4, atol=1e-5)

    whole, split = trainer(tmp_path), trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train(), split.train()
    losses = [[line["loss"] for line in one.state.log_history if "loss" in line] for one in (whole, split)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)


def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(tmp_path):
    losses = [trainer(tmp_path, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (32, 5, 1)]
    torch.testing.assert_close(torch.tensor(losses), torch.full((3,), losses[0]), rtol=1e-4, atol=1e-5)


def test_the_arguments_of_the_trainer_apply_to_the_student(tmp_path):
    run = trainer(
        tmp_path, gradient_checkpointing=True, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3,
        metric_for_best_model="loss",
    )  # fmt: skip
    run.train()
    assert run._student.is_gradient_checkpointing
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    for name, tensor in run._student.state_dict().items():
        torch.testing.assert_close(best.state_dict()[name], tensor, rtol=0, atol=0)
