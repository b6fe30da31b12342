"""A call that is refused: log, metrics and audit log are told before the caller is."""

from __future__ import annotations

from collections.abc import Sequence

from pfed_server import events
from pfed_server.around import Call
from pfed_server.callers import caller_of
from pfed_server.observing import Calls
from pfed_server.refusal_log import RefusalLog
from pfedsecure.errors import PfedError, TooManyCalls
from pfedsecure.wire.peer import host_of


class Refusals:
    """`tell` hears of every call that is refused, `calls` count them."""

    def __init__(self, tell: events.Listener = events.nobody, calls: Sequence[Calls] = ()) -> None:
        self._tell = tell
        self._calls = calls
        self._log = RefusalLog()

    async def note(self, call: Call, error: PfedError) -> None:
        """A call ends with an error that is the caller's own. Nothing of it has been answered yet.

        What listens has heard of it on return; a caller that hangs up meanwhile does not keep it from that.
        """
        address = call.context.peer()
        if not isinstance(error, TooManyCalls):  # `admission` tells of those, and not of each
            self._log.tell(call.method, address, error)
        reason = error.wire_code()
        for calls in self._calls:
            calls.refused(reason)
        caller = caller_of(call.context)
        await self._tell(events.refused(call.method, reason, str(error), caller.name, caller.key, host_of(address)))
