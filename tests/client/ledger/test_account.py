"""What counts for which images, and what an account refuses to be read from."""

from __future__ import annotations

import multiprocessing
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pfed_client.ledger.account import Account
from pfed_client.ledger.budget import LedgerBudget
from pfedsecure.errors import BudgetExhausted, LedgerError, StateLocked
from pfedsecure.privacy.accountant import epsilon
from pfedsecure.privacy.events import Event, GaussianRelease

from .conftest import digests

DELTA = 1e-5


def folders(account: Account) -> list[Path]:
    return sorted(path for path in account.folder.iterdir() if path.is_dir())


def put_back(copy: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)


def test_events_are_granted_as_long_as_they_stay_within(open_account: Callable[..., Account], training: Any) -> None:
    account, size = open_account(), GaussianRelease("number", 0, 8.0)
    events: list[Event] = [size, training(1), training(2)]
    budget = LedgerBudget(account, epsilon(events, DELTA), DELTA)
    for event in events:
        budget.reserve(event).commit()
    assert account.read().events == events
    with pytest.raises(BudgetExhausted, match=r"prompt and gate of round 3, it would come to .*`pfed-client predict`"):
        budget.reserve(training(3))
    assert account.read().events == events  # nothing was paid


def test_what_was_reserved_is_spent_though_never_committed(open_account: Callable[..., Account], training: Any) -> None:
    """As after a crash in the middle of a training."""
    limit = epsilon([training(1), training(2)], DELTA)
    for number in (1, 2):
        LedgerBudget(open_account(), limit, DELTA).reserve(training(number))
    with pytest.raises(BudgetExhausted):
        LedgerBudget(open_account(), limit, DELTA).reserve(training(2))


def test_the_same_images_have_one_ledger_whoever_comes(
    open_account: Callable[..., Account], training: Any, allow: Any
) -> None:
    """Another federation, another client, another order, images twice."""
    open_account().reserve(training(1), allow)
    other = open_account([4, 3, 2, 1, 0, 0], federation="g", client="b")
    other.reserve(training(2), allow)
    assert open_account().read().events == [training(1), training(2)]
    assert len(folders(other)) == 1
    assert open_account(range(9, 12)).read().events == []


def test_one_image_in_common_is_enough(open_account: Callable[..., Account], training: Any, allow: Any) -> None:
    """One more image, or one less, does not make a fresh budget, and images pay for what they took part in."""
    few, more, apart = open_account(range(5)), open_account(range(4, 9)), open_account(range(5, 9))
    few.reserve(training(1), allow)
    assert more.read().events == [training(1)]
    more.reserve(training(2), allow)
    assert few.read().events == [training(1), training(2)]
    assert apart.read().events == [training(2)]
    with pytest.raises(BudgetExhausted):
        LedgerBudget(few, epsilon([training(1)] * 2, DELTA), DELTA).reserve(training(3))


