"""The connection to Ray: to the one at RAY_ADDRESS, else to one that is started here and ended with the run."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from limbeck.errors import LimbeckError

NAMESPACE = "limbeck"
_PROBE_SECONDS = 10
_TOKEN = Path("~/.ray/auth_token")
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Do not print worker output on the terminal: the run reports failures itself, and workers have log files.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of calls to workers that are known to be lost
    # A Ray that is started here serves one run: its workers run at normal priority, and none are started in advance.
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}


def load_ray() -> ModuleType:
    """The module ``ray``, with this project's defaults in the environment; raises LimbeckError if it is not installed."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "ray" not in sys.modules and os.environ.get("RAY_ADDRESS") and _has_token():
        # Ray does the same for a Ray that it starts. It reads the variable once, at import: set later, the servers
        # would require a token that this process does not send.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise LimbeckError(
            "worker groups need Ray, which is not installed; pip install 'limbeck[ray]', or give student and teacher the "
            "same device_mapping."
        ) from error
    return ray


@contextmanager
def ray_session(slots: int, timeline: Path | None = None) -> Iterator[str]:
    """Connect to Ray for the duration of the block. Yields a sentence for the console that names the Ray in use.

    An existing connection of this process is used and stays open.

    Args:
        slots: CPU slots that a Ray started here has at least.
        timeline: file for a Chrome trace of all calls, written at the end if RAY_PROFILING=1.

    Raises:
        LimbeckError: if Ray cannot be reached or started.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield "Ray: the connection that this process had."
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_ray_address(address)
    quiet = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            context = ray.init(address=address, **quiet)
        else:
            context = ray.init(
                address="local",
                num_cpus=max(slots, os.cpu_count() or 1),
                include_dashboard=_profiled() and _has_dashboard(),
                **quiet,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"at RAY_ADDRESS = {address}" if address else "on this machine"
        raise LimbeckError(f"cannot reach Ray {where}: {str(error).strip().splitlines()[0]}") from error
    try:
        found = f"joined at {address}" if address else "started on this machine"
        board = f"; dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
        yield f"Ray {ray.__version__} {found}{board}."
    finally:
        if timeline is not None and _profiled():
            timeline.parent.mkdir(parents=True, exist_ok=True)
            ray.timeline(str(timeline))
        ray.shutdown()


def check_ray_address(address: str) -> None:
    """Raise LimbeckError if no Ray listens at HOST:PORT; Ray itself takes minutes to notice."""
    if address.startswith("ray://"):
        raise LimbeckError(
            f"RAY_ADDRESS = {address} is one of Ray Client, which cannot place workers; run the command on a machine "
            "of the cluster, with RAY_ADDRESS=HOST:PORT of its head (port 6379 unless set), or auto."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or os.environ.get("RAY_USE_TLS") == "1":
        return
    try:
        with socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS) as connection:
            # Ray speaks gRPC, whose servers begin with a frame of settings (HTTP/2, type 4).
            found = "" if connection.recv(4)[3:] == b"\x04" else "something other than Ray listens there"
    except (OSError, OverflowError) as error:
        found = str(error)
    if found:
        raise LimbeckError(
            f"cannot reach Ray at RAY_ADDRESS = {address}: {found}; start it there (`ray start --head`), or unset RAY_ADDRESS "
            "for a Ray of the run's own."
        )


def ray_address() -> str:
    """What other programs set RAY_ADDRESS to in order to join the Ray that this process is connected to."""
    return str(load_ray().get_runtime_context().gcs_address)


def ray_has_ended() -> bool:
    """Whether the Ray of this process has stopped listening. Ray itself notices after a minute and then aborts the
    process.
    """
    host, _, port = ray_address().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS).close()
    except OSError:
        return True
    return False


def can_join() -> bool:
    """Whether a Ray exists to join: RAY_ADDRESS names one, or this process is connected to one already."""
    return bool(os.environ.get("RAY_ADDRESS")) or load_ray().is_initialized()


def _has_token() -> bool:
    """Whether this user has a token for Ray."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or _TOKEN.expanduser().is_file()


def _has_dashboard() -> bool:
    """Whether ``ray[default]`` is installed, of which the dashboard is a part."""
    return find_spec("aiohttp_cors") is not None


def _profiled() -> bool:
    return os.environ.get("RAY_PROFILING", "0") == "1"
