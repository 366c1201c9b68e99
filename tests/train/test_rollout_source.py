"""On-policy steps: which samples the student writes, with which weights, and that a run of them resumes exactly."""

import json
import re
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import assert_same_weights, forget_after, metrics, rows, train
from tiny import TEMPLATE
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.config import load_mapping
from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE
from limbeck.registry import GENERATORS
from limbeck.rollout.hf import make_generator
from limbeck.strategies.world import World
from limbeck.train.build.data import make_data
from limbeck.train.rollout_source import RolloutSource
from limbeck.train.samples import answer_starts

PLUGIN = Path(__file__).parents[2] / "examples" / "plugins" / "generator.py"
ALONE = World(0, 1, torch.device("cpu"))
GREEDY = {
    "plugins": [str(PLUGIN)],
    "distill_loss_weight": 1.0,
    "rollout.generator": "greedy",
    "rollout.max_new_tokens": 6,
    "eval_steps": 0,
    "save_steps": 0,
}


@pytest.fixture
def source(configure):
    """``source(**changes)`` → a rollout source, its configuration and its data."""

    def build(**changes):
        config = configure(**{**GREEDY, **changes})
        data = make_data(config, ALONE)
        return RolloutSource(config, ALONE, data), config, data

    return build


def texts(batch):
    """(row, token ids, labels) of each row of a step, without padding."""
    found = []
    for micro_batch in batch.micro_batches:
        for row, ids, labels in zip(micro_batch.row_ids, micro_batch.input_ids, micro_batch.labels, strict=True):
            last = int((labels != IGNORE).nonzero().max()) + 2
            found.append((row, ids[:last].tolist(), labels[: last - 1].tolist()))
    return found


@pytest.mark.parametrize("generator", ["greedy", "hf"])
def test_the_student_continues_the_prompts_of_the_data_with_its_current_weights(source, generator):
    made, config, data = source(**{"rollout.generator": generator, "rollout.temperature": 0.0})
    model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * step)
        made.weights_changed(lambda: iter(model.state_dict().items()), step)
        found = texts(made.next(step))
        assert len(found) == 8
        for row, ids, labels in found:
            length = int(answer_starts(data.examples)[row])
            prompt = data.examples.row(row)[0][:length].tolist()
            expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0].tolist()
            assert ids == expected
            assert labels == [IGNORE] * (length - 1) + expected[length:]
        made.before_update()
    line = made.metrics()
    assert line["rollout/on_policy_share"] == 1
    assert 1 <= line["rollout/mean_length"] <= 6
    assert np.isnan(made.metrics()["rollout/mean_length"])  # counted anew


@pytest.mark.parametrize(("key", "number", "ages"), [
    ("max_staleness", 1, [0, 1, 1, 1, 1]),
    ("max_staleness", 2, [0, 1, 2, 2, 2]),
    ("steps_per_rollout", 2, [0, 1, 0, 1, 0]),
    ("steps_per_rollout", 3, [0, 1, 2, 0, 1]),
])  # fmt: skip
def test_a_step_is_written_with_weights_of_exactly_the_configured_age(source, key, number, ages):
    calls = []

    def make_slow_generator(config, world):
        generator = make_generator(config, world)
        write = generator.generate

        def generate(*args):
            calls.append(args)
            time.sleep(0.1)  # so that weights which must not change while it writes would have changed
            return write(*args)

        generator.generate = generate
        return generator

    GENERATORS.register("slow")(make_slow_generator)
    keys = {"rollout.generator": "slow", "rollout.temperature": 0.0, f"rollout.{key}": number, "max_steps": 5}
    made, config, data = source(**keys)
    student = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    weights, starts = [], answer_starts(data.examples)
    for step in range(5):
        with torch.no_grad():
            for parameter in student.parameters():  # in place, as an optimizer does
                parameter.add_(0.02 * step)
        weights.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
        if step:
            made.before_update()
            assert made.metrics()["rollout/staleness"] == ages[step - 1]
        made.weights_changed(lambda: iter(student.state_dict().items()), step)
        model.load_state_dict(weights[step - ages[step]])
        for row, ids, _ in texts(made.next(step)):
            prompt = torch.tensor([data.examples.row(row)[0][: starts[row]].tolist()])
            assert ids == model.generate(prompt, do_sample=False, max_new_tokens=6)[0].tolist()
    made.close()
    assert len(calls) == 5  # and none beyond the last step


