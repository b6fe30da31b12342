"""A chain of rows: whatever is done to its bytes is noticed, or is what a crash leaves of a row that never was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfed_client.ledger.rows import NO_HEAD, Committed, Countersigned, Opened, Reserved, encode, head_of, read_chain
from pfedsecure.errors import LedgerError
from pfedsecure.privacy.events import GaussianRelease, SampledGaussianSteps

SIZE = GaussianRelease("number of training images", 0, 6.0)
TRAINING = SampledGaussianSteps("prompt and gate", 1, 2.0, 0.25, 10)
PATH = Path("ledger.jsonl")


def written() -> bytes:
    """A ledger with a row of every kind."""
    content, head, heads = b"", NO_HEAD, []
    rows = [
        lambda: Opened(images="a" * 64),
        lambda: Reserved(federation="f", client="c", event=SIZE),
        lambda: Reserved(federation="f", client="c", event=TRAINING, beside={"x": "b" * 64}),
        lambda: Countersigned(federation="f", client="c", head=heads[2], number=1, certificate="", signature=""),
        lambda: Committed(reservation=heads[2]),
    ]
    for row in rows:
        line = encode(row(), head)
        head = head_of(line[:-1])
        heads.append(head)
        content += line
    return content


CONTENT = written()
LINES = CONTENT.splitlines(keepends=True)


def test_what_was_written_is_read() -> None:
    chain = read_chain(CONTENT, PATH)
    assert chain.events == [SIZE, TRAINING]
    assert chain.size == len(CONTENT)
    assert chain.head == head_of(LINES[-1][:-1])
    assert [chain.position(head) for head in chain.heads] == list(range(5))
    assert chain.position(NO_HEAD) == -1
    assert chain.position("c" * 64) is None
    assert read_chain(b"", PATH).head == NO_HEAD


@given(st.integers(0, len(CONTENT) - 1))
def test_a_row_that_a_crash_cut_short_never_was(cut: int) -> None:
    """Any beginning of a ledger is read as the whole rows in it."""
    chain = read_chain(CONTENT[:cut], PATH)
    whole = CONTENT[:cut].count(b"\n")
    assert len(chain.rows) == whole
    assert CONTENT[: chain.size] == b"".join(LINES[:whole])


@given(st.integers(0, len(CONTENT) - 1), st.integers(0, 255))
def test_a_changed_byte_is_noticed_or_moves_the_head(at: int, byte: int) -> None:
    """In any line but the last it is noticed here; there by whoever knows the head."""
    changed = CONTENT[:at] + bytes([byte]) + CONTENT[at + 1 :]
    before = read_chain(CONTENT, PATH)
    try:
        after = read_chain(changed, PATH)
    except LedgerError:
        return
    assert changed == CONTENT or after.head != before.head
    assert after.heads[:4] == before.heads[:4]
    assert changed[: len(CONTENT) - len(LINES[-1])] == CONTENT[: -len(LINES[-1])]


@pytest.mark.parametrize("gone", range(len(LINES) - 1))
def test_a_line_that_is_gone_doubled_or_moved_is_noticed(gone: int) -> None:
    without = [*LINES[:gone], *LINES[gone + 1 :]]
    doubled = [*LINES[:gone], LINES[gone], *LINES[gone:]]
    moved = [*without, LINES[gone]]
    for lines in (without, doubled, moved):
        with pytest.raises(LedgerError, match=r"ledger\.jsonl: line \d .*; restore the newest copy"):
            read_chain(b"".join(lines), PATH)


def test_less_noise_or_fewer_steps_are_noticed() -> None:
    """Edited by hand, with everything else left as it was."""
    for field, value in (("steps", 1), ("noise_multiplier", 200.0), ("sample_rate", 0.01)):
        values = json.loads(LINES[2])
        values["row"]["event"][field] = value
        edited = json.dumps(values).encode() + b"\n"
        with pytest.raises(LedgerError, match="line 4 does not follow the line before it"):
            read_chain(b"".join([*LINES[:2], edited, *LINES[3:]]), PATH)


@pytest.mark.parametrize(("field", "value"), [("steps", -1), ("noise_multiplier", -2.0), ("sample_rate", 3.0)])
def test_numbers_that_no_mechanism_has_are_refused(field: str, value: float) -> None:
    """Also in the last row, which nothing follows that could tell."""
    values = json.loads(LINES[2])
    values["row"]["event"][field] = value
    with pytest.raises(LedgerError, match=r"line 3 cannot be read .*no mechanism has these numbers"):
        read_chain(b"".join([*LINES[:2], json.dumps(values).encode() + b"\n"]), PATH)


def test_a_newer_form_is_refused() -> None:
    line = LINES[0].replace(b'"format":1', b'"format":2')
    assert line != LINES[0]
    with pytest.raises(LedgerError, match="written by a newer version"):
        read_chain(line, PATH)
