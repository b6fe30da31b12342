"""Errors across gRPC: what is raised on one side is raised on the other, and nothing else gets through."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from pfedsecure import errors
from pfedsecure.errors import MessageRejected, NotAMember, PfedError, ServerUnreachable
from pfedsecure.wire.status import ERROR_KEY, MAX_DETAIL_CHARS, abort, abort_code, error_raised_by_server, raise_from

from .conftest import call_error

TRAVELLING = {
    "IdentityError",
    "InsecureTransport",
    "MessageRejected",
    "NameTaken",
    "NotAMember",
    "PlanMismatch",
    "ServerUnreachable",
    "TooManyCalls",
}
ALL = PfedError.__subclasses__()


class Failing(grpc.GenericRpcHandler):
    """A service whose only answer is an error."""

    def __init__(self, error: PfedError) -> None:
        self._error = error

    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def behaviour(_request: bytes, context: Any) -> bytes:
            await abort(context, self._error)

        return grpc.unary_unary_rpc_method_handler(behaviour)


async def sent(error: PfedError) -> grpc.aio.AioRpcError:
    """What a client of gRPC gets when a server aborts a call with `error`."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Failing(error),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/test/Fail")(b"")
            return caught.value
    finally:
        await server.stop(None)


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls.__name__ in TRAVELLING])
async def test_an_error_about_the_call_is_raised_again_on_the_other_side(cls: type[PfedError]) -> None:
    error = await sent(cls("what is wrong; Größe × 3; what to do"))
    assert error.code() is not grpc.StatusCode.INTERNAL
    assert error_raised_by_server(error) == cls.__name__
    with pytest.raises(cls) as caught:
        raise_from(error)
    assert str(caught.value) == "what is wrong; Größe × 3; what to do"
    assert type(caught.value) is cls
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls.__name__ not in TRAVELLING])
def test_other_errors_stay_on_the_server(cls: type[PfedError]) -> None:
    assert abort_code(cls("the disk is full")) is grpc.StatusCode.INTERNAL


def test_statuses_tell_the_classes_apart_for_other_clients() -> None:
    codes = {name: abort_code(getattr(errors, name)("")) for name in TRAVELLING}
    assert codes["MessageRejected"] is grpc.StatusCode.INVALID_ARGUMENT
    assert codes["ServerUnreachable"] is grpc.StatusCode.UNAVAILABLE  # what clients of gRPC try again
    assert codes["IdentityError"] is grpc.StatusCode.UNAUTHENTICATED
    assert len(set(codes.values())) == len(TRAVELLING) - 1  # InsecureTransport is about the identity as well


async def test_long_messages_are_cut_to_what_headers_can_carry() -> None:
    error = await sent(MessageRejected("x" * 100_000))
    assert error.details() == "x" * MAX_DETAIL_CHARS


@pytest.mark.parametrize(
    ("code", "cls", "message"),
    [
        (grpc.StatusCode.UNAVAILABLE, ServerUnreachable, "cannot be reached or does not answer (words)"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ServerUnreachable, "cannot be reached or does not answer (words)"),
        (grpc.StatusCode.CANCELLED, ServerUnreachable, "cannot be reached or does not answer (words)"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, MessageRejected, "over the size limit, or the server is overloaded"),
        (grpc.StatusCode.UNIMPLEMENTED, PfedError, "use the same version on both sides"),
        (grpc.StatusCode.INTERNAL, PfedError, "the server failed while it answered (INTERNAL); its log says why"),
        (grpc.StatusCode.UNKNOWN, PfedError, "the server failed while it answered (UNKNOWN); its log says why"),
    ],
)
def test_failures_of_the_transport_have_a_class_of_their_own(
    code: grpc.StatusCode, cls: type[PfedError], message: str
) -> None:
    assert error_raised_by_server(call_error(code)) is None
    with pytest.raises(PfedError) as caught:
        raise_from(call_error(code))
    assert type(caught.value) is cls
    assert message in str(caught.value)


def test_a_class_of_a_newer_server_is_still_an_error_with_its_message() -> None:
    with pytest.raises(PfedError, match="words") as caught:
        raise_from(call_error(grpc.StatusCode.INVALID_ARGUMENT, "words", (ERROR_KEY, "BudgetSpent")))
    assert type(caught.value) is PfedError


async def test_a_refusal_that_its_caller_does_not_wait_for_any_more_is_a_call_that_was_cancelled() -> None:
    """And not an error of the server, which gRPC would log with all that led to it."""
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    class Late(grpc.GenericRpcHandler):
        def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            async def behaviour(_request: bytes, context: Any) -> bytes:
                started.set_result(None)
                with suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                try:
                    await abort(context, NotAMember("gone"))
                except BaseException as error:
                    ended.set_result(error)
                    raise

            return grpc.unary_unary_rpc_method_handler(behaviour)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Late(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/test/Call")(b"")
        await started
        call.cancel()
        assert isinstance(await asyncio.wait_for(ended, 10), asyncio.CancelledError)
    await server.stop(None)
