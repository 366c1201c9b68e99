"""``distillation_config``: ModelOpt's YAML as a section or a file, and errors in it."""

from pathlib import Path
from typing import Any

import pytest

from limbeck.config import load_config, load_mapping
from limbeck.errors import LimbeckError

BASE = {"student_pretrain": "s", "teacher_pretrain": "t", "student": {"data_args": {"file_name": "d"}}}
DOCUMENTED = """
logit_layers: ["output_layer", "output_layer"]
intermediate_layer_pairs:
  - ["decoder.layers.0.input_layernorm", "decoder.layers.0.input_layernorm"]
  - ["decoder.final_layernorm", "decoder.layers.30.input_layernorm", "hidden_cosine"]
skip_lm_loss: true
kd_loss_scale: 10.0
logit_kl_temperature: 2.0
logit_kl_topk: null
"""


def inline(**keys: Any):
    return load_mapping({**BASE, "distillation_config": keys})


@pytest.fixture
def run(tmp_path: Path):
    def build(text: str, more: str = "") -> Path:
        (tmp_path / "kd.yaml").write_text(text)
        (tmp_path / "run.yaml").write_text(
            "student_pretrain: s\nteacher_pretrain: t\nstudent: {data_args: {file_name: d}}\n"
            f"distillation_config: {tmp_path / 'kd.yaml'}\n{more}"
        )
        return tmp_path / "run.yaml"

    return build


def test_the_documented_file_loads_unchanged(run) -> None:
    loaded = load_config(run(DOCUMENTED))
    config = loaded.config
    assert config.features.pairs == [
        ["decoder.layers.0.input_layernorm", "decoder.layers.0.input_layernorm"],
        ["decoder.final_layernorm", "decoder.layers.30.input_layernorm", "cosine"],
    ]
    assert config.features.logit_layers == ["output_layer", "output_layer"]
    assert (config.features.mask, config.features.projection, config.loss_balance) == (
        "supervised",
        "shared",
        "modelopt",
    )
    assert (config.distill_loss_weight, config.kd_temperature, config.logits_topk) == (1.0, 2.0, 0)
    assert not config.temperature_squared
    assert loaded.notices == [
        "distillation_config.kd_loss_scale has no effect: it is only read with skip_lm_loss: false."
    ]
    assert loaded.origins["kd_temperature"].startswith(
        "derived from distillation_config.logit_kl_temperature (kd.yaml:"
    )


@pytest.mark.parametrize("scale", [None, 0.25, 1.0, 10.0])
def test_the_scale_is_the_ratio_of_the_two_weights(scale: float | None) -> None:
    keys = {} if scale is None else {"kd_loss_scale": scale}
    w = inline(skip_lm_loss=False, **keys).config.distill_loss_weight
    assert w / (1 - w) == pytest.approx(1.0 if scale is None else scale)


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, 10 / 11),
        ({"loss_balance": "weighted"}, 10 / 11),
        ({"features": {"weight": 2}}, 2),
        ({"loss_balance": "modelopt"}, 1),
    ],
)
def test_the_scale_multiplies_the_pairs_too(keys: dict[str, Any], weight: float) -> None:
    file = {"intermediate_layer_pairs": [["a", "b"]], "skip_lm_loss": False, "kd_loss_scale": 10.0}
    loaded = load_mapping({**BASE, **keys, "distillation_config": file})
    assert loaded.config.features.weight == pytest.approx(weight)
    assert loaded.notices == []
    assert inline(intermediate_layer_pairs=[["a", "b"]]).config.features.weight == 1  # LM is left out: KL + pairs


def test_only_what_the_user_has_not_set_gives_way_to_pipeline_stages() -> None:
    file = {"distillation_config": {"intermediate_layer_pairs": [["a", "b"]]}}

    def adapted(**keys: Any) -> list[str]:
        return load_mapping({**BASE, **keys, **file}).config.features.adapt_to_stages

    assert adapted() == ["loss_balance", "projection"]
    assert adapted(loss_balance="modelopt") == ["projection"]
    assert adapted(features={"projection": "shared"}) == ["loss_balance"]
    assert adapted(features={"adapt_to_stages": []}) == []


def test_a_number_in_its_file_needs_no_dot(run) -> None:
    w = load_config(run("skip_lm_loss: false\nkd_loss_scale: 1e1\n")).config.distill_loss_weight
    assert w / (1 - w) == pytest.approx(10.0)