def test_files_are_their_owners_alone_and_tell_no_image(
    open_account: Callable[..., Account], training: Any, allow: Any
) -> None:
    account = open_account()
    account.reserve(training(1), allow)
    files = [path for path in account.folder.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    content = b"".join(path.read_bytes() for path in files)
    assert not any(digest[:8] in content or digest[:8].hex().encode() in content for digest in digests(range(5)))


def test_a_ledger_beside_that_is_gone_or_older_is_noticed(
    open_account: Callable[..., Account], training: Any, allow: Any, tmp_path: Path
) -> None:
    """Its releases counted, and would not any more: whether this one was added to afterwards or not."""
    open_account(range(4, 9)).reserve(training(1), allow)
    (folder,) = folders(open_account())
    shutil.copytree(folder, tmp_path / "older")
    open_account().reserve(training(2), allow)
    open_account(range(4, 9)).reserve(training(3), allow)
    assert len(open_account().read().events) == 3
    shutil.copytree(folder, tmp_path / "newest")
    put_back(tmp_path / "older", folder)
    for images in (range(5), range(4, 9)):  # the one that was put back is told by its neighbour
        with pytest.raises(LedgerError, match=f"{folder.name}: gone, or an older copy"):
            open_account(images).read()
    shutil.rmtree(folder)
    with pytest.raises(LedgerError, match=f"{folder.name}: gone, or an older copy"):
        open_account().reserve(training(4), allow)
    shutil.copytree(tmp_path / "newest", folder)
    open_account().reserve(training(4), allow)


def test_two_ledgers_of_the_same_images_are_refused(
    open_account: Callable[..., Account], training: Any, allow: Any
) -> None:
    account = open_account()
    account.reserve(training(1), allow)
    (folder,) = folders(account)
    shutil.copytree(folder, folder.with_name("copy"))
    with pytest.raises(LedgerError, match=r"are both of these images; .* has more rows\)"):
        account.read()


@pytest.mark.parametrize("file", ["ledger.jsonl", "images.bin"])
def test_a_folder_that_is_not_whole_is_refused(
    open_account: Callable[..., Account], training: Any, allow: Any, file: str
) -> None:
    """Even if it may be of other images: without its two files nobody can tell."""
    account = open_account()
    account.reserve(training(1), allow)
    open_account(range(7, 9)).reserve(training(1), allow)
    for folder in folders(account):
        content = (folder / file).read_bytes()
        for spoilt in (content[:-1] + bytes([content[-1] ^ 1]), content[40:], b"", None):
            if spoilt is None:
                (folder / file).unlink()
            else:
                (folder / file).write_bytes(spoilt)
            if file == "ledger.jsonl" and spoilt is not None and spoilt[:40] == content[:40]:
                continue  # an end that a crash cut: the row never was, says test_rows
            with pytest.raises(LedgerError, match="; restore the newest copy"):
                account.read()
        (folder / file).write_bytes(content)
    account.read()


def test_a_signature_does_not_move_to_another_chain(
    open_account: Callable[..., Account], training: Any, allow: Any, members: Any, tmp_path: Path
) -> None:
    """Who edits a row and makes all later hashes anew has to leave the server's signatures out."""
    from pfed_client.ledger.rows import Countersigned, Reserved, encode, head_of, read_chain
    from pfedsecure.pki.countersignature import LedgerHead, countersign

    account = open_account()
    head = account.reserve(training(1), allow)
    made = countersign(members.server, LedgerHead("f", "a", 1, bytes.fromhex(head)))
    account.countersigned(head, 1, made.certificate, made.signature)
    assert account.read().events == [training(1)]
    (folder,) = folders(account)
    path = folder / "ledger.jsonl"
    chain = read_chain(path.read_bytes(), path)

    def forged(signed: bool) -> bytes:
        lines, heads = b"", [""]
        for row in chain.rows:
            if isinstance(row, Reserved):
                cheaper = row.event.__class__(**{**row.event.__dict__, "noise_multiplier": 50.0})
                row = row.model_copy(update={"event": cheaper})
            if isinstance(row, Countersigned):
                row = row.model_copy(update={"head": heads[-1]} if signed else {"head": heads[-1], "certificate": ""})
            line = encode(row, heads[-1])
            heads.append(head_of(line[:-1]))
            lines += line
        return lines

    path.write_bytes(forged(signed=True))
    with pytest.raises(LedgerError, match="line 3, a server's signature, is not good"):
        open_account().read()
    path.write_bytes(forged(signed=False))
    open_account().read()
    with pytest.raises(LedgerError, match="the server knows a row of a's ledger"):
        open_account().server_has(head)


def test_a_signature_is_for_a_row_before_it(
    open_account: Callable[..., Account], training: Any, allow: Any, members: Any
) -> None:
    """One that a server made for another ledger is not taken over, though it is good."""
    from pfedsecure.pki.countersignature import LedgerHead, countersign

    account = open_account()
    account.reserve(training(1), allow)
    made = countersign(members.server, LedgerHead("f", "a", 1, b"h" * 32))
    account.countersigned((b"h" * 32).hex(), 1, made.certificate, made.signature)
    with pytest.raises(LedgerError, match=r"line 3, a server's signature, is not good .it is of no row before it."):
        account.read()


def test_one_client_at_a_time(open_account: Callable[..., Account]) -> None:
    with open_account().held():
        with pytest.raises(StateLocked, match="another client on this machine takes part with the same images"):
            open_account(client="b").held().__enter__()
        with open_account(range(6, 8)).held():
            pass
    with open_account(client="b").held():
        pass


def spend(folder: Path, images: range, limit: float, granted: Any, together: Any) -> None:
    """In a process of its own: reserve until there is nothing left."""
    account = Account(folder, digests(images), federation="f", client="a")
    event = GaussianRelease("something", 1, 5.0)
    together.wait(120)
    try:
        while True:
            LedgerBudget(account, limit, DELTA).reserve(event)
            granted.put(1)
    except BudgetExhausted:
        granted.put(0)


def test_processes_that_share_a_ledger_spend_one_budget(open_account: Callable[..., Account]) -> None:
    """Also without `held`, and with images that only overlap: the rows are added one after the other."""
    event, count = GaussianRelease("something", 1, 5.0), 90
    limit = epsilon([event] * count, DELTA)
    context = multiprocessing.get_context("spawn")
    granted, together = context.Queue(), context.Barrier(3)
    processes = [
        context.Process(target=spend, args=(open_account().folder, images, limit, granted, together))
        for images in (range(5), range(5), range(4, 9))
    ]
    for process in processes:
        process.start()
    total, ended = 0, 0
    while ended < len(processes):
        answer = granted.get(timeout=200)
        total, ended = total + answer, ended + (not answer)
    for process in processes:
        process.join()
    assert total == count
    assert epsilon(open_account().read().events, DELTA) <= limit


def test_what_a_process_wrote_must_stay(
    open_account: Callable[..., Account], training: Any, allow: Any, tmp_path: Path
) -> None:
    """An older copy, or none, under a client that runs: the next look finds it, with or without a server."""
    account = open_account()
    account.reserve(training(1), allow)
    (folder,) = folders(account)
    shutil.copytree(folder, tmp_path / "older")
    account.reserve(training(2), allow)
    put_back(tmp_path / "older", folder)
    with pytest.raises(LedgerError, match="what this client released is not in the ledger"):
        account.reserve(training(3), allow)
    shutil.rmtree(account.folder)
    with pytest.raises(LedgerError, match="what this client released is not in the ledger"):
        account.read()
    with pytest.raises(LedgerError, match="what this client released is not in the ledger"):
        account.reserve(training(3), allow)  # and no new ledger is begun
    assert open_account().read().own is None


def test_a_promise_needs_its_own_row_and_not_one_that_looks_alike(
    open_account: Callable[..., Account], training: Any, allow: Any
) -> None:
    """As another federation with the same epsilon would have written it."""
    first = open_account()
    first.reserve(training(1), allow)
    promised = first.promise(8.0, DELTA)
    assert [row.epsilon for row in open_account().expect(promised).promises] == [8.0]
    shutil.rmtree(first.folder)
    second = open_account(federation="g")
    second.reserve(training(1), allow)
    second.promise(8.0, DELTA)
    with pytest.raises(LedgerError, match="what this client released is not in the ledger"):
        open_account().expect(promised)


def test_copies_that_go_on_by_themselves_have_no_head_in_common(
    open_account: Callable[..., Account], training: Any, allow: Any, tmp_path: Path
) -> None:
    """Two copies of a ledger, each of which resumes one reservation that the server has not seen."""
    account = open_account()
    account.reserve(training(1), allow)
    reservation, paid = account.reserve(training(2), allow), account.paid
    assert reservation == paid
    (folder,) = folders(account)
    shutil.copytree(folder, tmp_path / "copy")
    heads = set()
    for _ in range(2):
        put_back(tmp_path / "copy", folder)
        copy = open_account()
        copy.server_has("")
        assert copy.reserve(training(2), allow) == reservation
        heads.add(copy.paid)
    assert len(heads | {paid}) == 3
    again = open_account()  # killed once more before the server saw anything
    again.server_has("")
    assert again.reserve(training(2), allow) == reservation
    assert again.paid not in heads
    seen = open_account()
    seen.server_has(again.paid)
    assert seen.reserve(training(2), allow) != reservation
    assert [event.round for event in seen.read().events] == [1, 2, 2]


def test_what_is_no_ledger_and_what_is_of_other_images_does_not_matter(
    open_account: Callable[..., Account], training: Any, allow: Any
) -> None:
    account = open_account()
    account.reserve(training(1), allow)
    (account.folder / "lost+found").mkdir()
    shutil.copytree(folders(account)[0], account.folder / "backup" / "ledger")
    open_account(range(7, 9)).reserve(training(1), allow)
    for folder in folders(account):
        path = folder / "ledger.jsonl"
        if path.exists() and len(path.read_bytes().splitlines()) == 2 and folder.name != account.read().own.name:  # type: ignore[union-attr]
            path.write_bytes(path.read_bytes().replace(b'"steps":10', b'"steps":1') + b"junk\n")
    assert account.read().events == [training(1)]
    with pytest.raises(LedgerError, match="line 3 cannot be read"):
        open_account(range(7, 9)).read()


def test_one_account_and_many_threads(open_account: Callable[..., Account], training: Any, allow: Any) -> None:
    account = open_account()
    with ThreadPoolExecutor(8) as threads:
        heads = list(threads.map(lambda number: account.reserve(training(number), allow), range(40)))
    assert len(set(heads)) == 40
    assert sorted(event.round for event in account.read().events) == list(range(40))