@pytest.mark.slow
def test_the_share_is_drawn_for_each_sample_from_seed_step_and_row(source):
    made, _, data = source(**{"rollout.on_policy_fraction": 0.3, **rows(32)})
    starts, shares = answer_starts(data.examples), []
    for step in range(12):
        for row, ids, _ in texts(made.next(step)):
            answer = data.examples.row(row)[0][starts[row] :].tolist()
            shares.append(ids[starts[row] :] != answer)
    assert 0.2 < np.mean(shares) < 0.4
    again, _, _ = source(**{"rollout.on_policy_fraction": 0.3, **rows(32)})
    other, _, _ = source(**{"rollout.on_policy_fraction": 0.3, "seed": 5, **rows(32)})
    one, two, three = (
        {row: made._origin(3, row, 0) == "student" for row in range(96)} for made in (again, source()[0], other)
    )
    assert one == {row: again._origin(3, row, 0) == "student" for row in range(96)}
    assert all(two.values())
    assert one != three


def test_without_any_samples_of_the_student_a_run_is_that_of_the_dataset(configure, tmp_path):
    common = {"max_steps": 4, "eval_steps": 0, "save_steps": 0}
    plain = DistillPipeline(configure(**common, output_dir=str(tmp_path / "plain"))).run()
    changes = {k: v for k, v in GREEDY.items() if k != "distill_loss_weight"}
    given = DistillPipeline(
        configure(**{**changes, **common, "rollout.on_policy_fraction": 0.0, "output_dir": str(tmp_path / "given")})
    ).run()
    assert_same_weights(plain.student, given.student)


@pytest.mark.parametrize("shared", [
    {"student.device_mapping": [0], "teacher.device_mapping": [0], "is_offload_states": True},
    {"rollout.offload": True},
])  # fmt: skip
def test_a_generator_that_shares_the_device_is_there_only_while_it_writes(source, shared):
    events = []

    def make_recorder(config, world):
        generator = make_generator(config, world)

        def record(name):
            call = getattr(generator, name)
            setattr(generator, name, lambda *args, **kwargs: (events.append(name), call(*args, **kwargs))[1])

        for name in ("reload", "update_weights", "generate", "offload"):
            record(name)
        return generator

    GENERATORS.register("recorder")(make_recorder)
    made, config, _ = source(**{"rollout.generator": "recorder", **shared})
    model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    made.weights_changed(lambda: iter(model.state_dict().items()), 0)
    assert made.next(0).num_supervised
    made.weights_changed(lambda: iter(model.state_dict().items()), 1)
    assert made.next(1).num_supervised
    assert events == ["reload", "update_weights", "generate", "offload"] * 2
    with pytest.raises(LimbeckError, match=r"rollout.max_staleness = 1 writes while the student trains"):
        source(**{**shared, "rollout.max_staleness": 1})


def test_several_samples_of_a_prompt_are_in_one_step(source):
    made, _, _ = source(**{"rollout.num_generations": 4})
    found = [row for row, _, _ in texts(made.next(0))]
    assert sorted(found) == sorted(row for row in set(found) for _ in range(4))
    assert len(found) == 8


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"student.use_sequence_packing": True},
        {"rollout.max_staleness": 1},
        {"rollout.max_staleness": 2},
        {"rollout.steps_per_rollout": 2},
    ],
    ids=["padded", "packed", "one step ahead", "two steps ahead", "two steps together"],
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(configure, tmp_path, layout):
    common = {**GREEDY, **layout, "rollout.on_policy_fraction": 0.5, **rows(4, 2), "max_steps": 6, "save_steps": 3}
    whole = DistillPipeline(configure(**common, output_dir=str(tmp_path / "whole"))).run()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    forget_after(tmp_path / "parts", 3)
    parts = DistillPipeline(configure(**common, resume_from_checkpoint=True, output_dir=str(tmp_path / "parts"))).run()
    assert_same_weights(whole.student, parts.student)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < np.mean([line["rollout/on_policy_share"] for line in lines if "train/loss" in line]) < 1


