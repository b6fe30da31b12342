"""The command `pfed-server`."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import closing, nullcontext
from pathlib import Path

import click

import pfedsecure
from pfed_server.admission import Limits
from pfed_server.app import run
from pfed_server.audit import AuditLog
from pfed_server.coordinator import Coordinator
from pfed_server.countersigning import Sign
from pfed_server.descriptors import make_room, too_few
from pfed_server.events import everybody
from pfed_server.metrics import Metrics
from pfed_server.postgres import Location, parse_location
from pfed_server.revocation import KEPT_FILE, Revocations
from pfed_server.sql_store import SqlStore
from pfed_server.traces import exported
from pfedsecure.aggregation.factory import server_aggregation
from pfedsecure.clip.config import context_shape
from pfedsecure.console import Address, exit_cleanly, parse_address
from pfedsecure.errors import ProtectionUnavailable
from pfedsecure.logs import LogFormat, configure, json_formatter
from pfedsecure.pki.countersignature import countersign
from pfedsecure.pki.current import CurrentIdentity
from pfedsecure.pki.development import DEVELOPMENT_FOLDER, ensure_development_pki
from pfedsecure.pki.files import read_list
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.revocation import RevocationList
from pfedsecure.plan import Plan
from pfedsecure.wire.loopback import require_loopback
from pfedsecure.wire.options import MOST_CONNECTIONS

DEMO_PLAN = Path(pfedsecure.__file__).parent / "demo_plan.toml"
FEWEST_CONNECTIONS = 16
SWITCH_SECONDS = 0.0005
"""A thread that has come back from the database waits no longer for the one that answers calls, which it lets go of
several times in a transaction. With Python's 5 ms a round of 200 clients took half as long again."""

_logger = logging.getLogger("pfed_server")


