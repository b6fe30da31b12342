from __future__ import annotations

import pytest

from pfedsecure.errors import InsecureTransport
from pfedsecure.wire.loopback import is_loopback, require_loopback


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost", "127.0.0.1", "127.8.9.10", "::1", "[::1]", "::ffff:127.0.0.1"]
)
def test_this_machine(host: str) -> None:
    assert is_loopback(host)
    require_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "::", "[::]", "10.0.0.1", "example.org", "localhost.example.org", "127.0.0.1.nip.io", "127.1",
     "::ffff:10.0.0.1", "fe80::1", "2130706433"],
)  # fmt: skip
def test_everything_else(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(InsecureTransport, match=r"--insecure would send plain text to or from .*: leave it off"):
        require_loopback(host)
