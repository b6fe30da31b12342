"""The server of a federation: rounds, pool and state. It imports neither torch nor the client."""

import pfedsecure.wire.grpc_settings  # noqa: F401 - must run before any module of this package imports grpc
