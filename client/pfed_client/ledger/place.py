"""Where ledgers are unless --ledger says otherwise."""

from __future__ import annotations

from platformdirs import user_data_path

DEFAULT = user_data_path("pfedsecure") / "ledgers"
"""Outside of every state directory: who deletes one of those does not fill a budget up again."""
