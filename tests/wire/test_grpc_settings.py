from __future__ import annotations

import os
import subprocess
import sys

import pytest

# A server as in wire.tls, met by a client of Python's own ssl that offers TLS 1.2 alone. Prints what came of it.
_MEETING = """
import asyncio, ssl, socket, sys, tempfile
from pathlib import Path
import grpc
from pfedsecure.pki.certificates import to_pem
from pfedsecure.pki.development import enrol, ensure_development_pki

def meet(port, client):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=to_pem(client.authority).decode())
    context.load_cert_chain(client.certificate_path, client.key_path)
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        try:
            with context.wrap_socket(raw, server_hostname="localhost") as tls:
                return tls.version() if tls.recv(1) else "closed"
        except (ssl.SSLError, ConnectionResetError):
            return "refused"

async def main(folder):
    identity = ensure_development_pki(folder / "dev")
    client = enrol(folder / "dev", "alice", "client", folder / "alice")
    server = grpc.aio.server()
    pair = (identity.private_key_pem(), to_pem(identity.certificate))
    credentials = grpc.ssl_server_credentials([pair], to_pem(identity.authority), require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    print(await asyncio.to_thread(meet, port, client))
    await server.stop(None)

with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(Path(folder)))
"""

_TOO_LATE = """
import grpc
from pfedsecure.wire.grpc_settings import require_tls13_only
require_tls13_only()
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new process whose environment has none of gRPC's variables but those given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("first", "outcome"),
    [
        ("import grpc, pfedsecure.wire.grpc_settings", "TLSv1.2"),
        ("import pfedsecure.wire.grpc_settings, grpc", "refused"),
    ],
)
def test_tls_1_2_is_out_because_of_these_settings_and_only_in_time(first: str, outcome: str) -> None:
    done = python(first + _MEETING)
    assert done.stdout.strip() == outcome, done.stderr


def test_coming_too_late_is_noticed() -> None:
    done = python(_TOO_LATE)
    assert done.returncode != 0
    assert "RuntimeError: import pfedsecure.wire.grpc_settings before grpc" in done.stderr
    assert python("import pfedsecure.wire" + _TOO_LATE).returncode == 0


def test_a_laxer_value_from_outside_does_not_count() -> None:
    lax = {"GRPC_SSL_CIPHER_SUITES": "ECDHE-ECDSA-AES128-GCM-SHA256"}
    assert "RuntimeError" in python(_TOO_LATE, **lax).stderr
    show = "import os, pfedsecure.wire; print(os.environ['GRPC_SSL_CIPHER_SUITES'])"
    assert python(show, **lax).stdout == python(show).stdout


def test_grpc_keeps_quiet_unless_asked() -> None:
    show = "import os, pfedsecure.wire; print(os.environ['GRPC_VERBOSITY'])"
    assert python(show).stdout == "NONE\n"
    assert python(show, GRPC_VERBOSITY="DEBUG").stdout == "DEBUG\n"
