"""What the three command lines have in common: how they end, and how an address is written."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import click

from pfedsecure.errors import PfedError
from pfedsecure.logs import json_formatter

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""


@contextmanager
def exit_cleanly(program: str) -> Iterator[None]:
    """End the process with one line on standard error and the error's `exit_code` when a PfedError is raised inside.

    A decorator for a click callback (below `@click.command()` and the options), or a `with` block. Ctrl-C ends with
    status 130. Usage errors stay click's own (status 2). Any other exception is a defect and keeps its traceback. In a
    process that logs JSON the line is one of its log.
    """
    try:
        yield
    except PfedError as error:
        _say(program, f"error: {one_line(str(error))}")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):  # click's is Ctrl-C, or the end of input, at a question
        _say(program, "interrupted")
        sys.exit(INTERRUPTED)


def _say(program: str, line: str) -> None:
    if json_formatter() is None:
        click.echo(f"{program}: {line}", err=True)
    else:
        logging.getLogger(program).error("%s", line)


def one_line(text: str) -> str:
    """`text` on one line without control characters: a peer may have written parts of it.

    A peer must neither forge further lines nor steer the terminal.
    """
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


class Address(NamedTuple):
    """Where a server listens, or is to be found."""

    host: str
    port: int

    def __str__(self) -> str:
        """As gRPC and users write it: `host:port`, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_addresses(text: str) -> tuple[Address, ...]:
    """HOST:PORT, or several with commas between them. Raises click.BadParameter as `parse_address`."""
    return tuple(parse_address(part.strip()) for part in text.split(","))


def parse_address(text: str) -> Address:
    """HOST:PORT or [IPV6]:PORT, for `click.option(type=parse_address, metavar="HOST:PORT")`; port 0 means any free one.

    Raises click.BadParameter, which click reports with the option's name.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise click.BadParameter(f"{text!r}: write an IPv6 address in brackets, such as [::1]:8470")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise click.BadParameter(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8470")
    return Address(host, int(port))
