"""Check quickly whether the hub can be reached, without minutes of retries. Standard library only."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request


def is_online() -> bool:
    """Whether the host of the hub has an address, or a proxy will know it."""
    if urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return True
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False
