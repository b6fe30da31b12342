"""Anything at all instead of a message, thousands of times: refused by name, and nothing is said or changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import RoundLost, ServerRound, Step, result


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` cut short, with bytes changed, put in or appended; or anything else."""
    match draw(st.sampled_from(["cut", "change", "insert", "append", "anything"])):
        case "cut":
            return data[: draw(st.integers(0, max(len(data) - 1, 0)))]
        case "change":
            place = draw(st.integers(0, len(data) - 1))
            new = draw(st.binary(min_size=1, max_size=4))
            return data[:place] + new + data[place + len(new) :]
        case "insert":
            place = draw(st.integers(0, len(data)))
            return data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
        case "append":
            return data + draw(st.binary(min_size=1, max_size=40))
        case _:
            return draw(st.binary(max_size=300))


FUZZ = settings(max_examples=500, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # on damaged certificates
@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.CONFIRM, Step.UNMASK])
def test_whatever_the_server_sends_clients_refuse_it_or_answer_once(step: Step, done: Any) -> None:
    request = done.server.request(step, "c00")
    template = done.before(step)
    secrets = [getattr(template._state, name) for name in ("mask_key", "share_key", "seed", "shares")]
    before = template._state.SerializeToString(deterministic=True)

    @FUZZ
    @given(damaged(request))
    def check(data: bytes) -> None:
        client = copy.copy(template)
        try:
            reply = done.ask(client, step, data)
        except MessageRejected as error:
            refusal = str(error)
        else:
            assert client.step is step
            assert done.ask(client, step, data) == reply
            return
        assert client._state.SerializeToString(deterministic=True) == before
        assert not any(secret and secret.hex() in refusal for secret in secrets)

    check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # on damaged certificates
@pytest.mark.parametrize("step", list(Step))
def test_whatever_a_client_sends_the_server_refuses_it_or_loses_no_more_than_the_round(step: Step, done: Any) -> None:
    expected = result(done.server).mean.values.tolist()

    @FUZZ
    @given(damaged(done.stored[step]["c01"]))
    def check(data: bytes) -> None:
        try:
            done.server.check(step, "c01", data, done.consortium.now)
        except MessageRejected:
            return
        stored = {**done.stored, step: {**done.stored[step], "c01": data}}
        server = ServerRound(done.setting, done.consortium.certificates, stored)
        try:
            outcome = result(server)
        except RoundLost:
            return
        # A client may put in what it likes, within the clip: its own masked vector is the one thing it can change.
        if step is Step.MASK:
            assert np.abs(outcome.mean.values).max() <= 1 + server.encoding.error_bound(4)
        else:
            assert outcome.mean.values.tolist() == expected

    check()
