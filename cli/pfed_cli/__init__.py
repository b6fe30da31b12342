"""The `pfed` command."""

import pfedsecure.wire.grpc_settings  # noqa: F401 - must run before any module of this package imports grpc
