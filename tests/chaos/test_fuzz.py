"""The fuzzer reaches every call with all kinds of messages, and finds a server that breaks."""

from __future__ import annotations

from collections import Counter

import pytest
from pfed_benchmarks.chaos.fuzz import Messages, fuzz, methods


def test_every_call_gets_messages_that_can_be_read_and_such_that_cannot() -> None:
    messages, found = Messages(1), Counter[tuple[str, bool]]()
    for method in methods():
        for _ in range(300):
            content = messages.message(method)
            try:
                method.input_type._concrete_class.FromString(content)
                found[method.name, True] += 1
            except Exception:
                found[method.name, False] += 1
    assert {name for name, _ in found} == {method.name for method in methods()}
    assert len(methods()) >= 16
    assert all(found[method.name, True] > 30 for method in methods())


@pytest.mark.slow
def test_a_server_answers_whatever_it_is_sent() -> None:
    found = fuzz(3000, seed=2)
    assert (found.problem, found.answered) == (None, 3000)
    assert {"INVALID_ARGUMENT", "OK", "PERMISSION_DENIED"} <= found.codes.keys()
