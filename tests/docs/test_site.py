"""`make docs`: pages and API reference are built without a warning, and every link in them leads somewhere."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "docs" / "site"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(SITE))
    return {name: importlib.import_module(name) for name in ("pages", "links", "reference")}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_every_link_between_pages_holds(modules: dict[str, Any], tmp_path: Path) -> None:
    """Links into the reference are checked when that is built."""
    assert modules["pages"].write(ROOT, tmp_path) == []
    broken = modules["links"].broken(tmp_path)
    assert [line for line in broken if not re.search(r": the link [./]*reference/", line)] == []
    assert len(broken) > 20  # there are such links


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("[a](nowhere.md)", "docs/page.md: the link nowhere.md leads nowhere"),
        ("[a](other.md#no-such)", "docs/page.html: other.html#no-such: there is no such heading or name"),
        ("[a](#no-such)", "docs/page.html: #no-such: there is no such heading or name"),
        ("![a](picture.png)", "docs/page.md: the link picture.png leads nowhere"),
        ("see `pfedsecure/gone.py`", "docs/page.md: pfedsecure/gone.py does not exist"),
        ("[a](../../outside)", "docs/page.md: the link ../../outside leads nowhere"),
    ],
)
def test_a_broken_link_is_found(modules: dict[str, Any], tmp_path: Path, page: str, said: str) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    write(root, {"README.md": "# Home", "docs/page.md": page, "docs/other.md": "# Other"})
    problems = modules["pages"].write(root, out) + modules["links"].broken(out)
    assert said in problems


def test_links_that_hold(modules: dict[str, Any], tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    page = (
        "# It's `one`, twice\n\n# It's `one`, twice\n\n[a](#its-one-twice-1) [b](../README.md#home) [c](picture.png) "
        "[d](../files) [e](https://example.org/#x)"
    )
    write(root, {"README.md": "# Home", "docs/page.md": page, "docs/picture.png": "x", "files/f.txt": "f"})
    assert modules["pages"].write(root, out) == []
    text = (out / "docs/page.html").read_text()
    assert all(link in text for link in ("#its-one-twice-1", "../index.html#home", "../files/index.html"))
    assert [line for line in modules["links"].broken(out) if "reference/" not in line] == []
    assert (out / "docs/picture.png").exists()
    assert (out / "files/f.txt").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_builds(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SITE), str(tmp_path / "built")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    reference = tmp_path / "built" / "reference"
    for module in ("pfedsecure/secagg/client", "pfed_server/coordinator", "pfed_client/session"):
        assert (reference / f"{module}.html").exists()
    assert not list(reference.rglob("v1*"))
    assert "Take in the shares of others" in (reference / "pfedsecure/secagg/client.html").read_text()
    assert '<a href="../../docs/exit-codes.html">' in (reference / "pfedsecure/errors.html").read_text()
