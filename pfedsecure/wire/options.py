"""gRPC options of both sides: small messages, and a silent connection is found out."""

from __future__ import annotations

from pfedsecure.wire.payloads import MAX_MESSAGE_BYTES

CLAIMED_NAME_KEY = "pfed-claimed-name"
"""Request metadata with the caller's name where there is no certificate (`--insecure`); ignored under TLS."""

CLAIMED_ROLE_KEY = "pfed-claimed-role"
"""Request metadata with the caller's role where there is no certificate; `client` when absent."""

HANDSHAKE_SECONDS = 20
"""A connection that has not proved a certificate by then is closed."""

IDLE_SECONDS = 300
"""A connection without a call for so long is closed; a client opens another when it has something to say."""

MOST_CONNECTIONS = 2048
"""Of a server unless its operator says otherwise, all callers together; further ones are closed at once. A thousand
clients have a second connection each while they take up a renewed certificate, and operators want in too."""

_CONNECTIONS_OPTION = "grpc.max_allowed_incoming_connections"
_KEEPALIVE_MS = 20_000
_KEEPALIVE_TIMEOUT_MS = 10_000

_BOTH_SIDES: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS = _BOTH_SIDES

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_BOTH_SIDES,
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    # A client needs a handful: a long poll, an upload, a heartbeat.
    ("grpc.max_concurrent_streams", 16),
    # Memory for those who never finish: a handshake, the settings after it, or anything at all with a connection.
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
    ("grpc.http2.settings_timeout", HANDSHAKE_SECONDS * 1000),
    ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
    (_CONNECTIONS_OPTION, MOST_CONNECTIONS),
    # Otherwise a second server on the same port would silently share its clients.
    ("grpc.so_reuseport", 0),
)


def with_connections(options: tuple[tuple[str, int], ...], connections: int) -> list[tuple[str, int]]:
    """A server's options with another limit of connections."""
    return [(name, connections if name == _CONNECTIONS_OPTION else value) for name, value in options]
