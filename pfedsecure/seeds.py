"""Seeds for everything that is random and must be repeatable: one root seed, one stream per purpose.

Never for noise or keys that protect something: those come from the operating system.
"""

from __future__ import annotations

import hashlib
import json


def derive_seed(root: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(plan.seed, "client-1", "batches", 3)`.

    Different purposes give independent streams; 0 is a root like any other.
    """
    material = json.dumps([root, *purpose]).encode()
    return int.from_bytes(hashlib.sha256(material).digest()[:8], "big") >> 1
