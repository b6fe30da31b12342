"""File descriptors: every connection takes one, and a process may have only so many.

A server that has run out of them can take no connection, open no file and close none of those that never finish. So its
limit on connections stays below that of the system, which is raised as far as this process may.
"""

from __future__ import annotations

import resource
import sys

SPARE = 128
"""For everything else: database, logs, what is listened on, pages, the processes and files of encrypted matching."""


def limits() -> tuple[int, int]:
    """How many descriptors this process may have, and how many it may allow itself (soft and hard RLIMIT_NOFILE)."""
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in _limits())
    return soft, hard


def most_connections() -> int:
    """How many connections a server can have at once in a process like this one."""
    return max(limits()[1] - SPARE, 0)


def make_room(connections: int) -> int:
    """Raise the soft limit as far as so many connections take it, and as it can be; returns how many fit then."""
    soft, hard = limits()
    wanted = min(connections + SPARE, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, _limits()[1]))
    return min(connections, most_connections())


def too_few(connections: int) -> str:
    """Why so many connections cannot be had, and what to do, in words."""
    return (
        f"{connections} connections take {connections + SPARE} file descriptors, and this process may have "
        f"{limits()[1]}; raise its hard limit (LimitNOFILE= of a systemd unit, --ulimit nofile= of a container, "
        "ulimit -Hn)"
    )


def _limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)
