"""What one round's messages hold: from the server's bytes to arrays, and from a trained prompt to bytes.

Symbols: n x d context, K experts. Everything received is checked for shape, finite numbers and norm
before it is used.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError, Message

from pfed_client.local_model import Array
from pfedsecure.aggregation.factory import client_aggregation
from pfedsecure.errors import MessageRejected
from pfedsecure.matching.factory import client_matching
from pfedsecure.plan import Plan
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.tensors import check_norm, from_tensor, to_tensor
from pfedsecure.wire.v1 import payload_pb2 as payload
from pfedsecure.wire.v1 import round_pb2 as rnd

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Download:
    """What a round starts from: the context `start (n, d)` and `experts (K', n, d)`, K' <= K; bytes of payload."""

    start: Array
    experts: Array
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Upload:
    """What a trained model sends: always the same bytes for the same model. `publication` is None when K = 0."""

    contribution: bytes
    publication: bytes | None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.contribution) + len(self.publication or b"")


class Exchange:
    """The messages of a client of `plan`; `initial (n, d)` is the plan's own start."""

    def __init__(self, api: FederationApi, plan: Plan, initial: Array) -> None:
        self._api = api
        self._n_experts = plan.n_experts
        self._initial = initial
        self._max_norm = plan.prompt.max_norm
        self._shape: tuple[int, int] = (initial.shape[0], initial.shape[1])
        self._aggregation = client_aggregation(plan, self._shape)
        self._matching = client_matching(plan)

    async def global_prompt(self, round_number: int) -> tuple[Array, int]:
        """The context that a round starts from (0: the newest) and the bytes it took. Raises MessageRejected."""
        content = await self._api.get_global_prompt(round_number)
        if not content:
            return self._initial, 0
        return self._context(content, payload.Tensor(), "the global prompt"), len(content)

    async def download(self, round_number: int, own: Array | None) -> Download:
        """Global prompt and the experts nearest to `own`, the client's newest prompt, or to the start without one.

        Raises MessageRejected for anything malformed.
        """
        start, bytes_down = await self.global_prompt(round_number)
        if not self._n_experts:
            return Download(start, np.zeros((0, *self._shape), np.float32), 0, bytes_down)
        query = self._matching.query(start if own is None else own)
        reply = await self._api.match(rnd.MatchRequest(round=round_number, query=query, experts=self._n_experts))
        ids = self._matching.rank(reply.answer, self._n_experts)
        if len(set(ids)) != len(ids):
            raise MessageRejected("the server's match answer names an expert twice")
        contents = await self._api.get_experts(round_number, ids) if ids else {}
        if sorted(contents) != sorted(ids):
            raise MessageRejected("the server sent other experts than were asked for")
        experts = [self._expert(key, contents[key]) for key in ids]
        return Download(
            start,
            np.array([expert for expert in experts if expert is not None], np.float32).reshape(-1, *self._shape),
            bytes_up=len(query),
            bytes_down=bytes_down + len(reply.answer) + sum(len(content) for content in contents.values()),
        )

    def upload(self, context: Array, n_train: int) -> Upload:
        """What leaves the client for `context (n, d)` trained on `n_train` images; scaled if over the plan's bound."""
        norm = float(np.linalg.norm(context.astype(np.float64)))
        if norm > self._max_norm:
            context = (context * (self._max_norm / norm)).astype(np.float32)
        publication = None
        if self._n_experts:
            expert = payload.PlainExpert(context=to_tensor(context)).SerializeToString(deterministic=True)
            message = payload.Publication(expert=expert, sketch=self._matching.sketch(context))
            publication = message.SerializeToString(deterministic=True)
        return Upload(self._aggregation.contribution(context, n_train), publication)

    async def submit(self, round_number: int, upload: Upload) -> None:
        """Send the update. Raises MessageRejected, also when the server stored something else."""
        receipt = await self._api.submit_update(round_number, upload.contribution)
        _check_receipt(receipt, upload.contribution)

    async def publish(self, round_number: int, upload: Upload) -> None:
        """Send the expert, if the plan has any. Raises as `submit` does."""
        if upload.publication is not None:
            receipt = await self._api.publish_expert(round_number, upload.publication)
            _check_receipt(receipt, upload.publication)

    def _context(self, content: bytes, message: payload.Tensor | payload.PlainExpert, what: str) -> Array:
        _parse(content, message, what)
        tensor = message.context if isinstance(message, payload.PlainExpert) else message
        context = from_tensor(tensor, self._shape, what)
        check_norm(context, self._max_norm, what)
        return context

    def _expert(self, expert_id: str, content: bytes) -> Array | None:
        """A peer's prompt; None, with a warning, for one that cannot be used: its author must not stop others."""
        try:
            return self._context(content, payload.PlainExpert(), f"expert {expert_id[:8]}")
        except MessageRejected as error:
            _logger.warning("%s; this round goes on without it", error)
            return None


def _parse(content: bytes, message: Message, what: str) -> None:
    try:
        message.ParseFromString(content)
    except DecodeError:
        raise MessageRejected(f"{what} from the server cannot be decoded") from None


def _check_receipt(receipt: rnd.Receipt, content: bytes) -> None:
    if receipt.sha256 != hashlib.sha256(content).digest():
        raise MessageRejected("the server's receipt is for something else than was sent")
