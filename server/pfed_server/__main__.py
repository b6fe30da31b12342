"""`python -m pfed_server` is `pfed-server`."""

from pfed_server.cli import main

main(prog_name="pfed-server")
