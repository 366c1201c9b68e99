"""Rules between the keys that select the trained parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from limbeck.config import LoadedConfig

KEYS = "student.model_args"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["unfrozen_parameters=[]"], "is empty, which freezes everything"),
        (["unfrozen_parameters=[a,'']"], "has the entry '', which is empty"),
        (["frozen_parameters=['(']", "parameter_match=regex"], "has the entry '(', which is not a regular expression"),
        (["unfrozen_parameters=[a]", "freeze_module_prefix=b"], "use frozen_parameters instead"),
        (["unfrozen_parameters=[a]", "lora_target=b"], "unfrozen_parameters contradicts lora_target"),
        (["freeze_module_prefix=a", "lora_target=b"], "freeze_module_prefix contradicts lora_target"),
        (["unfrozen_parameters=nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_contradictions_are_errors(mistakes: Callable[..., list[str]], overrides: list[str], sentence: str) -> None:
    (line,) = mistakes(*(f"{KEYS}.{one}" for one in overrides))
    assert sentence in line


def test_unread_settings_cause_a_notice(load: Callable[..., LoadedConfig]) -> None:
    loaded = load(f"{KEYS}.parameter_match=regex", "checkpoint_config.save_to_hub.private=false")
    assert [notice.split(" has no effect")[0] for notice in loaded.notices] == [
        f"command line: {KEYS}.parameter_match",
        "command line: checkpoint_config.save_to_hub.private",
    ]
