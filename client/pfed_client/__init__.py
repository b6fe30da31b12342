"""The client of a federation: it joins, trains its prompt and private gate, and keeps what it learned."""

import pfedsecure.wire.grpc_settings  # noqa: F401 - must run before any module of this package imports grpc
