"""Files of other systems have the numbers that Limbeck's own files have."""

import pytest
from omegaconf import OmegaConf

from limbeck.config.yaml_values import load_yaml

NUMBERS = "1e-5 1e4 1E4 1e+4 -1e1 +2e1 1_0e1 1.e3 1.5e3 1.5e-3 1.0E+3 .5e-3 1.5 10 0 -3 0x1f .inf"
OTHERS = "1e e5 1.5e 1e5x x1e5 1e1.5 1-e5 2e-1-3 '1e5' true null text 1.2.3"


@pytest.mark.parametrize("text", [*NUMBERS.split(), *OTHERS.split()])
def test_a_value_is_what_omegaconf_reads(text):
    found = load_yaml(f"key: {text}")["key"]
    expected = OmegaConf.create(f"key: {text}")["key"]
    assert (type(found), found) == (type(expected), expected)
    assert (isinstance(found, (int, float)) and not isinstance(found, bool)) == (text in NUMBERS.split())
