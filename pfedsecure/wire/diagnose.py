"""Why a connection failed. gRPC says UNAVAILABLE for everything; one plain TLS handshake tells the causes apart."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime

from pfedsecure.errors import IdentityError, InsecureTransport, PfedError, ServerUnreachable
from pfedsecure.pki.certificates import fingerprint, to_pem, verify
from pfedsecure.pki.identity import Identity

_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with empty SETTINGS
_SETTINGS_FRAME = 4  # type, the fourth octet, of the first frame that an HTTP/2 server sends

# OpenSSL's verify codes: stable numbers, its X509_V_ERR_*, that Python's ssl has no names for.
_WRONG_HOST = "is for other hosts: connect to a name that it is for, or have one approved for this name"
_REFUSALS = {
    9: "is not valid yet: check the clocks of both sides",
    10: "has expired: its operator must have a new one approved",
    26: "is not a server's: another party answers there, do not trust it",
    62: _WRONG_HOST,  # a name
    64: _WRONG_HOST,  # an address
}

# TLS alerts about our certificate (RFC 8446, section 6.2), under OpenSSL's names. gRPC's own server sends none and
# just closes; other TLS stacks in front of a server do send them.
_ALERTS = {
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired by the server's clock, request a new one",
    "TLSV1_ALERT_UNKNOWN_CA": "it is of an authority that the server does not trust, request one of the server's",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it did not arrive, check what stands between this client and the server",
}


def explain_connection_failure(host: str, port: int, identity: Identity | None, *, timeout: float = 5.0) -> PfedError:
    """The most likely cause why gRPC could not call the server at `host`:`port`, as an error to raise.

    `identity`: what the client connected with; None for a client in plain text. Connects up to twice, blocking for
    at most `timeout` seconds at each step: call it from a thread. Sends nothing but a handshake.

    ServerUnreachable: the name does not resolve, nothing listens, no answer, or a fault that is no longer there.
    InsecureTransport: one side speaks TLS 1.3 and the other does not.
    IdentityError: the certificate of the server or of this client is expired, of another authority or refused.
    """
    where = f"{host}:{port}"
    try:
        if identity is None:
            return _explain_plain_text(host, port, timeout)
        return _explain_tls(host, port, identity, timeout)
    except socket.gaierror:
        return ServerUnreachable(f"host {host} is not known: correct the server's name or the network's name service")
    except ConnectionRefusedError:
        return ServerUnreachable(f"nothing listens at {where}: start pfed-server there, or correct the address")
    except TimeoutError:
        return ServerUnreachable(f"{where} does not answer within {timeout:g} s: check the address and the firewalls")
    except OSError as error:
        return ServerUnreachable(f"cannot connect to {where} ({error.strerror or error}): check address and network")


def _explain_tls(host: str, port: int, identity: Identity, timeout: float) -> PfedError:
    where = f"{host}:{port}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=to_pem(identity.authority).decode())
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(identity.certificate_path, identity.key_path)
    except OSError:
        return IdentityError(f"key or certificate in {identity.folder} cannot be used any more: restore them")
    with socket.create_connection((host, port), timeout=timeout) as connection:
        try:
            secure = context.wrap_socket(connection, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            return _server_certificate_refused(host, port, identity, error.verify_code)
        except (ssl.SSLError, ConnectionResetError):
            secure = None
        if secure is not None:
            with secure:
                return _own_certificate_judged(secure, where, identity)
    if _speaks_plain_http2(host, port, timeout):
        return InsecureTransport(
            f"server {where} speaks plain text, this client TLS: start the server with --tls, "
            "or on one machine this client with --insecure"
        )
    return InsecureTransport(f"{where} does not speak TLS 1.3: check that a pfed-server with --tls runs there")


def _own_certificate_judged(secure: ssl.SSLSocket, where: str, identity: Identity) -> PfedError:
    # In TLS 1.3 a client is done before the server looks at its certificate: the verdict comes with the first read.
    alert: str | None = None
    try:
        accepted = secure.recv(1) != b""
    except ssl.SSLError as error:
        accepted, alert = False, error.reason
    except ConnectionResetError:
        accepted = False
    if accepted:
        return ServerUnreachable(f"server {where} accepts this client's certificate, yet the call failed: try again")
    subject = identity.subject
    refused = f"server {where} refused the certificate of {subject.role} {subject.name}"
    if alert in _ALERTS:
        return IdentityError(f"{refused}: {_ALERTS[alert]}")
    try:
        verify(identity.certificate, identity.authority, datetime.now(UTC))
    except IdentityError as error:
        return error
    return IdentityError(
        f"{refused} without a reason: compare authority and clock of both sides with `pfed pki show {identity.folder}`"
    )


def _server_certificate_refused(host: str, port: int, identity: Identity, verify_code: int) -> PfedError:
    authority = fingerprint(identity.authority.public_key())[:16]
    why = _REFUSALS.get(
        verify_code,
        f"is not of authority {authority}, which {identity.folder} trusts: "
        "check the address, or install a kit of the server's federation",
    )
    return IdentityError(f"certificate of server {host}:{port} {why}")


def _explain_plain_text(host: str, port: int, timeout: float) -> PfedError:
    where = f"{host}:{port}"
    if _speaks_plain_http2(host, port, timeout):
        return ServerUnreachable(f"server {where} answers in plain text, yet the call failed: try again")
    if _speaks_tls(host, port, timeout):
        return InsecureTransport(f"server {where} speaks TLS, this client plain text: leave --insecure off")
    return ServerUnreachable(f"{where} speaks neither gRPC nor TLS: check that a pfed-server runs there")


def _speaks_plain_http2(host: str, port: int, timeout: float) -> bool:
    with socket.create_connection((host, port), timeout=timeout) as connection:
        try:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(4)
        except ConnectionError:
            return False
    return len(answer) == 4 and answer[3] == _SETTINGS_FRAME


def _speaks_tls(host: str, port: int, timeout: float) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the question is only whether this is TLS; nothing is sent over it
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=timeout) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return True
    except (ssl.SSLError, ConnectionResetError):
        return False
