"""What bare `pfed-client` does: find out who it is, agree on the plan, get ready, and take part.

In this order, so that each mistake is told as early and as fast as can be, and nothing is sent before everything fits:
state directory, identity, images, plan, classes, backbone, and only then `Join`. torch is loaded after the plan came.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np

from pfed_client.agreement import Agreement, agree
from pfed_client.grpc_api import GrpcApi
from pfed_client.ledger.account import Account
from pfed_client.ledger.place import default_folder
from pfed_client.privacy import check_account, check_privacy, privacy
from pfed_client.progress import Watcher
from pfed_client.renewing import Renewing
from pfed_client.saved import DEFAULT_STATES
from pfed_client.session import Session
from pfed_client.splitting import split
from pfed_client.state import ClientState, Settings
from pfed_client.stopping import until_stopped
from pfedsecure.aggregation.factory import client_aggregation
from pfedsecure.console import Address
from pfedsecure.data import ImageSet, open_images
from pfedsecure.errors import IdentityError, PlanMismatch, StateError, StateLocked
from pfedsecure.experts.factory import client_experts
from pfedsecure.matching.factory import client_matching
from pfedsecure.pki.development import DEVELOPMENT_FOLDER, enrol
from pfedsecure.pki.identity import CERTIFICATE_FILE, Identity
from pfedsecure.pki.names import validate_name
from pfedsecure.plan import NO_PRIVACY, Plan
from pfedsecure.wire.loopback import require_loopback

DEMO_SHARES = 5
"""Clients of the embedded demo."""


@dataclass(frozen=True)
class JoinOptions:
    """The command line. None: not given; what an earlier session on the state directory was given, else the default."""

    server: tuple[Address, ...]
    """One server of the federation, or several."""
    name: str | None
    data: str | None
    model: str | None
    pretrained: str | None
    backbone_dir: Path | None
    precision: Literal["fp32", "bf16"] | None
    test_fraction: float | None
    strict: bool | None
    device: str
    state: Path | None
    identity: Path | None
    plan: Path | None
    insecure: bool
    retry_seconds: float
    threads: int | None
    share_metrics: bool | None
    matching: str | None
    """The way of matching that the plan must have, where one was named."""
    fetch: Literal["nearest", "all"] | None
    dp_epsilon: float | None
    dp_delta: float | None
    ledger: Path | None
    feature_cache_gib: float | None


def take_part(options: JoinOptions, watch: Watcher, warn: Callable[[str], None]) -> int:
    """Take part until the federation is finished, or until SIGTERM or SIGINT; returns the exit status.

    When told to stop, the client does not leave the federation: started again, it goes on. `warn` is told of each
    protection that is off. Raises PfedError, or click.UsageError for options that do not go together.
    """
    expected = None if options.plan is None else Plan.from_toml(options.plan)
    identity = None if options.identity is None else Identity.load(options.identity, role="client")
    if options.insecure:
        for address in options.server:
            require_loopback(address.host)
    with _open_state(options, identity) as state:
        if not options.insecure and identity is None:
            identity = _own_identity(state)
        settings = _settings(options, state)
        return asyncio.run(until_stopped(_join(options, state, identity, settings, expected, watch, warn)))


async def _join(
    options: JoinOptions,
    state: ClientState,
    identity: Identity | None,
    settings: Settings,
    expected: Plan | None,
    watch: Watcher,
    warn: Callable[[str], None],
) -> None:
    check_privacy(state, settings)
    images = await asyncio.to_thread(open_images, settings.data, strict=settings.strict, root=settings.data_root)
    digests = await asyncio.to_thread(images.content_digests)
    fingerprint = images.fingerprint(digests)
    state.check_data(settings, fingerprint)
    async with GrpcApi(
        options.server[0],
        identity,
        others=options.server[1:],
        claimed_name=state.record.name,
        retry_seconds=options.retry_seconds,
        on_retry=watch.retrying,
    ) as api:
        agreement = await agree(api, state, expected)
        _require_matching(agreement.plan, options.matching)
        _require_protections(agreement, state, identity)
        if identity is None:
            warn("no TLS: whoever is on this machine can read along")
        for sentence in agreement.plan.unprotected():
            if settings.dp_epsilon is None or sentence != NO_PRIVACY:
                warn(sentence)
        account = Account(
            settings.ledger or default_folder(),
            digests,
            federation=agreement.federation_id,
            client=state.record.name,
        )
        with contextlib.ExitStack() as stack:
            if settings.dp_epsilon is not None:
                check_account(state, account)  # before a new ledger is made in the place of one that is gone
                stack.enter_context(account.held())
            renewing = Renewing(api, identity, watch.notice)
            make = await _sessions(api, agreement, state, settings, images, digests, account, options, watch, renewing)
            session = await asyncio.to_thread(make, identity)
            state.remember(settings, fingerprint)
            await renewing.run(session, make)


def _require_matching(plan: Plan, wanted: str | None) -> None:
    found = plan.protection.matching
    if wanted not in (None, found):
        raise PlanMismatch(
            f'the server\'s plan has protection.matching = "{found}", --matching asks for "{wanted}"; leave it off if '
            "that is acceptable, or ask the server's operator for another plan"
        )


def _require_protections(agreement: Agreement, state: ClientState, identity: Identity | None) -> None:
    """Raise ProtectionUnavailable or IdentityError now, not after the minutes that images and weights can take."""
    shape = agreement.plan.prompt.context_length, 1  # the width is not known yet, and nothing here depends on it
    client_experts(agreement.plan, shape, agreement.federation_id, identity, state.seen)
    client_aggregation(agreement.plan, shape, identity)
    client_matching(agreement.plan, np.zeros(shape, np.float32), identity, state.kept, state.releases.record)


async def _sessions(
    api: GrpcApi,
    agreement: Agreement,
    state: ClientState,
    settings: Settings,
    images: ImageSet,
    digests: Sequence[bytes],
    account: Account,
    options: JoinOptions,
    watch: Watcher,
    renewing: Renewing,
) -> Callable[[Identity | None], Session]:
    """What makes a session for an identity, once everything that takes long is ready."""
    stopped = threading.Event()

    def on_progress(done: int, total: int) -> None:
        if stopped.is_set():
            raise asyncio.CancelledError
        watch.features(done, total)

    def prepare() -> Callable[[Identity | None], Session]:
        labelled = images.relabel(agreement.plan.class_names)  # before the seconds that torch takes to load
        drawn = split(labelled, agreement.plan, state.record.name, settings.test_fraction)
        rows = state.split.settled(digests, drawn, anew=state.record.plan is None)  # it never joined
        import torch

        from pfed_client.participant import prepare

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        participant = prepare(
            agreement.plan,
            state.record.name,
            settings,
            images,
            device=options.device,
            cache_dir=state.folder / "features",
            rows=rows,
            privacy_of=lambda n_train: privacy(state, settings, agreement.plan, n_train, account),
            on_progress=on_progress,
        )
        if participant.privacy is not None:
            watch.promised(participant.privacy.promise.in_words())
        return lambda identity: Session(
            api,
            agreement,
            state,
            participant.trainer,
            backbone_digest=participant.backbone.digest,
            identity=identity,
            share_metrics=settings.share_metrics,
            fetch_all=settings.fetch == "all",
            privacy=participant.privacy,
            observer=watch,
            between_rounds=renewing.between_rounds,
        )

    try:
        return await asyncio.to_thread(prepare)
    finally:
        stopped.set()


def _open_state(options: JoinOptions, identity: Identity | None) -> ClientState:
    """The locked state directory, claimed for this client's name."""
    name = options.name
    if identity is not None:
        if name not in (None, identity.subject.name):
            raise IdentityError(
                f"{identity.folder}: the certificate is of {identity.subject.name}, not of {name}; leave --name off"
            )
        name = identity.subject.name
    with contextlib.ExitStack() as stack:
        if options.state is not None:
            state = stack.enter_context(ClientState(options.state))
            name = name or state.name
            if name is None:
                raise click.UsageError(f"{options.state} is a new state directory: say with --name whose it is to be")
        elif name is not None:
            state = stack.enter_context(ClientState(DEFAULT_STATES / validate_name(name)))
        else:
            state, name = _first_free()
            stack.enter_context(state)
        state.claim(validate_name(name))
        stack.pop_all()
        return state


