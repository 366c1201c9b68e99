from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.config import LoadedConfig, load_config, load_mapping
from limbeck.errors import LimbeckError

Load = Callable[..., LoadedConfig]
Mistakes = Callable[..., list[str]]
PROPERTY = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 25}


def test_overrides_set_keys_that_the_file_does_not_mention(load: Load) -> None:
    loaded = load("seed=7", "+max_steps=3", "++student.training_args.learning_rate=1e-5", "teacher_pretrain=other")
    assert loaded.config.seed == 7
    assert loaded.config.max_steps == 3
    assert loaded.config.student.training_args.learning_rate == 1e-5
    assert loaded.config.teacher.model_args.model_name_or_path == "other"
    assert loaded.origins["seed"] == "command line"


def test_a_tilde_removes_a_key(load: Load) -> None:
    loaded = load("~teacher_pretrain", "distill_loss_weight=0")
    assert not loaded.config.has_teacher
    assert loaded.origins["teacher_pretrain"] == "default"


def test_a_tilde_as_a_value_is_null(load: Load) -> None:
    assert load("checkpoint_config.best_metric=~").config.checkpoint_config.best_metric is None


@pytest.mark.parametrize("devices", ["list(range(0,4))", "range(4)", "0,1,2,3", "[0,1,2,3]", "'[0, 1, 2, 3]'"])
def test_a_device_mapping_has_the_same_forms_on_the_command_line(load: Load, devices: str) -> None:
    assert load(f"student.device_mapping={devices}").config.device_mapping == [0, 1, 2, 3]


@pytest.mark.slow
@settings(**PROPERTY)  # type: ignore[arg-type]
@given(st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(str.strip).filter(len))
def test_text_on_the_command_line_is_unchanged(load: Load, text: str) -> None:
    from hypothesis import assume

    assume(not any(mark in text for mark in ("${", "~", "'", '"')) and "\\" not in text)
    name = load(f"exp_name=x{text}").config.exp_name
    assert name == f"x{text}"


@pytest.mark.parametrize("text", ["it's", 'say "x"', "a\\'b", "a=b", "数据.json", "(x", "a\\"])
def test_quotes_and_backslashes_on_the_command_line_are_text(load: Load, text: str) -> None:
    assert load(f"exp_name={text} !").config.exp_name == f"{text} !"


def test_numbers_may_be_written_in_scientific_notation(load: Load) -> None:
    yaml = """
    student_pretrain: s
    teacher_pretrain: t
    student:
      training_args: {learning_rate: 1e-5, weight_decay: 1E-2, adam_epsilon: 1.0e-6}
      data_args: {file_name: d}
    """
    training = load(yaml=yaml).config.student.training_args
    assert (training.learning_rate, training.weight_decay, training.adam_epsilon) == (1e-5, 1e-2, 1e-6)


def test_errors_are_in_the_order_of_their_lines(mistakes: Mistakes) -> None:
    yaml = """
    teacher_pretrain: t
    teacher: {source: modle}
    student: {packing_algorithm: random, data_args: {file_name: d}}
    track_with: trackio
    student_pretrain: s
    """
    assert [line.split(": ")[0] for line in mistakes("seed=x", yaml=yaml)] == [
        *("command line", "run.yaml:2", "run.yaml:3", "run.yaml:4"),
    ]


def test_an_unknown_key_is_shown_by_line_with_the_nearest_known_one(mistakes: Mistakes) -> None:
    yaml = """
    student_pretrain: s
    exp_nme: x
    learning_rate: 1e-5
    student:
      training_args:
        learning_rat: 1e-5
      foo:
        bar: 1
    wholly_unknown_thing: 1
    """
    assert set(mistakes("sead=3", yaml=yaml)) >= {
        "run.yaml:2: exp_nme is not a key; did you mean exp_name?",
        "run.yaml:3: learning_rate is a key of student.training_args, not of the top level.",
        "run.yaml:6: student.training_args.learning_rat is not a key; did you mean learning_rate?",
        "run.yaml:8: student.foo.bar is not a key; `limbeck config --schema` lists them all.",
        "run.yaml:9: wholly_unknown_thing is not a key; `limbeck config --schema` lists them all.",
        "command line: sead is not a key; did you mean seed?",
    }


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed=many", "seed = many is not a whole number."),
        ("seed=1.5", "seed = 1.5 is not a whole number."),
        ("seed=true", "seed = true is true or false, which this key does not accept."),
        ("seed=null", "seed = null is not a whole number."),
        ("kd_temperature=hot", "kd_temperature = hot is not a number."),
        ("kd_temperature=0", "kd_temperature = 0 must be greater than 0."),
        ("kd_temperature=nan", "kd_temperature = nan must be a finite number."),
        ("distill_loss_weight=1.5", "distill_loss_weight = 1.5 must be at most 1."),
        ("distill_on_prompt=maybe", "distill_on_prompt = maybe is not true or false."),
        ("exp_name=", "exp_name must not be empty."),
        ("exp_name=[a]", "exp_name = ['a'] is not text."),
        ("resume_from_checkpoint=[1]", "resume_from_checkpoint = [1] is not true or false or text."),
        ("student.model_args.dtype=int8", "student.model_args.dtype = int8 is not one of fp32, bf16, fp16."),
        (
            "student.training_args.lr_scheduler_type=cosin",
            "student.training_args.lr_scheduler_type = cosin is not one of linear, cosine, cosine_with_restarts, "
            "polynomial, constant, constant_with_warmup, inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr, "
            "warmup_stable_decay, sequential, megatron; did you mean cosine?",
        ),
        (
            "student.data_args.file_name={a: b}",
            "student.data_args.file_name = {'a': 'b'} is not a list of texts.",
        ),
        ("rollout.stop_token_ids=5", "rollout.stop_token_ids = 5 is not a list of whole numbers."),
        ("teacher=3", "teacher = 3 is not a section; write its keys below it as `key: value` lines."),
        ("system_envs={A: true}", "system_envs.A = true is not text; put it in quotes."),
        ("student.device_mapping=8", "student.device_mapping = 8 is one number, which could mean the device 8 or 8"),
    ],
)
def test_an_invalid_value_is_reported_with_the_allowed_values(mistakes: Mistakes, override: str, sentence: str) -> None:
    (line,) = mistakes(override)
    assert line.startswith(f"command line: {sentence}")


