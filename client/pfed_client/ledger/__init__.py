"""What was released of which images, on this machine, in rows that nobody can take back unnoticed: docs/ledger.md."""