def test_the_metrics_of_a_step_are_those_of_its_own_samples(configure, tmp_path):
    """Also with a teacher that receives each step while the one before is trained."""
    changes = {"rollout.max_staleness": 2, "rollout.on_policy_fraction": 0.5, "rollout.save_samples": True, **rows(1)}
    DistillPipeline(configure(**{**GREEDY, **changes, "rollout.generator": "hf", "max_steps": 6})).run()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    shares = []
    for line in (line for line in lines if "train/loss" in line):
        file = tmp_path / "out" / "rollouts" / f"train-{line['step']}.jsonl"
        is_written = json.loads(file.read_text())["origin"] == "student"
        assert line["rollout/on_policy_share"] == is_written
        for name in ("mean", "min", "max"):  # absent where nothing was written
            assert line.get(f"rollout/{name}_length") == (line["train/supervised_tokens"] if is_written else None)
        shares.append(is_written)
    assert len(shares) == 6 and len(set(shares)) == 2


def test_answers_that_end_differently_for_data_and_models_are_reported(source, assets, tmp_path):
    def warned(name: str, role: str, **changes) -> list[str]:
        folder = tmp_path / name
        shutil.copytree(assets / role, folder)
        for file, values in changes.items():
            path = folder / f"{file}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", "." if name == "marks" else "<|end|>"))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            source(**{f"{role}_pretrain": str(folder)})
        return [str(one.message) for one in found if "nswer" in str(one.message)]

    pad, ids = {"eos_token": "<pad>"}, {"eos_token_id": 0}
    assert warned("same", "teacher") == []
    assert warned("either", "teacher", tokenizer_config=pad) == []  # its configuration has the other
    (end,) = warned("end", "teacher", tokenizer_config=pad, generation_config=ids, config=ids)
    assert re.search(r"end with <\|end\|>, and the teacher .*end ends an answer with <pad>", end)
    (template,) = warned("marks", "teacher")
    assert "Answer<|end|>'" in template and "Answer.'" in template
    (ours,) = warned("ours", "student", tokenizer_config=pad, generation_config=ids, config=ids)
    assert re.search(r"The answers of the data end with <\|end\|>, and .*ours with <pad>", ours)


