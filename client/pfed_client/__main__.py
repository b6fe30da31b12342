"""`python -m pfed_client`."""

from __future__ import annotations

from pfed_client.cli import main

if __name__ == "__main__":
    main()
