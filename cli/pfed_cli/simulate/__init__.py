"""`pfed simulate`: many clients in one process, and where they train."""
