"""What goes over the network between server and clients: transport, identity of the caller, messages."""

import pfedsecure.wire.grpc_settings  # noqa: F401 - must run before any module of this package imports grpc
