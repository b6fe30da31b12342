"""The audit log: who changes it is found out, a crash is told from that, and floods of callers do not fill the disk."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pfed_server import audit
from pfed_server.audit import AUDIT_FILE, LINES_A_PEER, REFUSED_LINES, WINDOW_SECONDS, AuditLog, Bounded
from pfed_server.audit_chain import TORN, head_of, verify
from pfed_server.events import Event, joined, left, refused
from pfedsecure.errors import AuditError, StateError

Attack = Callable[[list[bytes]], list[bytes]]


def written(folder: Path, lines: int = 6) -> Path:
    with closing(AuditLog.open(folder)) as log:
        for number in range(lines):
            log.record(joined(f"client-{number}", "f" * 64))
    return folder / AUDIT_FILE


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def edit(lines: list[bytes]) -> list[bytes]:
    lines[2] = lines[2].replace(b"client-2", b"client-9")
    return lines


def edit_its_own_link_too(lines: list[bytes]) -> list[bytes]:
    """Changes a line and mends the link of the next one: the one after that gives it away."""
    lines = edit(lines)
    values = json.loads(lines[3]) | {"previous": head_of(lines[2].rstrip(b"\n"))}
    lines[3] = json.dumps(values, separators=(",", ":")).encode() + b"\n"
    return lines


def insert(lines: list[bytes]) -> list[bytes]:
    values = json.loads(lines[2]) | {"peer": "mallory", "previous": head_of(lines[1].rstrip(b"\n"))}
    return [*lines[:2], json.dumps(values, separators=(",", ":")).encode() + b"\n", *lines[2:]]


def garble(lines: list[bytes]) -> list[bytes]:
    lines[2] = lines[2][:-20] + b"\n"
    return lines


@pytest.mark.parametrize(
    ("attack", "line"),
    [
        pytest.param(edit, 4, id="edit"),
        pytest.param(edit_its_own_link_too, 5, id="edit and mend one link"),
        pytest.param(insert, 4, id="insert"),
        pytest.param(lambda lines: lines[:2] + lines[3:], 3, id="delete"),
        pytest.param(lambda lines: lines[1:], 1, id="delete the first"),
        pytest.param(lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3, id="reorder"),
        pytest.param(lambda lines: [*lines[:3], lines[2], *lines[3:]], 4, id="repeat"),
        pytest.param(garble, 3, id="garble"),
    ],
)
def test_who_changes_the_log_is_found_out_at_that_line(tmp_path: Path, attack: Attack, line: int) -> None:
    path = written(tmp_path)
    assert verify(path).lines == 6
    path.write_bytes(b"".join(attack(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(AuditError, match=rf"audit\.jsonl: line {line} .+; (lines 1 to {line - 1} hold, )?do not trust"):
        verify(path)
    before = path.read_bytes()
    with pytest.raises(AuditError, match=rf"line {line} .+; keep the file, and move it away to have the server start"):
        AuditLog.open(tmp_path)
    assert path.read_bytes() == before


def test_a_missing_end_shows_only_to_who_noted_a_head(tmp_path: Path) -> None:
    path = written(tmp_path)
    noted = verify(path).head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    assert verify(path).lines == 4
    with pytest.raises(AuditError, match=f"has no line with the head {noted[:12]} that was noted: its end was cut off"):
        verify(path, noted)


def test_a_log_made_anew_shows_only_to_who_noted_a_head(tmp_path: Path) -> None:
    path = written(tmp_path)
    noted = verify(path).head
    path.unlink()
    written(tmp_path)
    assert verify(path).lines == 6
    with pytest.raises(AuditError, match="or all of it was written anew"):
        verify(path, noted)


def test_a_noted_head_stays_good_as_the_log_grows(tmp_path: Path) -> None:
    noted = verify(written(tmp_path, 3)).head
    assert verify(written(tmp_path, 2), noted).after_noted == 2


def test_it_goes_on_after_a_restart_for_its_owner_alone(tmp_path: Path) -> None:
    path = written(written(tmp_path, 2).parent, 3)
    assert [entry["number"] for entry in entries(path)] == [1, 2, 3, 4, 5]
    assert verify(path).lines == 5
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kept", ["one byte", "half", "all but the last"])
def test_a_line_that_a_crash_cut_short_stays_and_is_marked(tmp_path: Path, kept: str) -> None:
    path = written(tmp_path, 3)
    last = path.read_bytes().splitlines(keepends=True)[-1]
    size = {"one byte": 1, "half": len(last) // 2, "all but the last": len(last) - 2}[kept]
    whole = path.read_bytes()[: -len(last)]
    path.write_bytes(whole + last[:size])
    assert verify(path).torn == (3,)
    written(tmp_path, 1)
    verdict = verify(path)
    assert (verdict.lines, verdict.torn) == (4, (3,))
    assert path.read_bytes().startswith(whole + last[:size] + b"\n")
    marker = json.loads(path.read_bytes().splitlines()[3])
    assert marker["event"] == TORN
    assert marker["details"]["bytes"] == size


def test_a_line_that_lacks_its_end_alone_gets_it(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    assert (verify(path).lines, verify(path).torn) == (3, ())
    AuditLog.open(tmp_path).close()
    assert path.read_bytes() == before


def test_a_crash_while_that_is_marked_is_marked_too(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-10])
    cut = path.read_bytes()
    AuditLog.open(tmp_path).close()
    marked = path.read_bytes()
    for size in range(len(cut), len(marked)):
        path.write_bytes(marked[:size])
        AuditLog.open(tmp_path).close()
        verdict = verify(path)
        assert (verdict.lines, verdict.torn) == (3, (3,)), size


def test_the_mark_of_a_crash_does_not_cover_a_changed_line(tmp_path: Path) -> None:
    """Whoever garbles a line in the middle and writes a mark behind it breaks the chain all the same."""
    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    cut = lines[2][:-20]
    mark = json.loads(lines[3]) | {
        "number": 3,
        "previous": head_of(cut),
        "event": TORN,
        "details": {"bytes": len(cut), "after": head_of(lines[1].rstrip(b"\n"))},
    }
    del mark["peer"]
    path.write_bytes(b"".join([*lines[:2], cut + b"\n", json.dumps(mark).encode() + b"\n", *lines[3:]]))
    with pytest.raises(AuditError, match="line 4 does not follow"):
        verify(path)


def test_what_is_left_of_a_line_cannot_be_changed_once_it_is_marked(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-30])
    written(tmp_path, 1)
    assert verify(path).torn == (3,)
    path.write_bytes(path.read_bytes().replace(b"client-2", b"client-9"))
    with pytest.raises(AuditError, match="line 3 cannot be read"):
        verify(path)


def test_what_a_full_disk_kept_out_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, attempts = True, 0
    write = os.write

    def partly(descriptor: int, data: bytes) -> int:
        nonlocal attempts
        attempts += 1
        if full:
            write(descriptor, bytes(data)[:30])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with closing(AuditLog.open(tmp_path)) as log:
        log.record(joined("anna", "f" * 64))
        with monkeypatch.context() as patch:
            patch.setattr(audit.os, "write", partly)
            patch.setattr(audit, "MAX_WAITING", 2)
            for name in ("bert", "cleo", "dora"):
                log.record(left(name))
            assert (log.lines, attempts) == (1, 1)  # not with each of what may be thousands of refused calls
            full = False
            log.record(left("emil"))
            assert log.lines == 1
            monkeypatch.setattr(log, "_try_again", 0.0)
            log.record(left("fritz"))
            assert log.lines == 4
    path = tmp_path / AUDIT_FILE
    assert [(entry["event"], entry.get("peer")) for entry in entries(path)] == [
        ("joined", "anna"),
        ("left", "bert"),
        ("left", "cleo"),
        ("lost", None),
    ]
    assert entries(path)[-1]["details"] == {"events": 3}
    assert verify(path).lines == 4


def test_a_flood_of_refused_callers_takes_a_bounded_number_of_lines() -> None:
    now = 0.0
    bounded = Bounded(lambda: now)
    lines: list[Event] = []

    def refuse(name: str, reason: str = "IdentityError") -> None:
        lines.extend(bounded.admit(refused("/x", reason, "go away", name, name * 2, "127.0.0.1")))

    for _ in range(1000):
        refuse("mallory")
    assert len(lines) == 1  # the same caller for the same reason
    for number in range(1000):
        refuse(f"m{number}")
    assert len(lines) == REFUSED_LINES
    assert bounded.admit(Event("round-opened", round=1)) == [Event("round-opened", round=1)]
    now += WINDOW_SECONDS
    refuse("mallory")
    assert lines[-2] == Event("repeated", details={"refused IdentityError": 2000 - REFUSED_LINES})
    assert lines[-1].peer == "mallory"


def test_one_member_that_joins_and_leaves_all_day_does_not_hide_others() -> None:
    bounded = Bounded(lambda: 0.0)
    lines = [event for _ in range(100) for event in bounded.admit(joined("mallory", "f" * 64))]
    assert len(lines) == LINES_A_PEER
    assert bounded.admit(joined("anna", "f" * 64))
    assert bounded.rest() == [Event("repeated", details={"joined": 100 - LINES_A_PEER})]


def test_writers_at_once_make_one_chain(tmp_path: Path) -> None:
    async def flood(log: AuditLog) -> None:
        await asyncio.gather(*(log.tell(left(f"client-{number}")) for number in range(50)))

    with closing(AuditLog.open(tmp_path)) as log:
        asyncio.run(flood(log))
    assert verify(tmp_path / AUDIT_FILE).lines == 50


def test_a_line_too_long_to_be_read_again_loses_its_details(tmp_path: Path) -> None:
    with closing(AuditLog.open(tmp_path)) as log:
        log.record(Event("round-closed", round=3, details={"culprits": ["x" * 64] * 4096}))
    (entry,) = entries(tmp_path / AUDIT_FILE)
    assert (entry["round"], entry["details"]) == (3, {"left_out": True})
    assert verify(tmp_path / AUDIT_FILE).lines == 1


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / AUDIT_FILE).mkdir()
    with pytest.raises(StateError, match=r"audit\.jsonl: cannot be written \(Is a directory\)"):
        AuditLog.open(tmp_path)
