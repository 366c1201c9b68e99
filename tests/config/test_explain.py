from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from limbeck import LimbeckError
from limbeck.config import LoadedConfig, load_config, load_mapping, render_config, to_dict

Load = Callable[..., LoadedConfig]

TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda t: t != "???")
NAMES = st.text(alphabet="abcdefgh_XYZ019-", min_size=1, max_size=8)
SCALARS = st.one_of(TEXT, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False))
CONFIGS = st.fixed_dictionaries(
    {
        "student_pretrain": TEXT,
        "teacher_pretrain": TEXT,
        "student": st.fixed_dictionaries(
            {
                "data_args": st.fixed_dictionaries(
                    {
                        "file_name": st.lists(TEXT, min_size=1, max_size=3),
                        "template": TEXT,
                        "template_kwargs": st.dictionaries(NAMES, st.one_of(SCALARS, st.lists(SCALARS, max_size=3))),
                    }
                ),
                "training_args": st.fixed_dictionaries({"learning_rate": st.floats(0, 1)}),
                "device_mapping": st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=1, unique=True)),
            }
        ),
    },
    optional={
        "exp_name": TEXT,
        "seed": st.integers(0, 2**40),
        "kd_temperature": st.floats(1e-6, 1e6),
        "system_envs": st.dictionaries(NAMES, TEXT),
        "resume_from_checkpoint": st.one_of(st.booleans(), TEXT),
        "validation": st.one_of(st.none(), st.just({"data_args": {"file_name": ["v"]}})),
    },
)
MINIMAL: dict[str, Any] = {
    "student_pretrain": "s",
    "teacher_pretrain": "t",
    "student": {
        "data_args": {"file_name": ["d"], "template": "x", "template_kwargs": {}},
        "training_args": {"learning_rate": 1e-5},
        "device_mapping": None,
    },
}


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=CONFIGS)
@example({**MINIMAL, "exp_name": "1e-5"})
@example({**MINIMAL, "exp_name": "off"})
@example({**MINIMAL, "exp_name": "no", "system_envs": {"on": "null", "1": "~"}})
@example({**MINIMAL, "exp_name": "${oc.env:HOME} \\${x} \\"})
@example({**MINIMAL, "exp_name": "a: b # c\n\td\x85\u2028\ufeff\x00'\""})
@example({**MINIMAL, "exp_name": "0x10", "resume_from_checkpoint": "true"})
@example({**MINIMAL, "exp_name": "😀 数据 " + "long " * 40})
def test_what_is_shown_loads_back_to_the_same_configuration(tmp_path: Path, values: dict[str, Any]) -> None:
    try:
        loaded = load_mapping(values)
    except LimbeckError as error:
        assume("cannot be the name of a file" not in str(error))
        raise
    path = tmp_path / "shown.yaml"
    path.write_text(render_config(loaded), encoding="utf-8")
    assert load_config(path).config == loaded.config


def test_what_is_shown_is_plain_yaml_with_every_key(load: Load) -> None:
    loaded = load("student.training_args.learning_rate=1e-5")
    assert yaml.safe_load(render_config(loaded)) == to_dict(loaded.config)


def test_every_line_with_a_value_ends_in_its_origin(load: Load) -> None:
    lines = render_config(load("seed=3")).splitlines()
    assert "seed: 3" in next(line for line in lines if line.endswith("# command line"))
    assert any(line.startswith("student_pretrain: small") and line.endswith("# run.yaml:1") for line in lines)
    assert all("  # " in line or line.endswith(":") for line in lines)


def test_the_dictionary_of_a_configuration_is_json(load: Load) -> None:
    config = load().config
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)
