"""A client of a federation: trains on private images, and lets out only what the plan says."""

import pfedsecure.wire.grpc_settings  # noqa: F401 - before anything here imports grpc
