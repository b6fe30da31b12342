"""Where the processor time of a simulation goes: by what a thread works on, while this is watching."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

PARTS = ("training", "matching", "aggregation", "store", "other")

_BY_THREAD = {"training": "training", "matching": "matching", "encrypted matching": "matching"}
"""Part by the name of an executor, up to the first of these that it begins with."""
_BY_MODULE = {
    "pfedsecure.matching": "matching",
    "pfedsecure.experts": "matching",
    "pfed_client.exchange": "matching",
    "pfed_server.lending": "matching",
    "pfedsecure.aggregation": "aggregation",
    "pfedsecure.secagg": "aggregation",
    "pfed_client.contributing": "aggregation",
    "pfed_server.aggregating": "aggregation",
    "pfed_server.sql_store": "store",
}
"""Part by the module of what is computed in a thread of the event loop's own."""


@contextmanager
def watching() -> Iterator[dict[str, float]]:
    """Processor seconds by part of PARTS, complete once the block is left; `other` is the rest of this process.

    Matching has the sealing of experts in it. Of torch's own threads, where there are several, the work is in `other`.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    lock = threading.Lock()
    submit = ThreadPoolExecutor.submit

    def submitted(self: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        part = part_of(str(self._thread_name_prefix), function)
        if part is None:
            return submit(self, function, *args, **named)

        def timed() -> Any:
            started = time.thread_time()
            try:
                return function(*args, **named)
            finally:
                with lock:
                    seconds[part] += time.thread_time() - started

        return submit(self, timed)

    started = time.process_time()
    ThreadPoolExecutor.submit = submitted  # type: ignore[method-assign,assignment]
    try:
        yield seconds
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
        whole = time.process_time() - started
        seconds["other"] = max(whole - sum(seconds.values()), 0.0)


def part_of(executor: str, function: Callable[..., Any]) -> str | None:
    """What `function` counts as in the thread of an executor of that name; None: as nothing of its own."""
    for prefix, part in _BY_THREAD.items():
        if executor.startswith(prefix):
            return part
    while isinstance(function, partial):
        # `asyncio.to_thread` gives a partial of a context's `run`, whose first argument is what to run.
        runs = getattr(function.func, "__name__", "") == "run" and bool(function.args)
        function = function.args[0] if runs else function.func
    module = getattr(function, "__module__", None) or ""
    return next((part for prefix, part in _BY_MODULE.items() if module.startswith(prefix)), None)
