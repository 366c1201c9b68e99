"""The choice of a dialect, dialects from plug-ins, and names that plug-ins register."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limbeck.config import LoadedConfig, load_arguments, load_config, load_mapping
from limbeck.errors import LimbeckError
from limbeck.registry import DIALECTS, STEP_SOURCES, STRATEGIES, TEACHERS, TRACKERS

TOY = """
from collections.abc import Mapping

from limbeck.config.dialects.base import Source
from limbeck.config.translation import Translation
from limbeck.registry import DIALECTS


class Toy:
    name = "toy"
    system = "ToyKD"
    keys = {
        "big": "teacher_pretrain",
        "small": "student_pretrain",
        "rows": "student.data_args.file_name",
        "heat": "kd_temperature",
        "slices": "student.strategy_args.strategy_config.tensor_parallel_plan",
    }

    def recognises(self, source: Source) -> bool:
        return "big" in source if isinstance(source, Mapping) else "--big" in source

    def translate(self, source, locations):
        result = Translation({})
        given = source if isinstance(source, Mapping) else dict(zip(source[::2], source[1::2]))
        for key, value in given.items():
            name = key.removeprefix("--")
            if name in self.keys:
                result.put(self.keys[name], value, key)
            elif name == "banner":
                result.ignored.append(key)
            elif name != "plugins":
                result.refuse(key, "is not a setting of ToyKD")
        return result


