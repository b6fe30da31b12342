"""PfedErrors across gRPC: the class travels by name in the trailing metadata, the message as the status details.

Only errors about the call itself travel, and ServerUnreachable from a server that cannot answer for the moment.
Anything else that goes wrong there reaches the caller as INTERNAL without a word of detail; the server's log has it.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc
import grpc.aio

from pfedsecure.errors import (
    IdentityError,
    InsecureTransport,
    MessageRejected,
    NameTaken,
    NotAMember,
    PfedError,
    PlanMismatch,
    ServerUnreachable,
    TooManyCalls,
    by_wire_code,
)

ERROR_KEY = "pfed-error"
"""Trailing metadata: the error's wire code."""

MAX_DETAIL_CHARS = 1000
"""Status details share gRPC's 8 KiB of headers with the rest."""

_TRAVELLING: dict[type[PfedError], grpc.StatusCode] = {
    IdentityError: grpc.StatusCode.UNAUTHENTICATED,
    InsecureTransport: grpc.StatusCode.UNAUTHENTICATED,
    MessageRejected: grpc.StatusCode.INVALID_ARGUMENT,
    NameTaken: grpc.StatusCode.ALREADY_EXISTS,
    NotAMember: grpc.StatusCode.PERMISSION_DENIED,
    PlanMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    ServerUnreachable: grpc.StatusCode.UNAVAILABLE,
    TooManyCalls: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def abort_code(error: PfedError) -> grpc.StatusCode:
    """The gRPC status for an error raised while serving a call; INTERNAL when the caller must not see it."""
    return _TRAVELLING.get(type(error), grpc.StatusCode.INTERNAL)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: PfedError) -> NoReturn:
    """End a call with an error whose `abort_code` is not INTERNAL, as `end`."""
    await end(context, abort_code(error), str(error)[:MAX_DETAIL_CHARS], ((ERROR_KEY, error.wire_code()),))


async def end(
    context: grpc.aio.ServicerContext[Any, Any],
    code: grpc.StatusCode,
    details: str = "",
    trailing_metadata: tuple[tuple[str, str], ...] = (),
) -> NoReturn:
    """End a call. Raises CancelledError where the caller has hung up just now.

    gRPC would write a page into the log otherwise, which anybody could have filled by hanging up at the right moments.
    """
    try:
        await context.abort(code, details, trailing_metadata)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def error_raised_by_server(rpc_error: grpc.aio.AioRpcError) -> str | None:
    """The wire code of the error that the server itself raised; None when the transport failed."""
    metadata: Any = rpc_error.trailing_metadata() or ()
    return dict(metadata).get(ERROR_KEY)


def raise_from(rpc_error: grpc.aio.AioRpcError) -> NoReturn:
    """Raise what the server raised, or what the transport's own failure means.

    ServerUnreachable: no connection, no answer in time, or a server that cannot answer for the moment; worth a retry.
    MessageRejected: a message over the size limit. PfedError: the server failed inside, or does not know the call.
    """
    code, details = rpc_error.code(), rpc_error.details() or "no details"
    wire_code = error_raised_by_server(rpc_error)
    if wire_code is not None:
        raise by_wire_code(wire_code)(details) from None
    match code:
        # CANCELLED is the server's doing: it is going down. A call that this side cancels does not end here.
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            raise ServerUnreachable(f"the server cannot be reached or does not answer ({details})") from None
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise MessageRejected(
                f"a message is over the size limit, or the server is overloaded ({details})"
            ) from None
        case grpc.StatusCode.UNIMPLEMENTED:
            raise PfedError("the server does not know this call; use the same version on both sides") from None
        case _:
            raise PfedError(f"the server failed while it answered ({code.name}); its log says why") from None
