"""Fixtures of the tests of each generator, whose module has the fixture ``folder``, with a model."""

import contract
import pytest


@pytest.fixture
def model(folder):
    return contract.load(folder)


@pytest.fixture
def prompts(model):
    return contract.make_prompts(model.config.vocab_size)
