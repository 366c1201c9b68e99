"""What a hub that cannot be reached costs: a sentence, and no half minute of new tries."""

import socket

import pytest
import torch
from huggingface_hub import constants

from limbeck.errors import LimbeckError
from limbeck.models import model_outline
from limbeck.models.hub import knock_at_hub


@pytest.mark.parametrize("answers", [False, True])
def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch, answers):
    with socket.create_server(("127.0.0.1", 0)) as hub:
        address = f"http://127.0.0.1:{hub.getsockname()[1] if answers else 9}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        knock_at_hub.cache_clear()
        knock_at_hub()
        assert answers != constants.is_offline_mode()


def test_a_model_that_is_nowhere_is_one_sentence():
    with pytest.raises(
        LimbeckError, match=r"configuration of the teacher 'nobody/nothing': .*cached files\. .*network"
    ):
        model_outline("nobody/nothing", dtype=torch.float32, role="teacher")
