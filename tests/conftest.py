"""Loaded before every test module: some of them import gRPC, which must find its settings."""

import pfedsecure.wire.grpc_settings  # noqa: F401
