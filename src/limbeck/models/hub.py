"""Loading cached models without a network.

The Hugging Face client retries for half a minute per file when the hub cannot be reached, even if the file is in its cache.
``offline_if_unreachable`` avoids that for one load. A later load uses the hub again as soon as it can be reached.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

_TIMEOUT = 5  # seconds for one connection
_ATTEMPTS = 2
_VALID_FOR = 30  # seconds before the hub is probed again; one run loads several files in a row

_last_probe: tuple[str, float, bool] | None = None  # endpoint, time, whether it was reachable


@contextmanager
def offline_if_unreachable(name_or_path: str | None) -> Iterator[None]:
    """Restricts loads inside the block to the cache while the hub cannot be reached.

    It does what ``HF_HUB_OFFLINE=1`` does, but only until the end of the block: ``local_files_only`` is not enough, because
    transformers still requests some files (an adapter's configuration, for example). Does nothing for a folder or None.
    """
    if name_or_path is None or Path(name_or_path).is_dir() or constants.is_offline_mode() or _hub_is_reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _hub_is_reachable() -> bool:
    """Whether the hub accepts a TCP connection. Returns True behind a proxy, where that cannot be tested."""
    global _last_probe
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme in getproxies():
        return True
    if _last_probe and _last_probe[0] == constants.ENDPOINT and time.monotonic() - _last_probe[1] < _VALID_FOR:
        return _last_probe[2]
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    reachable = _accepts_connections(endpoint.hostname or "", port)
    _last_probe = constants.ENDPOINT, time.monotonic(), reachable
    return reachable


def _accepts_connections(host: str, port: int) -> bool:
    for attempt in range(_ATTEMPTS):
        try:
            socket.create_connection((host, port), timeout=_TIMEOUT).close()
            return True
        except OSError:
            if attempt + 1 < _ATTEMPTS:
                time.sleep(0.5)
    return False
