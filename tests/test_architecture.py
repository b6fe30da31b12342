"""Who may import whom. Read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "torchvision", "open_clip", "opacus"}

RULES = {
    "pfedsecure": {"pfed_server", "pfed_client", "pfed_cli", "pfed_benchmarks"},
    "pfedsecure/aggregation": HEAVY,
    "pfedsecure/experts": HEAVY,
    "pfedsecure/matching": HEAVY,
    "pfedsecure/pki": HEAVY,
    "pfedsecure/secagg": HEAVY,
    "pfedsecure/wire": HEAVY,
    "server/pfed_server": HEAVY | {"pfed_client", "pfed_cli", "pfed_benchmarks"},
    "client/pfed_client": {"pfed_server", "pfed_cli", "pfed_benchmarks"},
}


def imports(file: Path) -> set[str]:
    """Every dotted name that a file imports, and its parents."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {".".join(name.split(".")[: length + 1]) for name in names for length in range(name.count(".") + 1)}


@pytest.mark.parametrize("package", RULES)
def test_layers(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := {name for name in imports(file) if name in RULES[package]})
    }
    assert broken == {}


def test_files_stay_small() -> None:
    packages = ["pfedsecure", "server", "client", "cli", "benchmarks"]
    sizes = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for package in packages
        for file in (ROOT / package).rglob("*.py")
        if "v1" not in file.parts and not any(part.startswith((".", "build")) for part in file.parts)
    }
    assert {name: size for name, size in sizes.items() if size > 350} == {}
