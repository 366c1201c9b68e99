"""A teacher that reads a prompt of its own, such as one with the reference answer, before the student's answer."""

import json

import pytest
import torch
from runs import metrics
from tiny import make_model
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.data import BatchStream
from limbeck.data.teacher_prompts import teacher_prompt_of
from limbeck.strategies.world import World
from limbeck.teachers.local import load_local_teacher
from limbeck.teachers.signals import SignalSpec, TeacherRequest
from limbeck.train.build.data import make_data
from limbeck.train.rollout_source import RolloutSource

ALONE = World(0, 1, torch.device("cpu"))
HINT = "{{ question }} The answer is {{ answer }}."
PACKED = {"student.use_sequence_packing": True, "student.training_args.per_device_train_batch_size": 3}
ROLLOUT = {"rollout.max_new_tokens": 6, "rollout.on_policy_fraction": 0.5, "eval_steps": 0, "save_steps": 0}


def answers(batch):
    return batch.labels.flatten()[batch.supervised].tolist()


@pytest.mark.parametrize("changes", [{}, PACKED, ROLLOUT, {**ROLLOUT, **PACKED}])
def test_the_teacher_scores_each_answer_after_its_own_prompt(configure, changes):
    config = configure(**{"teacher.prompt.template": HINT, "sequence_length": 96, **changes})
    data = make_data(config, ALONE)
    if config.rollout is None:
        step = next(BatchStream(data.examples, data.stream_settings))
    else:
        source = RolloutSource(config, ALONE, data)
        student = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
        source.weights_changed(lambda: iter(student.state_dict().items()), 0)
        step = source.next(0)
    teacher = load_local_teacher(config, ALONE)
    for batch in step.micro_batches:
        signal = teacher.compute_signal(batch)
        expected = []
        for row, answer in zip(batch.row_ids, split(batch), strict=True):
            question = data.examples.row(row)[0]
            prompt = teacher_prompt_of(data.examples, row)
            text = data.tokenizer.decode(prompt)
            assert text.startswith("<|user|>What is") and " The answer is It is" in text
            assert text.endswith(".<|end|><|assistant|>") and len(prompt) > len(question) - len(answer)
            ids = torch.tensor([[*prompt.tolist(), *answer]])
            hidden = teacher.model.body(ids).last_hidden_state[0]
            expected.append(hidden[len(prompt) - 1 : -1])
        torch.testing.assert_close(signal.hidden, torch.cat(expected), rtol=1e-4, atol=1e-4)
        for kind in ("top_k", "sampled_token", "logits"):
            spec = SignalSpec(kind, 3, len(teacher.model.head.weight))
            request = TeacherRequest.from_batch(batch, spec)
            labels = None if request.labels is None else torch.tensor(answers(batch))
            sent = spec.encode(signal.hidden, teacher.model.head, labels=labels)
            torch.testing.assert_close(teacher.encode(request), sent)
        for rank in range(2):
            whole, own = batch.shard_for_context_parallel(rank, 2)
            assert answers(whole.teacher_batch) == answers(own)


def split(batch):
    """The answer tokens of each document."""
    labels = batch.labels if batch.documents is None else torch.split(batch.labels[0], batch.documents)
    return [[label for label in row.tolist() if label != -100] for row in labels]


@pytest.mark.parametrize("changes", [{}, {**ROLLOUT, **PACKED}])
def test_a_prompt_that_repeats_the_question_changes_nothing(configure, tmp_path, changes):
    runs = {}
    for name, more in {"plain": {}, "own": {"teacher.prompt.template": "{{ question }}"}}.items():
        config = configure(**{"max_steps": 3, "output_dir": str(tmp_path / name), **changes, **more})
        DistillPipeline(config).run()
        runs[name] = metrics(tmp_path / name, "train/loss") + metrics(tmp_path / name, "val/loss")
    assert runs["own"] == pytest.approx(runs["plain"], abs=1e-6)


def test_a_column_may_hold_a_text_or_messages_and_long_prompts_are_left_out_and_counted(configure, tmp_path):
    file = tmp_path / "rows.jsonl"
    system = [{"role": "system", "content": "You know it"}, {"role": "user", "content": "Say 4"}]
    hints = ["Two, it is", system, "far too long " * 30]
    lines = [{"question": f"What is {i}?", "answer": "It is 4", "hint": hint} for i, hint in enumerate(hints)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"student.data_args.file_name": [str(file)], "teacher.prompt": {"key": "hint"}, "eval_steps": 0}
    data = make_data(configure(**changes, **{"validation.data_args.file_name": [str(file)]}), ALONE)
    texts = [data.tokenizer.decode(teacher_prompt_of(data.examples, row)) for row in range(len(data.examples))]
    assert texts == [
        "<|user|>Two, it is<|end|><|assistant|>",
        "<|system|>You know it<|end|><|user|>Say 4<|end|><|assistant|>",
    ]
    assert "1 dropped: prompt of the teacher longer than 64 tokens" in data.report


@pytest.mark.parametrize(("row", "prompt", "sentence"), [
    ({"question": "a", "answer": "b"}, {"key": "hint"}, r"rows.jsonl:1 has no \"hint\" \(it has question, answer\)"),
    ({"question": "a", "answer": "b"}, {"template": "{{ hint }}"}, r"rows.jsonl:1: .*'hint' is undefined"),
    ({"question": "a", "answer": "b"}, {"template": "{{ hint"}, "teacher.prompt.template is not valid Jinja"),
    ({"question": "a", "answer": "b", "hint": " "}, {"key": "hint"}, '"hint" is empty'),
    ({"messages": [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]}, {"template": "c"},
     "has 2 answers that are trained"),
])  # fmt: skip
def test_a_row_without_a_prompt_of_the_teacher_is_an_error(configure, tmp_path, row, prompt, sentence):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    config = configure(**{"teacher.prompt": prompt, "student.data_args.file_name": [str(file)]})
    with pytest.raises(LimbeckError, match=sentence):
        make_data(config, ALONE)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"teacher.prompt": {}}, "teacher.prompt needs either key, a column, or template"),
    ({"teacher.prompt.key": "hint", "distill_on_prompt": True}, "distill_on_prompt needs the same prompt"),
    ({"teacher.prompt.key": "hint", "teacher_pretrain": None, "distill_loss_weight": 0}, "teacher.prompt needs a teacher"),
])  # fmt: skip
def test_what_needs_the_same_prompt_is_refused(configure, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        configure(**changes)


def test_a_teacher_whose_positions_end_before_its_prompt_and_the_answer_is_refused(configure, tmp_path):
    make_model(tmp_path / "short", hidden=48, layers=3, seed=1, max_position_embeddings=40)
    prompt = {"template": HINT + " again" * 5, "max_length": 200}
    with pytest.raises(LimbeckError, match="40"):
        DistillPipeline(configure(teacher_pretrain=str(tmp_path / "short"), **{"teacher.prompt": prompt})).run()
