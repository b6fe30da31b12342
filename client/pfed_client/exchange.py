"""What clients lend each other, and the prompt that a round starts from: from the server's bytes to arrays and back.

Symbols: n x d context, K experts. Everything received is checked for shape, finite numbers and norm before it is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from pfed_client.local_model import Array
from pfed_client.receipts import check_receipt
from pfedsecure.console import one_line
from pfedsecure.errors import MessageRejected
from pfedsecure.experts.interface import ClientExperts
from pfedsecure.experts.lent import lent_shape
from pfedsecure.matching.candidates import Candidate, read_candidates
from pfedsecure.matching.interface import ClientMatching
from pfedsecure.plan import Plan
from pfedsecure.wire.api import FederationApi
from pfedsecure.wire.tensors import from_tensor
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


@dataclass(frozen=True)
class _Matched:
    """What may be borrowed, best first, and the bytes that it took to know."""

    candidates: Sequence[Candidate]
    bytes_up: int
    bytes_down: int


class Exchange:
    """The messages of a client of `plan`; `initial (n, d)` is the plan's own start.

    `fetch_all`: fetch the experts of all others and choose here, so that the server does not learn which.
    """

    def __init__(
        self,
        api: FederationApi,
        plan: Plan,
        initial: Array,
        experts: ClientExperts,
        matching: ClientMatching,
        *,
        fetch_all: bool = False,
    ) -> None:
        self._api = api
        self._n_experts = plan.n_experts
        self._initial = initial
        self._max_norm = plan.prompt.max_norm
        self._shape: tuple[int, int] = (initial.shape[0], initial.shape[1])
        self._lent_shape = lent_shape(plan, self._shape)
        self._experts = experts
        self._matching = matching
        self._fetch_all = fetch_all
        self._distrusted = False

    async def global_prompt(self, round_number: int) -> GlobalPrompt:
        """The context that a round starts from; 0: the newest. Raises MessageRejected."""
        content = await self._api.get_global_prompt(round_number)
        digest = hashlib.sha256(content).hexdigest()
        return GlobalPrompt(self._read_prompt(content) if content else self._initial, digest, len(content))

    async def download(self, round_number: int, own: Array | None, trained_round: int) -> Download:
        """Global prompt and the experts matched with `own`, trained in a round, or with the start when it is None.

        Raises MessageRejected for anything malformed; an expert that cannot be used is left out and reported.
        """
        prompt = await self.global_prompt(round_number)
        if not self._n_experts:
            return Download(prompt, np.zeros((0, *self._lent_shape), np.float32), 0, prompt.size)
        own = prompt.start if own is None else own
        if self._fetch_all:
            matched = await self._everything(round_number)
        elif self._distrusted:
            matched = _Matched((), 0, 0)
        else:
            matched = await self._matched(round_number, own, trained_round)
        contents = await self._fetch(round_number, matched.candidates)
        experts = [
            await self._expert(item, contents[item.expert_id], round_number)
            for item in matched.candidates
            if item.expert_id in contents
        ]
        usable = [expert for expert in experts if expert is not None]
        if self._matching.epoch and not self._fetch_all and 2 * len(usable) < len(matched.candidates):
            # Made up, perhaps, to learn from what is asked for: each further question could tell more.
            self._distrusted = True
            _logger.warning(
                "most experts that were matched are missing or not what they were matched as; this session matches no "
                "more. Ask the server's operator, or use --fetch all"
            )
        if self._fetch_all:
            usable = self._nearest(usable, own)
        return Download(
            prompt,
            np.array(usable, np.float32).reshape(-1, *self._lent_shape),
            bytes_up=matched.bytes_up,
            bytes_down=prompt.size + matched.bytes_down + sum(len(content) for content in contents.values()),
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
            expert=self._experts.pack(lent, round_number),
            sketch=self._matching.sketch(self._context(lent), round_number),
        )
        return message.SerializeToString(deterministic=True)

    async def publish(self, lent: Array, round_number: int) -> int:
        """Send the expert of a round; returns its bytes. Raises MessageRejected, also for a wrong receipt."""
        publication = await asyncio.to_thread(self.publication, lent, round_number)
        check_receipt(await self._api.publish_expert(round_number, publication), publication)
        return len(publication)

    def _read_prompt(self, content: bytes) -> Array:
        what = "the global prompt"
        try:
            tensor = payload.Tensor.FromString(content)
        except DecodeError:
            raise MessageRejected(f"{what} from the server cannot be decoded") from None
        return self.bounded(from_tensor(tensor, self._shape, what))

    async def _matched(self, round_number: int, own: Array, trained_round: int) -> _Matched:
        query = await asyncio.to_thread(self._matching.query, own, trained_round, round_number)
        request = rnd.MatchRequest(round=round_number, query=query, experts=self._n_experts)
        answer = await self._api.match(request)
        bytes_up, bytes_down = len(query), len(answer)
        if self._matching.asks_for_setup(answer):
            bytes_up += len(query)
            try:
                bytes_up += await self._set_up_matching()
            except MessageRejected as refused:  # it took too long, say, and somebody else was asked
                _logger.warning("%s", one_line(str(refused)))
            answer = await self._api.match(request)
            bytes_down += len(answer)
        ranked = await asyncio.to_thread(self._matching.rank, answer, self._n_experts)
        if self._matching.spoilt:
            _logger.warning("the answer to this client's query is wrong about itself; something spoils matching")
            with suppress(MessageRejected):
                await self._api.report_matching(rnd.ReportMatchingRequest(round=round_number))
        return _Matched(ranked, bytes_up, bytes_down)

    async def _set_up_matching(self) -> int:
        """Give the server what matching needs in the newest epoch; returns its bytes. Raises MessageRejected."""
        epoch, setup = self._matching.epoch, await asyncio.to_thread(self._matching.setup)
        check_receipt(await self._api.set_up_matching(epoch, setup), setup)
        return len(setup)

    async def _everything(self, round_number: int) -> _Matched:
        request = rnd.MatchRequest(round=round_number, experts=self._n_experts, everything=True)
        answer = await self._api.match(request)
        return _Matched(read_candidates(answer), 0, len(answer))

    async def _fetch(self, round_number: int, candidates: Sequence[Candidate]) -> dict[str, bytes]:
        ids = [candidate.expert_id for candidate in candidates]
        if len(set(ids)) != len(ids):
            raise MessageRejected("the server's match answer names an expert twice")
        contents = await self._api.get_experts(round_number, ids) if ids else {}
        if not contents.keys() <= set(ids):
            raise MessageRejected("the server sent other experts than were asked for")
        if len(contents) < len(ids):  # a member left, or has other keys since the round was opened
            _logger.warning("%d of %d experts are not there any more", len(ids) - len(contents), len(ids))
        return contents

    def _nearest(self, experts: Sequence[Array], own: Array) -> list[Array]:
        """Of what was lent, the K whose contexts are nearest to `own (n, d)` in Euclidean distance, nearest first."""
        squared = [float(((self._context(expert).astype(np.float64) - own) ** 2).sum()) for expert in experts]
        return [experts[row] for row in np.argsort(squared, kind="stable")[: self._n_experts]]

    def _context(self, lent: Array) -> Array:
        """The context `(n, d)` of what was lent."""
        return lent[: self._shape[0]]

    async def _expert(self, candidate: Candidate, content: bytes, round_number: int) -> Array | None:
        """What a peer lends; None, with a warning, for one that cannot be used: its author must not stop others."""
        expert_id = candidate.expert_id
        try:
            lent = self._experts.unpack(content, expert_id, round_number)
            if not self._fetch_all:
                self._matching.check(candidate, self._context(lent))
            return lent
        except MessageRejected as error:
            _logger.warning("%s; this round goes on without it", one_line(str(error)))
            with suppress(MessageRejected):  # the report is for the operator; this client does not depend on it
                await self._api.report_expert(rnd.ReportExpertRequest(round=round_number, expert_id=expert_id))
            return None
