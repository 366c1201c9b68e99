"""Whether the hub can be reached: where it cannot, its client tries again for half a minute for each file, also those that it
has in its cache."""

from __future__ import annotations

import socket
import time
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

_SECONDS = 5
_TRIES = 2


@cache
def probe_hub() -> None:
    """Let the hub's client keep to its cache, as HF_HUB_OFFLINE=1 does, if nobody answers where the hub is; asked once."""
    hub = urlsplit(constants.ENDPOINT)
    if constants.is_offline_mode() or hub.scheme in getproxies():
        return
    for _ in range(_TRIES):
        try:
            port = hub.port or (80 if hub.scheme == "http" else 443)
            socket.create_connection((hub.hostname or "", port), timeout=_SECONDS).close()
            return
        except OSError:
            time.sleep(0.5)
    constants.HF_HUB_OFFLINE = True