def test_an_empty_section_is_modelopts_default() -> None:
    loaded = inline()
    assert loaded.config.distill_loss_weight == 1.0
    assert loaded.config.loss_balance == "modelopt"
    assert loaded.notices == []
    assert load_mapping({**BASE, "distillation_config": None}).config.distill_loss_weight == 0.5
    assert inline(logit_kl_topk=16).config.logits_topk == 16


def test_limbecks_keys_replace_modelopts_defaults() -> None:
    keys = {"features": {"mask": "tokens", "projection": "per_pair"}, "loss_balance": "weighted"}
    pairs = {"intermediate_layer_pairs": [["a", "b"]]}
    config = load_mapping({**BASE, **keys, "kd_temperature": 3, "distillation_config": pairs}).config
    assert (config.features.mask, config.features.projection, config.loss_balance) == ("tokens", "per_pair", "weighted")
    assert config.kd_temperature == 3


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"logit_kl_temp": 2}, "distillation_config.logit_kl_temp is not a key of ModelOpt"),
        ({"criterion": {"a": 1}}, "can only be set in Python"),
        ({"skip_lm_loss": "no"}, "must be true or false"),
        ({"skip_lm_loss": False, "kd_loss_scale": 0}, "must be a number above 0"),
        ({"intermediate_layer_pairs": [["a"]]}, "is not a pair"),
        ({"intermediate_layer_pairs": [["a", "b", "cosin"]]}, "did you mean cosine"),
        ({"intermediate_layer_pairs": "a"}, "features.pairs = a is not a list"),
        ({"logit_layers": ["output_layer"]}, "must name two output heads"),
        ({"logit_kl_temperature": 0}, "kd_temperature = 0 must be greater than 0"),
        ({"logit_kl_topk": 0}, "logit_kl_topk = 0 must be above 0; null is the whole vocabulary"),
    ],
)
def test_mistakes_are_reported(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LimbeckError, match=sentence):
        inline(**keys)


def test_a_contradiction_shows_the_number_of_the_file() -> None:
    keys = {"skip_lm_loss": False, "kd_loss_scale": 10.0}
    sentence = r"kd_loss_scale = 10\.0 \(distill_loss_weight = 0\.9091\) contradicts distill_loss_weight = 0\.5"
    with pytest.raises(LimbeckError, match=sentence):
        load_mapping({**BASE, "distill_loss_weight": 0.5, "distillation_config": keys})


def test_a_mistake_in_its_file_is_reported_with_file_and_line(run) -> None:
    with pytest.raises(LimbeckError, match=r"kd\.yaml:2: distillation_config\.nonsense"):
        load_config(run("skip_lm_loss: true\nnonsense: 1\n"))
    with pytest.raises(LimbeckError, match=r"kd\.yaml.*is not YAML"):
        load_config(run("a: [\n"))
    with pytest.raises(LimbeckError, match="contradicts kd_temperature = 3"):
        load_config(run("logit_kl_temperature: 2.0\n", "kd_temperature: 3\n"))
    with pytest.raises(LimbeckError, match=r"distillation_config = nowhere\.yaml is not a file"):
        load_mapping({**BASE, "distillation_config": "nowhere.yaml"})
    with pytest.raises(LimbeckError, match="neither a file nor a section"):
        load_mapping({**BASE, "distillation_config": 3})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"features": {"pairs": [["a", "b"]]}, "teacher_pretrain": None, "distill_loss_weight": 0}, "need a teacher"),
        ({"loss_balance": "modelopt", "distill_loss_weight": 0}, "set distill_loss_weight above 0"),
        ({"features": {"pairs": [["a", "b", "c", "d"]]}}, "is not a pair"),
        ({"features": {"weight": 0}}, "must be greater than 0"),
        ({"features": {"pair": []}}, "did you mean pairs"),
    ],
)
def test_contradictory_features_are_an_error(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LimbeckError, match=sentence):
        load_mapping({**BASE, **keys})


def test_reentrant_recomputation_hides_features() -> None:
    student = {"data_args": {"file_name": "d"}, "model_args": {"gradient_checkpointing_use_reentrant": True}}
    with pytest.raises(LimbeckError, match=r"use_reentrant = true hides"):
        load_mapping({**BASE, "student": student, "features": {"pairs": [["a", "b"]]}})


def test_settings_without_effect_cause_a_notice() -> None:
    assert any(
        "features.weight has no effect" in one for one in load_mapping({**BASE, "features": {"weight": 2}}).notices
    )
    keys = {"features": {"pairs": [["a", "b"]], "weight": 2}, "loss_balance": "modelopt"}
    assert any("is not read with loss_balance" in one for one in load_mapping({**BASE, **keys}).notices)