@pytest.mark.parametrize(
    ("override", "end"),
    [
        (
            "rollout.objectives.studnt.kd_temperature=2",
            "is below rollout.objectives.studnt, which is not a section; did you mean student?",
        ),
        ("validation.rollout.num_samples=2", "not of validation.rollout; did you mean max_samples?"),
        ("rollout.on_policy_fraction={start: 0, end: 2, steps: 5}", "(end: must be less than or equal to 1)."),
        ("rollout.on_policy_fraction={start: 0, end: 1}", "(needs either steps or share)."),
    ],
)
def test_an_error_in_a_nested_key_ends_with_the_remedy(mistakes: Mistakes, override: str, end: str) -> None:
    (line,) = mistakes(override)
    assert line.endswith(end)


def test_a_wrong_value_in_a_file_is_shown_by_line(mistakes: Mistakes) -> None:
    yaml = """
    student_pretrain: s
    teacher_pretrain: t
    student:
      data_args:
        file_name: [a, [b]]
    """
    assert mistakes(yaml=yaml) == ["run.yaml:5: student.data_args.file_name[1] = ['b'] is not text."]


def test_a_misspelled_objective_is_reported_with_the_nearest(mistakes: Mistakes) -> None:
    (line,) = mistakes("kd_objective=foward_kl")
    assert line.startswith("command line: kd_objective = foward_kl is not one of")
    assert line.endswith("did you mean forward_kl?")


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: [1\nb: 2\n", 2, "not YAML"),
        ("seed: 1\n\tx: 2\n", 2, "not YAML"),
        ("seed: 1\nseed: 2\n", 2, "seed is written twice, first in line 1"),
        ("- 1\n", 1, "key: value"),
        ("a: &a {b: *a}\n", 1, "alias contain itself"),
        ("seed: 1\n---\nseed: 2\n", 2, "not YAML"),
        ("x: 1\nexp_name: !!python/object/apply:os.system [ls]\n", 2, "not YAML"),
        ("x: 1\nexp_name: ${nowhere}\n", 2, "cannot be resolved"),
        ("x: 1\nexp_name: ${oops\n", 2, "cannot be composed"),
        ("x: 1\nexp_name: ???\n", 2, "a missing value"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported_by_line(mistakes: Mistakes, text: str, line: int, word: str) -> None:
    (sentence,) = mistakes(yaml=text)
    assert sentence.startswith(f"run.yaml:{line}: ")
    assert word in sentence


def test_a_binary_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LimbeckError, match="not UTF-8"):
        load_config(tmp_path / "run.yaml")


def test_a_path_without_a_configuration_is_an_error(write: Callable[..., Path]) -> None:
    path = write("seed: 1")
    with pytest.raises(LimbeckError, match=r"is a folder; name a file in it: run\.yaml"):
        load_config(path.parent)
    with pytest.raises(LimbeckError, match="there is no configuration"):
        load_config(path.parent / "walk.yaml")
    with pytest.raises(LimbeckError, match=r"must end in \.yaml"):
        load_config(write("seed: 1", "run.yml"))


@pytest.mark.parametrize("override", ["seed", "--seed=1", "=1", "a b=1", "student.data_args.file_name[0]=x"])
def test_an_argument_that_is_not_an_override_is_an_error(mistakes: Mistakes, override: str) -> None:
    assert mistakes(override) == [f"command line: {override} is not an override; write key=value, such as seed=7."]


def test_the_suffix_may_be_left_out_and_names_may_be_odd(write: Callable[..., Path]) -> None:
    path = write(
        "student_pretrain: s\ndistill_loss_weight: 0\nstudent: {data_args: {file_name: d}}", "my run.v1.5.yaml"
    )
    assert load_config(path.with_suffix("")).config == load_config(path).config


def test_keys_of_composed_files_have_their_own_origin(write: Callable[..., Path]) -> None:
    write("seed: 5\nkd_temperature: 3\n", "shared/base.yaml")
    write("training_args: {learning_rate: 0.5}\n", "runs/student/fast.yaml")
    write("training_args: {learning_rate: 0.1}\n", "runs/student/slow.yaml")
    path = write(
        """
        defaults:
          - ../shared/base@_here_
          - student: fast
          - _self_
        student_pretrain: s
        teacher_pretrain: t
        kd_temperature: 2
        student:
          data_args: {file_name: d}
        """,
        "runs/run.yaml",
    )
    loaded = load_config(path)
    assert (loaded.config.seed, loaded.config.kd_temperature) == (5, 2)
    assert loaded.origins["seed"] == "base.yaml:1"
    assert loaded.origins["kd_temperature"] == "run.yaml:7"
    assert loaded.origins["student.training_args.learning_rate"] == "fast.yaml:1"
    assert load_config(path, ["student=slow"]).config.student.training_args.learning_rate == 0.1


def test_a_files_own_keys_win_over_its_defaults_without_a_warning(
    write: Callable[..., Path], recwarn: pytest.WarningsRecorder
) -> None:
    write("seed: 1\nkd_temperature: 3\n", "base.yaml")
    path = write(
        "defaults: [base]\nseed: 2\nstudent_pretrain: s\nteacher_pretrain: t\nstudent: {data_args: {file_name: d}}\n"
    )
    loaded = load_config(path)
    assert (loaded.config.seed, loaded.config.kd_temperature) == (2, 3)
    assert loaded.origins["seed"] == "run.yaml:2"
    assert not recwarn.list


def test_a_mistake_in_a_file_named_by_defaults_is_shown_there(write: Callable[..., Path]) -> None:
    write("seed: many\n", "base.yaml")
    path = write("defaults: [base, _self_]\nstudent_pretrain: s\n")
    with pytest.raises(LimbeckError, match=r"base\.yaml:1: seed = many is not a whole number\.$"):
        load_config(path)


def test_a_top_level_key_that_something_refers_to_is_a_variable(load: Load) -> None:
    yaml = """
    family: Qwen/Qwen2.5
    student_pretrain: ${family}-0.5B
    teacher_pretrain: ${family}-7B
    student: {data_args: {file_name: d}}
    """
    assert load(yaml=yaml).config.student_pretrain == "Qwen/Qwen2.5-0.5B"


def test_merged_keys_keep_the_lines_of_their_anchor(load: Load) -> None:
    yaml = """
    common: &common
      dtype: fp32
    copied: ${common}
    exp_name: ${copied.dtype}
    student_pretrain: s
    teacher_pretrain: t
    student:
      model_args:
        <<: *common
        revision: main
      data_args: {file_name: d}
    """
    loaded = load(yaml=yaml)
    assert (loaded.config.exp_name, loaded.config.student.model_args.dtype) == ("fp32", "fp32")
    assert loaded.origins["student.model_args.dtype"] == "run.yaml:2"
    assert loaded.origins["student.model_args.revision"] == "run.yaml:10"


def test_every_value_has_exactly_one_origin(load: Load) -> None:
    from limbeck.config.locations import leaves

    loaded = load("system_envs.A=1")
    assert loaded.origins.keys() == dict(leaves(loaded.config.model_dump())).keys()
    assert loaded.origins["system_envs.A"] == "command line"
    assert loaded.origins["student_pretrain"] == "run.yaml:1"
    assert loaded.origins["student.data_args.file_name"] == "run.yaml:5"
    assert loaded.origins["student.model_args.model_name_or_path"] == "derived from student_pretrain"
    assert loaded.origins["seed"] == "default"


def test_a_key_without_effect_causes_a_notice(load: Load) -> None:
    (notice,) = load("skew_lambda=0.3").notices
    assert notice.startswith("command line: skew_lambda has no effect")
    assert load("skew_lambda=0.3", "kd_objective=skewed_reverse_kl").notices == []


def test_the_hydra_state_of_the_application_is_restored(load: Load, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "app.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path / "outer"), version_base=None):
        load()
        assert compose("app").x == 1


def test_nested_dictionaries_are_checked_like_a_file() -> None:
    values: dict[str, Any] = {
        "student_pretrain": "s",
        "distill_loss_weight": 0,
        "student": {"data_args": {"file_name": "d"}},
    }
    assert load_mapping(values).config.student_pretrain == "s"
    with pytest.raises(LimbeckError, match=r"arguments: sead is not a key; did you mean seed\?"):
        load_mapping({**values, "sead": 1})
