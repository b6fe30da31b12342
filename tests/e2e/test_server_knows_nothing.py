"""The server's whole state directory and the memory of its process, searched for what it must not have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.pki.cohort import CohortSecrets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="memory is read from /proc"),
]

UNPROTECTED = {"aggregation": "plain", "experts": "plain", "matching": "plain"}

_CHUNK_BYTES = 1 << 24


def found_in_memory(pid: int, needles: Mapping[str, bytes]) -> set[str]:
    """The names of those `needles` that are in the readable memory of a process."""
    return _search(_memory(pid), needles)


def found_in_folder(folder: Path, needles: Mapping[str, bytes]) -> set[str]:
    """The names of those `needles` that are in some file below `folder`."""
    found: set[str] = set()
    for path in folder.rglob("*"):
        if path.is_file():
            found |= _search(iter([path.read_bytes()]), needles)
    return found


def _search(chunks: Iterator[bytes], needles: Mapping[str, bytes]) -> set[str]:
    found: set[str] = set()
    for chunk in chunks:
        found |= {name for name, needle in needles.items() if name not in found and needle in chunk}
    return found


def _memory(pid: int) -> Iterator[bytes]:
    """All of it, in pieces that overlap by enough for no needle to be cut in two."""
    overlap = 4096
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            extent, permissions, *_ = line.split()
            start, end = (int(part, 16) for part in extent.split("-"))
            if not permissions.startswith("r") or line.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            for piece in range(start, end, _CHUNK_BYTES - overlap):
                try:
                    memory.seek(piece)
                    yield memory.read(min(_CHUNK_BYTES, end - piece))
                except OSError:  # unmapped meanwhile, or a device's
                    break


def secrets_of(home: Path, name: str) -> dict[str, bytes]:
    """A client's secrets, in the forms in which they could be lying about."""
    identity = home / "state/clients" / name / "identity"
    stored = json.loads((identity / "cohort.json").read_bytes())["secrets"]["1"]
    cohort = CohortSecrets.load(identity)
    content_key, matching_key = cohort.derive(1, "expert content key"), SecretKey(cohort, 1).coefficients
    needles = {"cohort secret": bytes.fromhex(stored), "cohort secret in hex": stored.encode()}
    needles |= {"content key": content_key, "content key in hex": content_key.hex().encode()}
    needles["matching seed"] = cohort.derive(1, "matching secret key")
    for kind in (np.int8, np.int64, np.float64):
        needles[f"matching key as {kind.__name__}"] = matching_key[:256].astype(kind).tobytes()
    for key in ("identity.key", "author.key", "sealing.key"):
        lines = (identity / key).read_text().splitlines()
        needles[f"{name}: {key}"] = lines[1].encode()
    return needles


def prompt_of(home: Path, name: str) -> dict[str, bytes]:
    """A client's newest prompt: the bytes of some of its numbers, as any message or array has them."""
    context = load_file(home / "state/clients" / name / "model.safetensors")["context"]
    return {f"{name}: prompt": np.ascontiguousarray(context[1]).tobytes()[:64]}


def global_prompt(home: Path, federation) -> dict[str, bytes]:
    ((prompt,),) = federation.query("SELECT global_prompt FROM rounds ORDER BY number DESC LIMIT 1")
    assert isinstance(prompt, bytes)
    return {"global prompt": prompt[-64:]}


def search(federation, needles: Mapping[str, bytes]) -> dict[str, set[str]]:
    return {
        "memory": found_in_memory(federation.processes["server"].pid, needles),
        "state": found_in_folder(federation.home / "state/server", needles),
    }


def finished(federation) -> None:
    """Wait until all clients have ended; the server stays."""
    server = federation.processes.pop("server")
    federation.finish()
    federation.processes["server"] = server


def test_neither_secrets_nor_prompts_are_with_the_server(make_federation: Callable) -> None:
    federation = make_federation(3, rounds=2)
    federation.start(keep_server=True)
    finished(federation)

    needles = {}
    for name in federation.names:
        needles |= secrets_of(federation.home, name) | prompt_of(federation.home, name)
    assert len(needles) == 8 + 4 * 3
    # The search finds what is there: the outcome, which the server is to have.
    allowed = global_prompt(federation.home, federation)
    assert search(federation, needles | allowed) == {"memory": {"global prompt"}, "state": {"global prompt"}}


def test_the_search_finds_prompts_where_nothing_hides_them(make_federation: Callable) -> None:
    """The same search of an unprotected federation: it would fail the test above."""
    federation = make_federation(3, rounds=2, **UNPROTECTED)
    federation.start(keep_server=True)
    finished(federation)

    prompts = {}
    for name in federation.names:
        prompts |= prompt_of(federation.home, name)
    found = search(federation, prompts)
    assert found["state"] == set(prompts)
    assert found["memory"]
