"""A missing Ray and missing GPUs are refused with one sentence each."""

import socket
import threading

import pytest

from limbeck.cluster.actors import Worker
from limbeck.cluster.groups import GroupSpec
from limbeck.cluster.placement import describe_devices, place
from limbeck.cluster.session import ray_session
from limbeck.errors import LimbeckError

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.workers


def test_an_address_without_a_listener_is_refused_at_once(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    sentence = f"cannot reach Ray at RAY_ADDRESS = 127.0.0.1:{port}: .*refused; start it there"
    with pytest.raises(LimbeckError, match=sentence), ray_session(1):
        pass


def test_an_address_of_ray_client_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(LimbeckError, match=r"one of Ray Client.*HOST:PORT of its head"), ray_session(1):
        pass


def test_a_port_of_another_program_is_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{other.getsockname()[1]}")
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n"), daemon=True).start()
        with pytest.raises(LimbeckError, match="something other than Ray listens there"), ray_session(1):
            pass


def test_gpus_that_ray_lacks_or_pytorch_does_not_see_are_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(
        address="local", num_cpus=2, num_gpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False
    )
    try:
        with pytest.raises(LimbeckError, match=r"device_mapping names GPU 5, but there are 2 \(numbered from 0\)"):
            describe_devices([[0], [5]])
        assert describe_devices([[0], [1]]) == "Devices: 2 GPU(s)."
        placement = place([[0]], None)
        spec = GroupSpec("teacher", Worker, (), tmp_path, environment={"CUDA_VISIBLE_DEVICES": ""})
        group = spec.start(placement, 0)
        with pytest.raises(LimbeckError, match=r"teacher-0 on .* was given a GPU that PyTorch .* does not see there"):
            group.connect(1)
    finally:
        ray.shutdown()
