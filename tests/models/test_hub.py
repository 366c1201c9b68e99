"""Loading hub models while the hub cannot be reached."""

import shutil
import socket
import time

import pytest
import torch
from huggingface_hub import constants
from tiny import make_model

from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, hub, load_model, load_tokenizer, model_outline


@pytest.fixture
def endpoint(monkeypatch):
    """``endpoint(port)`` places the hub at that port of this machine."""

    def at(port: int) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "_last_probe", None)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)

    return at


@pytest.fixture
def closed_port():
    """A port that refuses connections until something listens on it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def is_restricted_to_the_cache(name):
    with hub.offline_if_unreachable(name):
        return constants.is_offline_mode()


def test_a_reachable_hub_is_used(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(server.getsockname()[1])
        assert not is_restricted_to_the_cache("owner/model")


def test_an_unreachable_hub_is_used_again_once_it_accepts_connections(endpoint, closed_port, monkeypatch):
    endpoint(closed_port)
    assert is_restricted_to_the_cache("owner/model")
    assert not constants.is_offline_mode()
    with socket.create_server(("127.0.0.1", closed_port)):
        monkeypatch.setattr(hub, "_VALID_FOR", 0)
        assert not is_restricted_to_the_cache("owner/model")


def test_one_probe_serves_the_loads_that_follow_it(endpoint, closed_port, monkeypatch):
    endpoint(closed_port)
    assert is_restricted_to_the_cache("owner/model")
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("probed again"))
    assert is_restricted_to_the_cache("owner/model")


def test_neither_a_folder_nor_offline_mode_needs_a_probe(endpoint, closed_port, monkeypatch, tmp_path):
    endpoint(closed_port)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("probed"))
    assert not is_restricted_to_the_cache(str(tmp_path))
    assert not is_restricted_to_the_cache(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_restricted_to_the_cache("owner/model")
    assert constants.is_offline_mode()


def test_a_cached_model_loads_at_once_without_the_hub(endpoint, closed_port, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    snapshot = cache / "models--owner--model" / "snapshots" / ("0" * 40)
    shutil.copytree(make_model(tmp_path / "made"), snapshot)
    (cache / "models--owner--model" / "refs").mkdir()
    (cache / "models--owner--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    endpoint(closed_port)
    begun = time.monotonic()
    assert load_model(ModelSource("owner/model"), torch.float32).config.model_type == "qwen2"
    assert load_tokenizer(ModelSource("owner/model")).eos_token
    assert time.monotonic() - begun < 10


def test_a_name_that_is_neither_a_folder_nor_cached_is_one_sentence(endpoint, closed_port):
    endpoint(closed_port)
    source = ModelSource("nobody/nothing", "teacher")
    end = (
        r" 'nobody/nothing', which is not a folder here and cannot be loaded from the hub \(.*cached files\); check the path, "
        r"or the hub name and the network\.$"
    )
    with pytest.raises(LimbeckError, match=f"^cannot read the configuration of the teacher{end}"):
        model_outline(source, torch.float32)
    with pytest.raises(LimbeckError, match=f"^cannot load a tokenizer from{end}"):
        load_tokenizer(source)
    assert not constants.is_offline_mode()
