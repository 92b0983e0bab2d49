"""The suite's own Hub and its guard against the network: imported by conftest.py before any Hugging Face library."""

import atexit
import os
import shutil
import socket
import tempfile
from typing import Any

from tests.hub_server import HubServer

HUB = HubServer()  # its port is taken now; it answers once a test asks for the fixture `hub`
HOME = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(HUB.stop)
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HOME,  # neither the token nor the caches of who runs the tests
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would call s3.amazonaws.com
}
os.environ.pop("HF_TOKEN", None)

ESCAPES: list[str] = []  # the addresses outside this machine that the running test has asked for
_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _check(host: object) -> None:
    host = host.decode() if isinstance(host, bytes) else host
    here = (None, "", "localhost", "::", "::1", "0.0.0.0", socket.gethostname(), socket.getfqdn())
    if host not in here and not str(host).startswith("127."):
        ESCAPES.append(str(host))
        raise ConnectionRefusedError(f"a test reached for {host}; only the loopback interface is open to tests")


def guard_sockets() -> None:
    """From now on Python's sockets of this process reach the loopback interface and local files only."""

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        _connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return _connect_ex(self, address)

    def getaddrinfo(host: Any, *arguments: Any, **named: Any) -> Any:
        _check(host)
        return _getaddrinfo(host, *arguments, **named)

    socket.socket.connect, socket.socket.connect_ex = connect, connect_ex  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = getaddrinfo
