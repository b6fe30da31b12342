"""What clients lend each other, and the prompt that a round starts from: from the server's bytes to arrays and back.

Symbols: n x d context, K experts. Everything received is checked for shape, finite numbers and norm before it is used.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from pfed_client.local_model import Array
from pfed_client.receipts import check_receipt
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.interface import ClientExperts
from pfedsecure.experts.lent import lent_shape
from pfedsecure.matching.factory import client_matching
from pfedsecure.plan import Plan
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.tensors import check_norm, from_tensor
from pfedsecure.wire.v1 import payload_pb2 as payload
from pfedsecure.wire.v1 import round_pb2 as rnd

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GlobalPrompt:
    """The context `start (n, d)` of a round, the SHA-256, in hex, of the bytes that came, and how many they were."""

    start: Array
    digest: str
    size: int


@dataclass(frozen=True)
class Download:
    """What a round starts from: the global prompt and `experts (K', n, d)`, K' <= K; bytes of payload.

    In an ensemble experts have more rows, as `pfedsecure.experts.lent` has it.
    """

    prompt: GlobalPrompt
    experts: Array
    bytes_up: int
    bytes_down: int


class Exchange:
    """The messages of a client of `plan`; `initial (n, d)` is the plan's own start."""

    def __init__(self, api: FederationApi, plan: Plan, initial: Array, experts: ClientExperts) -> None:
        self._api = api
        self._n_experts = plan.n_experts
        self._initial = initial
        self._max_norm = plan.prompt.max_norm
        self._shape: tuple[int, int] = (initial.shape[0], initial.shape[1])
        self._lent_shape = lent_shape(plan, self._shape)
        self._experts = experts
        self._matching = client_matching(plan)

    async def global_prompt(self, round_number: int) -> GlobalPrompt:
        """The context that a round starts from; 0: the newest. Raises MessageRejected."""
        content = await self._api.get_global_prompt(round_number)
        digest = hashlib.sha256(content).hexdigest()
        return GlobalPrompt(self._read_prompt(content) if content else self._initial, digest, len(content))

    async def download(self, round_number: int, own: Array | None) -> Download:
        """Global prompt and the experts matched with `own`, the client's newest prompt, or with the start without one.

        Raises MessageRejected for anything malformed; an expert that cannot be used is left out and reported.
        """
        prompt = await self.global_prompt(round_number)
        if not self._n_experts:
            return Download(prompt, np.zeros((0, *self._lent_shape), np.float32), 0, prompt.size)
        query = self._matching.query(prompt.start if own is None else own)
        reply = await self._api.match(rnd.MatchRequest(round=round_number, query=query, experts=self._n_experts))
        ids = self._matching.rank(reply.answer, self._n_experts)
        if len(set(ids)) != len(ids):
            raise MessageRejected("the server's match answer names an expert twice")
        contents = await self._api.get_experts(round_number, ids) if ids else {}
        if sorted(contents) != sorted(ids):
            raise MessageRejected("the server sent other experts than were asked for")
        experts = [await self._expert(key, contents[key], round_number) for key in ids]
        return Download(
            prompt,
            np.array([expert for expert in experts if expert is not None], np.float32).reshape(-1, *self._lent_shape),
            bytes_up=len(query),
            bytes_down=prompt.size + len(reply.answer) + sum(len(content) for content in contents.values()),
        )

    def bounded(self, context: Array) -> Array:
        """`context (n, d)`, scaled to the plan's bound if its norm is over it."""
        norm = float(np.linalg.norm(context.astype(np.float64)))
        return context if norm <= self._max_norm else (context * (self._max_norm / norm)).astype(np.float32)

    def publication(self, lent: Array, round_number: int) -> bytes:
        """What peers get of the context `(n, d)` trained in a round, in an ensemble with the gate's output behind it.

        Always the same bytes for the same. Peers are matched by the context alone.
        """
        message = payload.Publication(
            expert=self._experts.pack(lent, round_number), sketch=self._matching.sketch(lent[: self._shape[0]])
        )
        return message.SerializeToString(deterministic=True)

    async def publish(self, lent: Array, round_number: int) -> int:
        """Send the expert of a round; returns its bytes. Raises MessageRejected, also for a wrong receipt."""
        publication = self.publication(lent, round_number)
        check_receipt(await self._api.publish_expert(round_number, publication), publication)
        return len(publication)

    def _read_prompt(self, content: bytes) -> Array:
        what = "the global prompt"
        try:
            tensor = payload.Tensor.FromString(content)
        except DecodeError:
            raise MessageRejected(f"{what} from the server cannot be decoded") from None
        context = from_tensor(tensor, self._shape, what)
        check_norm(context, self._max_norm, what)
        return context

    async def _expert(self, expert_id: str, content: bytes, round_number: int) -> Array | None:
        """A peer's prompt; None, with a warning, for one that cannot be used: its author must not stop others."""
        try:
            return self._experts.unpack(content, expert_id, round_number)
        except MessageRejected as error:
            _logger.warning("%s; this round goes on without it", error)
            with suppress(MessageRejected):  # the report is for the operator; this client does not depend on it
                await self._api.report_expert(rnd.ReportExpertRequest(round=round_number, expert_id=expert_id))
            return None