@click.command(name="pfed-server", context_settings={"show_default": True, "max_content_width": 100})
@click.option("--tls", is_flag=True, help="Mutual TLS 1.3: every caller shows a certificate of the federation.")
@click.option("--insecure", is_flag=True, help="Plain text, on a loopback address only: callers are who they claim.")
@click.option(
    "--listen", type=parse_address, default="127.0.0.1:8470", metavar="HOST:PORT", help="Port 0: any free port."
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="The federation's plan.  [default: the embedded demo's]",
    show_default=False,
)
@click.option(
    "--matching",
    type=click.Choice(["he", "dp", "random", "plain"]),
    help="How experts are found, whatever the plan says.  [default: as the plan says]",
    show_default=False,
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path("state/server"),
    metavar="DIR",
    help="What the server remembers; a server started again on it goes on where it was. Of one server alone.",
)
@click.option(
    "--database",
    type=parse_location,
    metavar="URL",
    help="A PostgreSQL database in the place of a file in --state, which servers of one federation can share, such as "
    "postgresql://pfed@db.example.org/pfed?sslmode=verify-full; its password is in the file that PGPASSFILE names.",
)
@click.option(
    "--identity",
    "identity_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=f"Key and certificate of this server.  [default: development certificates in {DEVELOPMENT_FOLDER}]",
    show_default=False,
)
@click.option(
    "--crl",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The authority's revocation list, read again whenever it changes.  [default: the newest that was ever given]",
    show_default=False,
)
@click.option(
    "--calls-a-second",
    type=click.FloatRange(min=1),
    default=Limits.calls_a_second,
    metavar="N",
    help="Of one caller, in the long run; who makes more is told to wait.",
)
@click.option(
    "--calls-at-once",
    type=click.IntRange(min=4),
    default=Limits.calls_at_once,
    metavar="N",
    help="Of one caller, on all its connections; who makes more is told to wait.",
)
@click.option(
    "--connections",
    type=click.IntRange(min=FEWEST_CONNECTIONS),
    metavar="N",
    help=f"Of all callers together; further ones are closed at once.  [default: {MOST_CONNECTIONS}, or as many as "
    "there are file descriptors for]",
    show_default=False,
)
@click.option(
    "--backbone-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where to look for the configuration of the plan's model first.",
)
@click.option(
    "--metrics",
    "metrics_at",
    type=parse_address,
    is_flag=False,
    flag_value="127.0.0.1:9470",
    metavar="[HOST:PORT]",
    help="Metrics for Prometheus, in plain text: on 127.0.0.1:9470 unless you say where.",
)
@click.option(
    "--dashboard",
    type=parse_address,
    is_flag=False,
    flag_value="127.0.0.1:8471",
    metavar="[HOST:PORT]",
    help="A page for your browser, reading only, in plain text: on 127.0.0.1:8471 unless you say where.",
)
@click.option(
    "--traces", metavar="URL", help="OTLP/HTTP collector of OpenTelemetry, such as http://127.0.0.1:4318/v1/traces."
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="json: one object a line, for collectors."
)
@click.option("--exit-when-finished", is_flag=True, help="End by itself once the members online know the last round.")
@click.version_option(pfedsecure.__version__)
@exit_cleanly("pfed-server")
def main(
    tls: bool,
    insecure: bool,
    listen: Address,
    plan_file: Path | None,
    matching: str | None,
    state: Path,
    database: Location | None,
    identity_folder: Path | None,
    crl: Path | None,
    calls_a_second: float,
    calls_at_once: int,
    connections: int | None,
    backbone_dir: Path | None,
    metrics_at: Address | None,
    dashboard: Address | None,
    traces: str | None,
    log_format: LogFormat,
    exit_when_finished: bool,
) -> None:
    """Coordinate a federation: rounds, the pool of experts and the global prompt.

    The server sees no image and needs no model. It serves until SIGTERM or Ctrl-C.
    """
    if tls == insecure:
        raise click.UsageError("give one of --tls and --insecure")
    if insecure and identity_folder is not None:
        raise click.UsageError("--identity goes with --tls")
    if insecure and crl is not None:
        raise click.UsageError("--crl goes with --tls: without it callers have no certificates to revoke")
    configure(log_format)
    carried = _connections(connections)
    plan = Plan.from_toml(plan_file or DEMO_PLAN)
    if (formatter := json_formatter()) is not None:
        formatter.federation = plan.name
    if matching is not None:
        plan = plan.with_matching(matching)
    shape = context_shape(plan, backbone_dir)
    identity = None
    if insecure:
        require_loopback(listen.host)
    else:
        identity = _identity(identity_folder)
    authority = None if identity is None else identity.authority
    if authority is not None and crl is not None:
        RevocationList.read(read_list(crl), authority, str(crl))
    server_aggregation(plan, shape, authority)  # refuses what cannot be had before a state is made for it
    if insecure and plan.sealed_experts:
        raise ProtectionUnavailable(
            'the plan asks for protection.experts = "sealed", which takes certificates: use --tls, or a plan that asks '
            'for "plain"'
        )
    with (
        nullcontext() if traces is None else exported(traces) as tracing,
        closing(_store(state, database, plan)) as store,
        closing(AuditLog.open(state)) as audit,
    ):
        folder = None if identity is None else identity.folder
        metrics = None if metrics_at is None else Metrics(state, folder)
        coordinator = Coordinator(
            plan,
            store,
            context_shape=shape,
            authority=authority,
            sign=None if identity is None else _signing_with(CurrentIdentity(identity)),
            scratch=state / "matching",
            tell=everybody(audit.tell, *(each.tell for each in (metrics, tracing) if each is not None)),
        )
        revocations = None if authority is None else Revocations(authority, crl, state / KEPT_FILE)
        _introduce(plan, plan_file, f"{state}" if database is None else f"{state} and {database}", insecure)
        sys.setswitchinterval(SWITCH_SECONDS)
        asyncio.run(
            run(
                coordinator,
                listen,
                identity,
                revocations,
                Limits(calls_a_second=calls_a_second, calls_at_once=calls_at_once),
                carried,
                exit_when_finished=exit_when_finished,
                metrics=metrics,
                metrics_at=metrics_at,
                dashboard=dashboard,
                traces=tracing,
            )
        )


def _connections(asked: int | None) -> int:
    """How many there can be. Raises click.BadParameter for fewer than were asked for."""
    wanted = MOST_CONNECTIONS if asked is None else asked
    carried = make_room(wanted)
    if carried < wanted:
        enough = carried >= FEWEST_CONNECTIONS
        if asked is not None or not enough:
            advice = f", or ask for {carried} or fewer" if enough else ""
            raise click.BadParameter(too_few(wanted) + advice, param_hint="--connections")
        _logger.warning("only %d callers can be connected at once: %s", carried, too_few(wanted))
    return carried


def _store(state: Path, database: Location | None, plan: Plan) -> SqlStore:
    if database is None:
        return SqlStore.open(state, plan)
    from pfed_server.shared_store import PostgresStore  # a server that starts again on a file need not wait for this

    return PostgresStore.connect(database, state, plan)


def _identity(folder: Path | None) -> Identity:
    if folder is not None:
        return Identity.load(folder, role="server")
    _logger.info("no --identity: development certificates in %s, for trials on this machine only", DEVELOPMENT_FOLDER)
    return ensure_development_pki()


def _signing_with(current: CurrentIdentity) -> Sign:
    return lambda head: countersign(current(), head)


def _introduce(plan: Plan, plan_file: Path | None, state: str, insecure: bool) -> None:
    origin = "the embedded demo plan" if plan_file is None else str(plan_file)
    _logger.info("federation %s (%s, digest %s), state in %s", plan.name, origin, plan.digest()[:12], state)
    if insecure:
        _logger.warning("NOT PROTECTED: no TLS; whoever is on this machine can read along and take any name")
    for sentence in plan.unprotected():
        _logger.warning("NOT PROTECTED: %s", sentence)