@pytest.mark.parametrize(
    ("end", "tokens", "reported"), [("<|end|>", {}, False), ("<pad>", {}, True), ("<pad>", {"<|end|>": "<pad>"}, False)]
)
def test_an_end_that_a_teacher_with_another_tokenizer_does_not_write_is_reported(
    source, assets, tmp_path, end, tokens, reported
):
    shutil.copytree(assets / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", end))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cross = {"cross_tokenizer": "hybrid", "cross_tokenizer_tokens": tokens}
        source(teacher_pretrain=str(tmp_path / "teacher"), **cross)
    sentences = [str(one.message) for one in found if "teach the student not to end" in str(one.message)]
    assert len(sentences) == reported
    assert all("reads as <|end|>, and its own template ends an answer with <pad>" in one for one in sentences)


def test_without_answers_the_template_shows_how_they_end(source, assets, tmp_path):
    path, folder = tmp_path / "prompts.jsonl", tmp_path / "student"
    path.write_text("".join(json.dumps({"question": f"What is {n} plus 1?"}) + "\n" for n in range(16)))
    shutil.copytree(assets / "student", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", "<pad>"))
    changes = {"student.data_args.file_name": [str(path)], "validation.data_args.file_name": None}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made, config, data = source(**changes, student_pretrain=str(folder), teacher_pretrain=str(folder))
    (end,) = {str(one.message) for one in found if "nswers" in str(one.message) and "teacher" not in str(one.message)}
    assert re.search(r"^Answers in the template of the data end with <pad>, and .*student with <\|end\|>", end)
    assert made._end_tokens(config, data.tokenizer) == ({data.tokenizer.pad_token_id}, False)


def test_answers_that_were_cut_do_not_show_how_they_end(source, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(
        "".join(json.dumps({"question": "Why?", "answer": f"{n} " * 99 + str(n)}) + "\n" for n in range(16))
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        source(**{"student.data_args.file_name": [str(path)]})
    assert not [one for one in found if "end with different tokens" in str(one.message)]


@pytest.mark.parametrize("changes", [{}, {"rollout.on_policy_fraction": 0, "rollout.off_policy": "teacher"}])
@pytest.mark.parametrize(
    ("role", "template", "sentence"),
    [
        ("student", "", r"changed has no chat template, .* and the teacher .* has one; set"),
        (
            "teacher",
            "",
            r"The teacher .*changed has no chat template, and the data is written with that of .*student, which",
        ),
        (
            "teacher",
            "{{ raise_exception('No!') }}",
            r"of the teacher .*changed cannot render a question .* \(No!\), so",
        ),
    ],
)
def test_a_chat_template_that_one_model_lacks_or_that_fails_is_reported(
    source, assets, tmp_path, role, template, sentence, changes
):
    folder = tmp_path / "changed"
    shutil.copytree(assets / role, folder)
    path = folder / "chat_template.jinja"
    path.write_text(template) if template else path.unlink()
    with pytest.warns(UserWarning, match=sentence):
        source(**{f"{role}_pretrain": str(folder)}, **changes)


@pytest.mark.parametrize("changes", [{}, {"rollout.max_staleness": 2}])
def test_a_run_whose_answers_degenerate_ends_with_a_checkpoint(configure, tmp_path, changes):
    common = {**GREEDY, **changes, "rollout.max_new_tokens": 2, "max_steps": 4}
    if changes:
        common["rollout.generator"] = "hf"
    limit = {"rollout.stop_if.mean_length_below": 3, "rollout.stop_if.for_steps": 3}
    with pytest.raises(
        LimbeckError, match=r"rollout/mean_length has passed .*mean_length_below = 3 in 3 steps in a row"
    ):
        DistillPipeline(configure(**common, **limit)).run()
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    parts = DistillPipeline(configure(**common, resume_from_checkpoint=True)).run()
    whole = DistillPipeline(configure(**common, output_dir=str(tmp_path / "whole"))).run()
    assert_same_weights(whole.student, parts.student)


@pytest.mark.processes
def test_two_ranks_write_the_samples_of_one(settings, tmp_path):
    losses = []
    mixture = {"rollout.on_policy_fraction": 0.5, "rollout.off_policy": "teacher", "rollout.replay.fraction": 0.5}
    mixture |= {"rollout.objectives.teacher.weight": 0.5, "distill_loss_weight": 0.7}
    for ranks, split in ((1, rows(4, 2)), (2, rows(4, 1))):
        output = tmp_path / f"out{ranks}"
        config = settings(**{**GREEDY, **mixture, **split, "max_steps": 3, "output_dir": str(output)})
        if ranks > 1:
            train(config, tmp_path, ranks)
        else:
            DistillPipeline(load_mapping(config).config).run()
        losses.append(metrics(output, "train/loss"))
        assert all(
            0 < sum(metrics(output, f"rollout/{origin}_share")) < 3 for origin in ("on_policy", "teacher", "replay")
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_answer_ends_at_the_sequence_length(source):
    with pytest.warns(
        UserWarning, match=r"The longest prompt has \d+ tokens, so that sequence_length = 64 leaves its answer"
    ):
        made, config, _ = source(**{"rollout.generator": "hf", "rollout.max_new_tokens": 60, "sequence_length": 64})
    model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    made.weights_changed(lambda: iter(model.state_dict().items()), 0)
    lengths = [len(ids) for _, ids, _ in texts(made.next(0))]
    assert max(lengths) <= 64


def test_a_stop_string_that_a_short_run_has_not_seen_is_reported_at_its_end(source):
    made, config, _ = source(**{"rollout.generator": "hf", "rollout.stop_strings": ["ZZZZ"]})
    model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    made.weights_changed(lambda: iter(model.state_dict().items()), 0)
    made.next(0)
    made.before_update()
    with pytest.warns(UserWarning, match="None of the student's first 8 answers contains the stop string 'ZZZZ'"):
        made.close()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rollout.num_generations": 3}, "rollout.num_generations = 3 does not divide the 8 samples of a step"),
        ({"rollout.stop_if.for_steps": 3}, "rollout.stop_if has no limit; set truncated_share"),
        ({"rollout.stop_if.mean_length_above": 6}, "mean_length_above = 6 is never passed, .* at most 6 tokens"),
        ({"distill_on_prompt": True}, "distill_on_prompt hides where an answer begins"),
        ({"student.data_args.overlong": "split"}, "overlong = split cuts rows from the beginning of their prompts"),
        ({"rollout.stop_strings": ["x", ""]}, r"rollout.stop_strings = \['x', ''\] has an empty text"),
        ({"rollout.stop_token_ids": [1, 10**6]}, "rollout.stop_token_ids has 1000000, which is no token of"),
        ({"rollout.stop_token_ids": [-1]}, "rollout.stop_token_ids has -1, which is no token of"),
        ({"rollout.lambda": 0.5}, "rollout.lambda is a key of GKD; use rollout.on_policy_fraction"),
        ({"rollout.on_policy_fraction": 1.5}, "rollout.on_policy_fraction"),
        ({"rollout.generator": "gready"}, "is not a known generator; did you mean greedy?"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(configure, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        DistillPipeline(configure(**{**GREEDY, **changes})).run()


def test_rows_without_a_prompt_are_refused_where_prompts_are_continued(configure, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Water {n} boils at a hundred degrees."}) + "\n" for n in range(16)))
    texts, given = {"student.data_args.file_name": [str(path)]}, {"rollout.on_policy_fraction": 0.0}
    written = {"validation.data_args.file_name": [str(path)], "validation.rollout": {}, "rollout.environment": "exact"}
    for changes in (texts, {**texts, **given, "rollout.off_policy": "teacher"}, {**given, **written}):
        with pytest.raises(LimbeckError, match=r"text\.jsonl has rows of text, in which no prompt ends"):
            make_data(configure(**{**GREEDY, **changes}), ALONE)
    assert len(
        make_data(configure(**{**GREEDY, **texts, **given, "student.data_args.overlong": "split"}), ALONE).examples
    )


def test_a_long_answer_of_the_data_drops_a_prompt_only_where_it_is_read(configure, tmp_path):
    lines = [{"question": "Why?", "answer": "so " * 99}, {"question": "so " * 99, "answer": "Why?"}]
    lines += [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(16)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"student.data_args.file_name": [str(path)], "validation.data_args.file_name": [str(path)]}
    for share, rows_left in ((1.0, 17), (0.9, 16)):
        changes = {**files, "student.data_args.overlong": "drop", "rollout.on_policy_fraction": share}
        data = make_data(configure(**{**GREEDY, **changes}), ALONE)
        assert len(data.examples) == rows_left
        assert len(data.held_out) == 16  # of which the loss reads the answers


def test_a_source_of_rollouts_needs_its_section(settings):
    with pytest.raises(LimbeckError, match="step_source = rollout needs the section rollout"):
        load_mapping(settings(step_source="rollout"))
    assert (
        load_mapping(
            yaml.safe_load(yaml.safe_dump(settings(rollout={}, distill_loss_weight=1.0)))
        ).config.effective_step_source
        == "rollout"
    )


def test_the_answer_of_a_row_is_its_last_supervised_run():
    rows_of_labels = ([-100, 5, 6, -100], [1, 2, 3], [-100, 4, -100, -100, 7, 8, -100], [-100, -100, 9])
    labels = np.concatenate([np.array(row, dtype=np.int32) for row in rows_of_labels])
    offsets = np.cumsum([0, *map(len, rows_of_labels)])
    assert answer_starts(Examples(labels, labels, offsets)).tolist() == [2, 1, 5, 3]
