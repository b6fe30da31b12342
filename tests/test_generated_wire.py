"""The committed wire modules are what proto/ generates."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate_wire", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fresh = {path.name: path.read_text() for path in module.generate(tmp_path)}
    home = ROOT / "pfedsecure" / "wire" / "v1"
    committed = {path.name: path.read_text() for path in home.glob("*_pb2*")}
    assert len(fresh) >= 12
    assert fresh == committed, "run: make proto"
