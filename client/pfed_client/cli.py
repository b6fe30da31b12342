"""The command `pfed-client`. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Literal

import click
from click.core import ParameterSource

import pfedsecure
from pfed_client.ledger.place import VARIABLE
from pfedsecure.console import Address, exit_cleanly, parse_addresses
from pfedsecure.logs import LogFormat, configure, json_formatter

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_server_option = click.option(
    "--server",
    type=parse_addresses,
    default="127.0.0.1:8470",
    metavar="HOST:PORT[,...]",
    help="The server, or several of one federation: where one does not answer the next is asked.",
)


def _checked_epsilon(_ctx: click.Context, _parameter: click.Parameter, epsilon: float | None) -> float | None:
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise click.BadParameter(f"{epsilon} is not over 0 and finite; leave the option off to go without")
    return epsilon


@click.group(
    name="pfed-client",
    invoke_without_command=True,
    context_settings={"show_default": True, "max_content_width": 100},
)
@_server_option
@click.option("--name", metavar="NAME", help="Who this is: the name in the certificate.  [default: client-1, -2, ...]")
@click.option(
    "--data",
    metavar="SPEC",
    help="The images: a folder, a .csv or .txt list, torchvision:NAME or demo:I/N.  [default: a share of the demo's]",
)
@click.option("--backbone", "model", metavar="MODEL", help="open_clip model.  [default: the plan's]")
@click.option("--pretrained", metavar="TAG|FILE", help="Its weights.  [default: the plan's]")
@click.option("--backbone-dir", type=_FOLDER, metavar="DIR", help="Configuration files of models of your own.")
@click.option("--device", default="cpu", metavar="DEVICE", help="Where to compute, say cuda.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Of the frozen model.  [default: fp32]")
@click.option("--test-fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="[default: 0.5]")
@click.option("--strict/--no-strict", default=None, help="Whether a broken image is an error or skipped.")
@click.option("--state", type=_FOLDER, metavar="DIR", help="What this client remembers.  [default: state/clients/NAME]")
@click.option("--identity", type=_FOLDER, metavar="DIR", help="Key and certificate.  [default: in the state directory]")
@click.option("--plan", type=_FILE, metavar="FILE", help="The plan that was agreed on; any other is refused.")
@click.option("--insecure", is_flag=True, help="Plain text, to a server on this machine only.")
@click.option(
    "--retry-seconds", type=click.FloatRange(0), default=600.0, help="How long to try a server that does not answer."
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads for training.  [default: torch's]")
@click.option(
    "--share-metrics/--no-share-metrics",
    default=None,
    help="Whether accuracy and loss may join the secure sum, in a plan that has them.  [default: no]",
)
@click.option(
    "--matching",
    type=click.Choice(["he", "dp", "random", "plain"]),
    help="Take part only where the plan finds experts in this way.  [default: in any way]",
)
@click.option(
    "--fetch",
    type=click.Choice(["nearest", "all"]),
    help="Fetch the nearest experts, or all, so that the server cannot tell which are near.  [default: nearest]",
)
@click.option("--quiet", is_flag=True, help="No progress, only warnings and errors.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="json: one object a line on standard error, without accuracy or anything else of the images.",
)
@click.option(
    "--dp-epsilon",
    type=float,
    callback=_checked_epsilon,
    metavar="E",
    help="Differential privacy of each training image, with E for the whole federation.  [default: none]",
)
@click.option(
    "--dp-delta",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="D",
    help="With it.  [default: 1e-5, or a tenth of one over the number of images where that is less]",
)
@click.option(
    "--ledger",
    type=_FOLDER,
    metavar="DIR",
    help="Where it is written what --dp-epsilon has released of which images: one folder for all clients of a machine, "
    f"in no --state.  [default: that of the last time, then ${VARIABLE}, then the user's folder for data]",
)
@click.option(
    "--feature-cache-gib",
    type=click.FloatRange(0, min_open=True),
    metavar="GIB",
    help="Most disk space for image features that are kept in the state directory.  [default: 2]",
)
@click.version_option(pfedsecure.__version__)
@click.pass_context
@exit_cleanly("pfed-client")
def main(
    ctx: click.Context,
    server: tuple[Address, ...],
    name: str | None,
    data: str | None,
    model: str | None,
    pretrained: str | None,
    backbone_dir: Path | None,
    device: str,
    precision: Literal["fp32", "bf16"] | None,
    test_fraction: float | None,
    strict: bool | None,
    state: Path | None,
    identity: Path | None,
    plan: Path | None,
    insecure: bool,
    retry_seconds: float,
    threads: int | None,
    share_metrics: bool | None,
    matching: str | None,
    fetch: Literal["nearest", "all"] | None,
    quiet: bool,
    log_format: LogFormat,
    dp_epsilon: float | None,
    dp_delta: float | None,
    ledger: Path | None,
    feature_cache_gib: float | None,
) -> None:
    """Take part in a federation: train a prompt on your own images, borrow from others, keep what comes of it.

    Without a command: join, and go on until the last round. Stopped or killed and started again on the same --state it
    goes on where it was. Options not given are those of the last time. Images, labels and gate stay here, and so does
    accuracy without --share-metrics.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options_before(ctx, ctx.invoked_subcommand)
        return
    if insecure and identity is not None:
        raise click.UsageError("--identity goes with TLS, not with --insecure")
    from pfed_client.join import JoinOptions, take_part
    from pfed_client.progress import watcher

    options = JoinOptions(
        server=server,
        name=name,
        data=data,
        model=model,
        pretrained=pretrained,
        backbone_dir=backbone_dir,
        precision=precision,
        test_fraction=test_fraction,
        strict=strict,
        device=device,
        state=state,
        identity=identity,
        plan=plan,
        insecure=insecure,
        retry_seconds=retry_seconds,
        threads=threads,
        share_metrics=share_metrics,
        matching=matching,
        fetch=fetch,
        dp_epsilon=dp_epsilon,
        dp_delta=dp_delta,
        ledger=ledger,
        feature_cache_gib=feature_cache_gib,
    )
    as_json = log_format == "json"
    if as_json:
        configure("json")
    with watcher(quiet=quiet, as_json=as_json) as watch:
        status = take_part(options, watch, warn=_warn)
    sys.exit(status)


