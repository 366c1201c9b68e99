"""Which parameters are trained, by name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from limbeck.errors import LimbeckError
from limbeck.models import select_trained


def make_model() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(5, 3)
    model.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(3, 3), "down": nn.Linear(3, 3)}) for _ in range(12))
    model.head = nn.Linear(3, 5, bias=False)
    model.head.weight = model.embed.weight  # tied
    return model


NAMES = [name for name, _ in make_model().named_parameters(remove_duplicate=False)]
ENTRIES = st.lists(st.sampled_from([*NAMES, "layers.1.", "layers.1", "up", "head", "bias", "embed"]), max_size=4)


@given(ENTRIES.filter(bool), ENTRIES, st.booleans())
def test_a_parameter_is_trained_if_an_entry_is_part_of_one_of_its_names(unfrozen, frozen, as_regex):
    model = make_model()
    written = [[re.escape(one) if as_regex else one for one in entries] for entries in (unfrozen, frozen)]
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)

    def hit(entries, parameter):
        return any(entry in name for entry in entries for name in names[parameter])

    expected = {id(p) for p in names if hit(unfrozen, p) and not hit(frozen, p)}
    if not expected:
        with pytest.raises(LimbeckError, match="freezes every parameter"):
            select_trained(model, *written, "regex" if as_regex else "substring")
        return
    select_trained(model, *written, "regex" if as_regex else "substring")
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected


def test_a_regular_expression_may_match_any_part():
    model = make_model()
    select_trained(model, [r"layers\.(0|11)\.up\.weight$"], None, "regex")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["layers.0.up.weight", "layers.11.up.weight"]


@pytest.mark.parametrize(
    ("unfrozen", "frozen", "match", "sentence"),
    [
        (
            ["up", "layers.12."],
            None,
            "substring",
            r"unfrozen_parameters: no parameter matches 'layers.12.'; names look",
        ),
        (["^head.weight$"], None, "substring", r"looks like a regular expression, so set parameter_match: regex"),
        (None, ["gate"], "substring", r"frozen_parameters: no parameter matches 'gate'"),
        (None, ["e"], "substring", r"frozen_parameters freezes every parameter"),
    ],
)
def test_what_matches_nothing_is_an_error(unfrozen, frozen, match, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        select_trained(make_model(), unfrozen, frozen, match)
