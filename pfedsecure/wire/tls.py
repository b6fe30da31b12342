"""Mutual TLS 1.3 for gRPC from an identity: both sides show a certificate of the same authority, or nothing passes.

Guaranteed against the network: confidentiality, integrity, forward secrecy, and that the other side holds the key of
an unexpired certificate of the identity's authority, used in its own direction (a client's certificate is no server's)
and, towards the server, for the host that was dialled. Names, roles and expiry during a connection are the business
of `wire.peer`. That TLS 1.2 cannot be agreed on is explained in `wire.grpc_settings`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import grpc

from pfedsecure.errors import IdentityError
from pfedsecure.pki.certificates import to_pem
from pfedsecure.pki.current import CurrentIdentity
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.grpc_settings import require_tls13_only

_logger = logging.getLogger(__name__)


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Credentials of a server that refuses every client without a certificate of `identity.authority`.

    A new certificate or key in the identity's folder is used from the next connection on, without a restart; one that
    is not acceptable is logged once and the old one stays. Raises IdentityError when the key cannot be read.
    """
    require_tls13_only()
    # The type stubs leave out that None, for "no change", may be returned; gRPC's documentation says so.
    reloader = cast("Callable[[], grpc.ServerCertificateConfiguration]", _Reloader(identity))
    return grpc.dynamic_ssl_server_credentials(_configuration(identity), reloader, require_client_authentication=True)


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Credentials of a client: trusts `identity.authority` alone and shows the identity's certificate.

    Raises IdentityError when the key cannot be read.
    """
    require_tls13_only()
    return grpc.ssl_channel_credentials(
        root_certificates=to_pem(identity.authority),
        private_key=identity.private_key_pem(),
        certificate_chain=to_pem(identity.certificate),
    )


class _Reloader:
    """Asked by gRPC before every handshake, on threads of gRPC's own; None means no change."""

    def __init__(self, identity: Identity) -> None:
        self._current = CurrentIdentity(identity, _logger)
        self._shown = self._told = identity

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        identity = self._current()
        if identity is self._shown:
            return None
        try:
            configuration = _configuration(identity)
        except IdentityError as error:
            if identity is not self._told:
                self._told = identity
                _logger.warning("keeping the old server certificate, the new one cannot be used: %s", error)
            return None
        self._shown = identity
        return configuration


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(identity.private_key_pem(), to_pem(identity.certificate))], root_certificates=to_pem(identity.authority)
    )