_state_option = click.option(
    "--state", type=_FOLDER, metavar="DIR", help="Of which client.  [default: the only one in state/clients]"
)
_device_option = click.option("--device", default="cpu", metavar="DEVICE", help="Where to compute, say cuda.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")


@main.command()
@_state_option
@_device_option
@_json_option
@exit_cleanly("pfed-client")
def evaluate(state: Path | None, device: str, as_json: bool) -> None:
    """How good the model is on this client's own test images, over all and for each class. Needs no server."""
    from pfed_client.saved import SavedClient

    client = SavedClient.open(state)
    from pfed_client.evaluation import evaluate as evaluate_client
    from pfed_client.report import evaluation_json, evaluation_table

    result = evaluate_client(client, device)
    click.echo(json.dumps(evaluation_json(result), indent=2) if as_json else evaluation_table(result))


@main.command()
@click.argument("images", nargs=-1, required=True, type=_FILE)
@click.option("--top", type=click.IntRange(1), default=3, help="How many classes to show.")
@click.option("--explain", is_flag=True, help="Also how much the own prompt and each expert weighed, per class.")
@_state_option
@_device_option
@_json_option
@exit_cleanly("pfed-client")
def predict(images: tuple[Path, ...], top: int, explain: bool, state: Path | None, device: str, as_json: bool) -> None:
    """What is on IMAGES, by this client's model. Needs no server."""
    from pfed_client.saved import SavedClient

    client = SavedClient.open(state)
    from pfed_client.classifier import Classifier
    from pfed_client.prediction import predict as predict_images
    from pfed_client.report import prediction_json, prediction_lines

    predictions = predict_images(Classifier.from_state(client, device), images, top=top, explain=explain)
    if as_json:
        click.echo(json.dumps([prediction_json(prediction) for prediction in predictions], indent=2))
    else:
        click.echo("\n".join(line for p in predictions for line in prediction_lines(p, explain=explain)))


