"""What a hub that cannot be reached costs: a sentence, and no half minute of new tries."""

import socket

import pytest
import torch
from huggingface_hub import constants

from limbeck.errors import LimbeckError
from limbeck.models import model_outline
from limbeck.models.hub import probe_hub


@pytest.fixture
def hub(monkeypatch):
    """``hub(port)``: the hub is at that port of this machine, and nobody has asked for it yet."""

    def at(port: int) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        probe_hub.cache_clear()

    yield at
    probe_hub.cache_clear()


def test_a_hub_that_answers_is_asked(hub):
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub(server.getsockname()[1])
        probe_hub()
        assert not constants.is_offline_mode()


def test_a_model_of_a_hub_that_does_not_answer_is_one_sentence_and_no_more_tries(hub):
    hub(9)
    with pytest.raises(
        LimbeckError, match=r"configuration of the teacher 'nobody/nothing': .*cached files\. .*network"
    ):
        model_outline("nobody/nothing", dtype=torch.float32, role="teacher")
    assert constants.is_offline_mode()
