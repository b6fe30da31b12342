"""Settings that gRPC reads from the environment, once, while it is first imported.

Import this module before `grpc`: the packages that use gRPC do so in their `__init__`. `require_tls13_only` tells when
somebody came first.

TLS 1.3 only: gRPC's Python API has no minimum version. But its list of TLS 1.2 cipher suites can be set (those of TLS
1.3 are not in that list and always on), and each TLS 1.2 suite names the kind of certificate it works with. A list of
nothing but ECDHE-RSA suites can never be agreed on with certificates that are all ECDSA, as `pki.keys` makes sure, so
that every TLS 1.2 handshake ends with "no shared cipher". An empty or TLS 1.3 list would not do: gRPC refuses both.
"""

from __future__ import annotations

import os
import sys

_CIPHER_SUITES = "GRPC_SSL_CIPHER_SUITES"
_ONLY_FOR_RSA = "ECDHE-RSA-AES256-GCM-SHA384"

_in_time = "grpc" not in sys.modules or os.environ.get(_CIPHER_SUITES) == _ONLY_FOR_RSA
os.environ[_CIPHER_SUITES] = _ONLY_FOR_RSA

# A refused handshake is told to the user by wire.diagnose, in words; gRPC's own lines can be had by setting this.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def require_tls13_only() -> None:
    """Raises RuntimeError if gRPC was imported before this module, so that it would also speak TLS 1.2."""
    if not _in_time:
        raise RuntimeError("import pfedsecure.wire.grpc_settings before grpc: gRPC has already chosen its TLS versions")