DIALECTS.register("toy")(Toy())
"""
RIVAL = TOY.replace("Toy", "Rival").replace('"toy"', '"rival"')
TOY_FILE = "plugins: [{plugin}]\nbig: large\nsmall: little\nrows: data.json\nheat: 2.5\nbanner: hello\n"

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def only_built_in_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in (DIALECTS, STEP_SOURCES, STRATEGIES, TEACHERS, TRACKERS):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield


@pytest.fixture
def toy_file(write: Write) -> Path:
    plugin = write(TOY, "toy.py")
    return write(TOY_FILE.format(plugin=plugin), "toy.yaml")


def test_a_plugin_registers_a_dialect_that_recognises_its_file(toy_file: Path) -> None:
    loaded = load_config(toy_file)
    assert loaded.dialect == "toy"
    assert loaded.config.teacher.model_args.model_name_or_path == "large"
    assert loaded.config.student.data_args.file_name == ["data.json"]
    assert loaded.config.kd_temperature == 2.5
    assert loaded.origins["kd_temperature"] == "derived from heat (toy.yaml:5)"
    assert loaded.config.plugins == [str(toy_file.with_name("toy.py"))]
    (notice,) = loaded.notices
    assert re.fullmatch(r"These settings of ToyKD have no effect in Limbeck: banner \(.*toy\.yaml:6\)\.", notice)


def test_an_error_in_a_translated_value_names_line_and_key_of_the_file(toy_file: Path) -> None:
    with pytest.raises(LimbeckError, match=r"toy\.yaml:5: heat: kd_temperature = 0 must be greater than 0\.$"):
        toy_file.write_text(toy_file.read_text().replace("2.5", "0"))
        load_config(toy_file)
    with pytest.raises(LimbeckError, match=r"toy\.yaml:7: colour is not a setting of ToyKD\.$"):
        toy_file.write_text(toy_file.read_text().replace("heat: 0", "heat: 1") + "colour: red\n")
        load_config(toy_file)


@pytest.mark.parametrize("slices", ["my.plan", "{layers: colwise}"])
def test_an_error_after_loading_names_the_key_that_the_user_wrote(toy_file: Path, slices: str) -> None:
    toy_file.write_text(f"{toy_file.read_text()}slices: {slices}\n")
    loaded, key = load_config(toy_file), "student.strategy_args.strategy_config.tensor_parallel_plan"
    assert loaded.with_origin(f"{key}: wrong.") == f"{key} (derived from slices (toy.yaml:7)): wrong."
    assert loaded.with_origin("student.strategy_args is wrong.") == "student.strategy_args is wrong."


def test_a_plugin_can_be_named_on_the_command_line(write: Write) -> None:
    path = write("big: large\nsmall: little\nrows: data.json\n")
    plugin = write(TOY, "toy_override.py")
    assert load_config(path, [f"plugins=[{plugin}]"]).dialect == "toy"


def test_a_dialect_recognises_an_argument_vector(write: Write) -> None:
    arguments = ["--big", "large", "--small", "little", "--rows", "data.json", "--heat", "3"]
    plugins = [str(write(TOY, "toy_arguments.py"))]
    loaded = load_arguments(arguments, plugins=plugins)
    assert loaded.dialect == "toy"
    assert loaded.config.kd_temperature == 3
    assert loaded.config.plugins == plugins
    assert loaded.origins["kd_temperature"] == "--heat"
    with pytest.raises(LimbeckError, match=r"^--heat: kd_temperature = hot is not a number\.$"):
        load_arguments([*arguments[:-1], "hot"], plugins=plugins)


def test_arguments_that_no_dialect_recognises_are_an_error() -> None:
    with pytest.raises(
        LimbeckError,
        match=r"no dialect recognises these arguments; choose one .* \(distillkit, hyperpod, .*, megatron, nemo_rl, roll\)",
    ):
        load_arguments(["--lr", "1"])
    with pytest.raises(LimbeckError, match="the dialect roll reads YAML files, not arguments"):
        load_arguments(["--lr", "1"], dialect="roll")


def test_two_dialects_that_recognise_one_file_are_an_error(write: Write) -> None:
    plugins = [write(TOY, "first.py"), write(RIVAL, "second.py")]
    path = write(f"plugins: [{plugins[0]}, {plugins[1]}]\nbig: large\nsmall: little\nrows: data.json\n")
    with pytest.raises(
        LimbeckError, match=r"run\.yaml: the dialects rival and toy both recognise this; choose one with"
    ):
        load_config(path)
    assert load_config(path, dialect="rival").dialect == "rival"


def test_an_unknown_dialect_is_an_error_that_lists_the_known(load: Callable[..., LoadedConfig]) -> None:
    with pytest.raises(
        LimbeckError,
        match="dialect rol is not known; use one of distillkit, hyperpod, limbeck, megatron, nemo_rl, roll",
    ):
        load(dialect="rol")


def test_a_plugin_that_fails_is_reported_by_line(write: Write) -> None:
    broken = write("raise RuntimeError('no')\n", "broken.py")
    with pytest.raises(LimbeckError, match=r"run\.yaml:2: plugins: .*broken\.py cannot be run \(RuntimeError: no\)"):
        load_config(write(f"seed: 1\nplugins: {broken}\n"))


def test_a_plain_file_is_limbecks_and_gets_no_notice_about_another_system(load: Callable[..., LoadedConfig]) -> None:
    temperatures = ["kd_temperature=2", "teacher_temperature=1"]
    plain = load(*temperatures)
    assert (plain.dialect, plain.notices) == ("limbeck", [])
    forced = load(*temperatures, dialect="roll")
    assert forced.dialect == "roll"
    assert any("logits_topk is not set" in notice for notice in forced.notices)
    assert any("temperature_convention: roll" in notice for notice in forced.notices)
    assert forced.config == plain.config


@pytest.mark.parametrize(
    "override",
    [
        "rpc_timeout=60",
        "checkpoint_config.type=file_system",
        "student.strategy_args.tp_size=1",
        "student.training_args.bf16=true",
        "student.strategy_args.strategy_config.fsdp_size=1",
        "response_length=64",
        "student.data_args.template=qwen3_nothink",
        "student.data_args.dataset_dir=data",
        "teacher.training_args.learning_rate=1",
        "teacher.use_sequence_packing=true",
        "validation.data_args.template=native",
        "student.training_args.seed=42",
    ],
)
def test_a_key_that_only_roll_has_makes_a_file_rolls(load: Callable[..., LoadedConfig], override: str) -> None:
    loaded = load(override)
    assert loaded.dialect == "roll"
    assert any("logits_topk is not set" in notice for notice in loaded.notices)


def test_a_forced_native_dialect_refuses_rolls_keys(load: Callable[..., LoadedConfig]) -> None:
    with pytest.raises(LimbeckError, match="rpc_timeout is not a key"):
        load("rpc_timeout=60", dialect="limbeck")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "student.strategy_args.strategy_name=fsdp_train",
            "student.strategy_args.strategy_name = fsdp_train is not a known strategy; did you mean fsdp2_train?",
        ),
        ("track_with=tensorbord", "track_with = tensorbord is not a known tracker; did you mean tensorboard?"),
        ("teacher.source=modle", "teacher.source = modle is not a known teacher source; did you mean model?"),
        ("step_source=datset", "step_source = datset is not a known step source; did you mean dataset?"),
    ],
)
def test_an_unknown_name_is_reported_with_the_nearest(
    mistakes: Callable[..., list[str]], override: str, sentence: str
) -> None:
    assert mistakes(override) == [f"command line: {sentence}"]


def test_a_plugin_registers_names_that_the_schema_accepts(write: Write) -> None:
    plugin = write(
        """
        from limbeck.registry import STEP_SOURCES, STRATEGIES, TEACHERS, TRACKERS
        from limbeck.strategies.fsdp2 import Fsdp2Strategy

        STRATEGIES.register("other_train")(Fsdp2Strategy())
        for registry, name in ((TRACKERS, "csv"), (TEACHERS, "http"), (STEP_SOURCES, "written")):
            registry.register(name)(lambda *arguments: None)
        """,
        "names.py",
    )
    config = load_mapping(
        {
            "plugins": str(plugin),
            "student_pretrain": "s",
            "teacher_pretrain": "t",
            "track_with": "csv",
            "step_source": "written",
            "step_source_kwargs": {"length": 3},
            "teacher": {"source": "http", "source_kwargs": {"url": "http://localhost"}},
            "student": {"data_args": {"file_name": "d"}, "strategy_args": {"strategy_name": "other_train"}},
        }
    ).config
    assert (config.teacher_source, config.step_source, config.track_with) == ("http", "written", "csv")
    assert config.student.strategy_args.strategy_name == "other_train"