@main.command()
@_state_option
@click.option("--ledger", type=_FOLDER, metavar="DIR", help="Where its ledger is.  [default: as it was started with]")
@_json_option
@exit_cleanly("pfed-client")
def budget(state: Path | None, ledger: Path | None, as_json: bool) -> None:
    """What --dp-epsilon has released of this client's images so far, what it comes to, and what is left.

    Needs no server.
    """
    from pfed_client.saved import SavedClient

    client = SavedClient.open(state)
    promise = client.promise()
    statement = client.ledgers(ledger)
    from pfed_client.ledger.report import budget_json, budget_lines, budget_report

    report = budget_report(client.name, promise, statement)
    click.echo(json.dumps(budget_json(report), indent=2) if as_json else "\n".join(budget_lines(report)))


@main.command()
@_state_option
@_server_option
@click.option("--identity", type=_FOLDER, metavar="DIR", help="Key and certificate.  [default: in the state directory]")
@click.option("--insecure", is_flag=True, help="Plain text, to a server on this machine only.")
@click.option("--retry-seconds", type=click.FloatRange(0), default=30.0, help="How long to try.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@exit_cleanly("pfed-client")
def leave(
    state: Path | None,
    server: tuple[Address, ...],
    identity: Path | None,
    insecure: bool,
    retry_seconds: float,
    yes: bool,
) -> None:
    """Leave the federation for good: its server stops waiting for this client, and lends its expert no longer.

    The model stays here and can be used. What the others have borrowed, and what went into the shared prompt, stays
    with them.
    """
    if insecure and identity is not None:
        raise click.UsageError("--identity goes with TLS, not with --insecure")
    from pfed_client.saved import SavedClient

    client = SavedClient.open(state)
    if not yes and not click.confirm(f"{client.name} leaves federation {client.plan.name} for good?"):
        click.echo("nothing was done")
        return
    from pfed_client.leaving import leave as leave_federation

    leave_federation(client, server, identity, insecure=insecure, retry_seconds=retry_seconds)
    click.echo(
        f"{client.name} left federation {client.plan.name}: the server confirmed it. Tell the authority, which makes a "
        f"new secret for those who stay (`pfed pki rotate --without {client.name}`)"
    )


@main.command()
@click.argument("file", type=_FILE)
@_state_option
@exit_cleanly("pfed-client")
def export(file: Path, state: Path | None) -> None:
    """Write prompt, gate, experts and class names to FILE (safetensors), for other programs.

    FILE holds the private gate: keep it inside your organisation. docs/examples/load_export.py shows how to use it.
    """
    from pfed_client.saved import SavedClient

    client = SavedClient.open(state)
    from pfed_client.classifier import Classifier
    from pfed_client.export import Export

    classifier = Classifier.from_state(client)
    model, pretrained = client.settings.backbone(client.plan)
    Export(client.plan, classifier.model, model, pretrained, classifier.backbone.text_digest).write(file)
    click.echo(f"{file}: the model of {client.name} as of round {classifier.model.trained_round}")


def _warn(sentence: str) -> None:
    if json_formatter() is None:
        click.echo(f"NOT PROTECTED: {sentence}", err=True)
    else:
        logging.getLogger("pfed_client").warning("NOT PROTECTED: %s", sentence)


def _refuse_options_before(ctx: click.Context, command: str) -> None:
    """Options of joining do nothing for a command: say so instead of ignoring them."""
    for parameter in ctx.command.params:
        name = parameter.name
        if name is not None and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"{parameter.opts[0]} is of joining; options of {command} stand behind it")
