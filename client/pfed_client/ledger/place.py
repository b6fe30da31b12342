"""Where ledgers are unless --ledger says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_data_path

VARIABLE = "PFED_LEDGER"


def default_folder() -> Path:
    """Outside of every state directory: who deletes one of those does not fill a budget up again."""
    named = os.environ.get(VARIABLE)
    return Path(named).absolute() if named else user_data_path("pfedsecure") / "ledgers"
