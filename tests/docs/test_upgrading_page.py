"""docs/upgrading.md has a section for every schema, and the forms that this version writes."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from pfed_client import export, state
from pfed_client.ledger import rows
from pfed_server import migrations
from pfedsecure.pki import kit
from pfedsecure.secagg import client
from pfedsecure.wire.v1 import federation_pb2

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "upgrading.md").read_text()


def test_every_step_from_one_schema_to_the_next_has_a_section() -> None:
    schemas = sorted(migrations.known(), key=int)
    steps = [f"Schema {old} to {new}" for old, new in pairwise(schemas)]
    assert re.findall(r"^## (.*schema.*)$", PAGE, re.MULTILINE | re.IGNORECASE) == [
        f"Before schema {migrations.BASELINE}",
        *steps,
    ]
    for section in re.split(r"^## Schema .*$", PAGE, flags=re.MULTILINE)[1:]:
        assert all(f"**{what}" in section for what in ("What changes", "What the operator does", "Back"))


def test_the_forms_are_those_of_the_code() -> None:
    told = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", PAGE, re.MULTILINE))
    assert told["server's database, `federation.sqlite`"] == f"schema {migrations.newest()}"
    assert told["client's state, `client.json`"] == f"format {state.FORMAT}"
    assert told["client's part in a round, in its state"] == f"format {client.FORMAT}"
    assert told["ledger"] == f"format {rows.FORMAT}"
    assert told["kit of `pfed pki approve` and `rotate`"] == f"`{kit._FORMAT}`"
    assert told["export of `pfed-client export`"] == f"`{export.FORMAT}`"
    assert f"`{federation_pb2.DESCRIPTOR.package}`" in PAGE