def _first_free() -> tuple[ClientState, str]:
    """The first of client-1, client-2, ... that no process on this machine is just now."""
    for number in itertools.count(1):
        name = f"client-{number}"
        with contextlib.suppress(StateLocked):
            return ClientState(DEFAULT_STATES / name), name
    raise AssertionError("there is no last number")


def _own_identity(state: ClientState) -> Identity:
    """The identity inside the state directory; where this machine has the development authority, made when missing."""
    folder, name = state.folder / "identity", state.record.name
    if not (folder / CERTIFICATE_FILE).exists():
        if not (DEVELOPMENT_FOLDER / "authority").exists():
            raise IdentityError(
                f"{folder} holds no certificate of {name} and this machine has no development authority: run "
                f"`pfed pki request {folder} --name {name} --role client` and have it approved, or give --identity DIR"
            )
        return enrol(DEVELOPMENT_FOLDER, name, "client", folder)
    identity = Identity.load(folder, role="client")
    if identity.subject.name != name:
        raise IdentityError(
            f"{folder} is the identity of {identity.subject.name}, not of {name}; give it another --state"
        )
    return identity


def _settings(options: JoinOptions, state: ClientState) -> Settings:
    """What was given now, else what an earlier session on this state directory was given, else the default."""
    old = state.record.settings
    given = options.test_fraction
    if old is not None and given not in (None, old.test_fraction):
        raise StateError(
            f"{state.folder}: was started with --test-fraction {old.test_fraction:g}; another split would test on "
            "images that were trained on; leave it off, or give another --state"
        )
    defaults = old or Settings.of(
        _demo_share(state.record.name) if options.data is None else options.data,
        Path.cwd(),
        0.5 if given is None else given,
    )
    epsilon = options.dp_epsilon if old is None else (options.dp_epsilon or old.dp_epsilon)
    if options.dp_delta is not None and epsilon is None:
        raise click.UsageError("--dp-delta goes with --dp-epsilon")
    if epsilon is not None and (options.share_metrics or (options.share_metrics is None and defaults.share_metrics)):
        raise click.UsageError(
            "--share-metrics does not go with --dp-epsilon: accuracy and loss would tell of images, and no noise is on "
            "them; leave one of the two off (--no-share-metrics)"
        )
    now: dict[str, object] = {
        "data": options.data,
        "data_root": None if options.data is None else Path.cwd(),
        "strict": options.strict,
        "model": options.model,
        "pretrained": _absolute_if_file(options.pretrained),
        "backbone_dir": None if options.backbone_dir is None else options.backbone_dir.absolute(),
        "precision": options.precision,
        "share_metrics": options.share_metrics,
        "fetch": options.fetch,
        "dp_epsilon": options.dp_epsilon,
        "dp_delta": options.dp_delta,
        "ledger": options.ledger.absolute() if options.ledger is not None else defaults.ledger or default_folder(),
        "feature_cache_gib": options.feature_cache_gib,
    }
    return defaults.model_copy(update={key: value for key, value in now.items() if value is not None})


def _demo_share(name: str) -> str:
    match = re.fullmatch(r"client-(\d+)", name)
    if match is None:
        raise click.UsageError(
            f"give --data: only client-1, client-2, ... have images without it, shares of the embedded digits; for "
            f"{name} that could be --data demo:0/{DEMO_SHARES}"
        )
    return f"demo:{(int(match[1]) - 1) % DEMO_SHARES}/{DEMO_SHARES}"


def _absolute_if_file(pretrained: str | None) -> str | None:
    return str(Path(pretrained).absolute()) if pretrained and Path(pretrained).is_file() else pretrained
