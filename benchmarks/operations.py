"""Does the server stay right whatever happens to it? Random sequences of faults, and random messages on every call.

Sequences are those of `chaos.driver`: joins, leaves, kills, restarts, lost, repeated, late and cut messages, jumps of
the clock and disks that fail, against the server's and the clients' own code in virtual time. A sequence after which
something is not as it must be is shrunk and shown. Messages are those of `chaos.fuzz`, to a real server over mutual
TLS.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import click

from .chaos.driver import random_sequence, run, shrunk
from .chaos.fuzz import fuzz
from .contract import Bar, Outcome, Row, benchmark

QUICK, USUAL, LONG = (3, 2_000), (200, 50_000), (10_000, 1_000_000)
"""Sequences and messages."""


@benchmark
@click.option("--long", "long_", is_flag=True, help=f"{LONG[0]:,} sequences and {LONG[1]:,} messages: hours.")
@click.option("--sequences", type=click.IntRange(0), help="So many instead.")
@click.option("--messages", type=click.IntRange(0), help="So many instead.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one for each core",
    help="Processes that run sequences side by side.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Other sequences and messages.")
def command(
    *, quick: bool, long_: bool, sequences: int | None, messages: int | None, workers: int, seed: int
) -> Outcome:
    """Random sequences of faults without a broken invariant, random messages without a crash."""
    if quick and long_:
        raise click.UsageError("give one of --quick and --long")
    usual = QUICK if quick else LONG if long_ else USUAL
    sequences = usual[0] if sequences is None else sequences
    messages = usual[1] if messages is None else messages
    rows = [sequences_row(sequences, seed, workers), messages_row(messages, seed)]
    bars = {
        "sequences_without_violation": Bar.of(float(str(rows[0]["good"])), sequences, ">="),
        "fuzzed_messages_without_crash": Bar.of(float(str(rows[1]["good"])), messages, ">="),
    }
    params = {"quick": quick, "sequences": sequences, "messages": messages, "seed": seed}
    return Outcome(params=params, rows=rows, bars=bars)


def sequences_row(count: int, seed: int, workers: int) -> Row:
    """Run so many sequences, until one is found that breaks something; the first of these is shrunk and said."""
    started = time.monotonic()
    good, problem = 0, None
    # Each in a fresh process: what a sequence leaves behind in one that forks would be in all of them.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        results = pool.map(outcome, range(seed, seed + count), chunksize=max(1, min(20, count // workers)))
        with click.progressbar(results, count, label="sequences", file=sys.stderr) as found:
            for number, problem in found:
                if problem is not None:
                    shortest = shrunk(random_sequence(number))
                    problem = f"sequence {number}: {problem}; {shortest.kind}, {shortest.orders}"
                    click.echo(problem, err=True)
                    break
                good += 1
    finally:
        pool.shutdown(cancel_futures=True)
    return {
        "what": "sequences",
        "asked": count,
        "good": good,
        "seconds": time.monotonic() - started,
        "problem": problem,
    }


def outcome(number: int) -> tuple[int, str | None]:
    """A sequence by its number, and what it breaks."""
    return number, run(random_sequence(number))


def messages_row(count: int, seed: int) -> Row:
    """Send so many messages, or until the server is no more."""
    started = time.monotonic()
    found = fuzz(count, seed)
    if found.problem:
        click.echo(found.problem, err=True)
    return {
        "what": "messages",
        "asked": count,
        "good": found.answered,
        "seconds": time.monotonic() - started,
        "problem": found.problem,
        "server_mib_before": found.mib_before,
        "server_mib_after": found.mib_after,
    }
