"""The client's side of encrypted matching.

Guaranteed, computationally, by RLWE with ternary secrets at N = 8192 and a modulus of 180 bits:

- Against a server that follows the protocol: a sketch and a query tell it nothing, nor does an answer. Which experts a
  client then asks for tells it that, unless the client fetches all.
- Against other clients, one query a round: at most one number of fewer than log2(t) + 1 = 29 bits for each expert that
  is matched, the squared distance of its quantised sketch if the query is one. (Experts are lent to the cohort, and a
  member may fetch and open them: this bounds what answers add to that.)

Not guaranteed:

- Anything against a server that makes up answers. The ids that a client asks for are then a function, chosen by the
  server, of what it put there decrypted: some dozens of bits a client and round, of sketches, or of the key that all
  clients share, until it has that and every sketch of the epoch. Only if *all* members fetch all is there nothing to
  make up. Experts stay sealed: theirs is another key. A client notices what does not fit, and stops asking.
- Anything against the server and a client together, as every client has the key: they can open all sketches. With a
  release these have differential privacy of their own: `pfedsecure.matching.release`.
- That matching works in every round. A member that uploads what is no encryption, or evaluation keys of another secret,
  makes distances of others wrong, also to themselves. They say so, and the server separates or replaces what spoils
  them: a few rounds later who did it is alone with it (`pfedsecure.matching.he.pool`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.matching.candidates import Candidate
from pfedsecure.matching.he.answers import unpacked
from pfedsecure.matching.he.encryption import encrypt, quantised, query_polynomial, shortened, sketch_polynomial
from pfedsecure.matching.he.parameters import ANSWER_BYTES, LARGEST, PLAIN_MODULUS, RING, Layout
from pfedsecure.matching.he.secret import SecretKey
from pfedsecure.matching.kept import Kept
from pfedsecure.matching.release import Release, largest_norm, to_grid
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.wire.v1.matching_pb2 import EncryptedAnswer


class HeClientMatching:
    """The client's side for sketches of `sketcher`.

    `secrets` is called for the cohort's secrets at every use: a newer kit may be installed while the client runs.
    `release` adds noise to a sketch before it is encrypted; None leaves it as it is. `kept` outlives a crash.
    """

    def __init__(
        self, sketcher: Sketcher, secrets: Callable[[], CohortSecrets], kept: Kept, release: Release | None
    ) -> None:
        self._sketcher = sketcher
        self._layout = Layout(sketcher.dimension)
        self._secrets = secrets
        self._kept = kept
        self._release = release
        self._key: SecretKey | None = None
        self._asked: NDArray[np.int64] | None = None
        self._published = b""
        self.spoilt = False

    @property
    def epoch(self) -> int:
        """Of the newest cohort secret. Raises IdentityError when it cannot be read."""
        return self._secrets().epoch

    def setup(self) -> bytes:
        """Evaluation keys of this epoch, some 6.7 MB. They open nothing to whoever has them, under RLWE."""
        return self._secret_key().evaluation_keys(self._layout)

    def sketch(self, context: NDArray[np.float32], trained_round: int) -> bytes:
        """A ciphertext of the sketch of `context (n, d)`, whose length tells nothing.

        Made once for each `trained_round` and kept, so that the same bytes are sent after a crash. With a release the
        sketch has its noise before it is encrypted.
        """
        numbers = self._numbers(context, trained_round)
        return self._once("sketch", f"{trained_round}", sketch_polynomial(numbers, self._layout), numbers)

    def query(self, context: NDArray[np.float32], trained_round: int, round_number: int) -> bytes:
        """A ciphertext as `sketch`, kept by `round_number`; `rank` and `check` go by it from then on."""
        self._asked = numbers = self._numbers(context, trained_round)
        self._published = self._kept.find("sketch", self._full_key(f"{trained_round}", numbers)) or b""
        return self._once("query", f"{round_number}", query_polynomial(numbers, self._layout), numbers)

    def asks_for_setup(self, answer: bytes) -> bool:
        """Whether the server has no evaluation keys of this epoch yet. Raises MessageRejected."""
        return _read(answer).keys_wanted

    def rank(self, answer: bytes, k: int) -> list[Candidate]:
        """The `k` nearest by squared distance of quantised sketches, this client itself left out, ties by id.

        Empty where the answer is of another epoch. Sets `spoilt` where the distance to itself is not 0. Raises
        MessageRejected for an answer of another form than the plan's.
        """
        assert self._asked is not None, "there is an answer only to a query"
        message, self.spoilt = _read(answer), False
        if message.epoch != self.epoch:
            return []  # a kit was installed meanwhile, or the pool has nothing of this epoch: nothing to choose from
        distances = self._distances(message, int(self._asked @ self._asked))
        found = self._of_others(message, distances)
        nearest = sorted(found, key=lambda item: (item[1], item[0]))[:k]
        return [Candidate(expert_id, float(squared)) for expert_id, squared in nearest]

    def check(self, candidate: Candidate, context: NDArray[np.float32]) -> None:
        """Raise MessageRejected when the borrowed prompt is not at the distance it was ranked with.

        With a release everything is accepted: the noise of the other's sketch is not known.
        """
        if self._release is not None:
            return  # the noise of the other's sketch is not known
        assert self._asked is not None
        theirs = quantised(self._sketcher.sketch(context), self._sketcher.clip)
        squared = int(((self._asked - theirs) ** 2).sum())
        if candidate.distance != squared:
            raise MessageRejected(
                f"expert {candidate.expert_id[:8]}: its sketch is not that of its prompt, which is at a squared "
                f"distance of {squared}, not {candidate.distance:.0f}"
            )

    def _numbers(self, context: NDArray[np.float32], trained_round: int) -> NDArray[np.int64]:
        """Integers `(m,)` of norm up to R."""
        vector = self._sketcher.sketch(context)
        if self._release is None:
            return quantised(vector, self._sketcher.clip)
        # So small that there is room for the noise.
        radius = int(LARGEST / largest_norm(len(vector), self._release.noise_multiplier))
        numbers = to_grid(vector, self._sketcher.clip, radius)
        if trained_round:
            numbers = shortened(self._release.released(numbers, radius, trained_round))
        return numbers

    def _of_others(self, message: EncryptedAnswer, distances: list[dict[str, int]]) -> list[tuple[str, int]]:
        """Experts and squared distances, without this client itself; and without its block where that is spoilt."""
        if message.HasField("own"):
            own = message.own
            if own.block >= len(distances) or own.lane >= self._layout.stride:
                raise MessageRejected("the server's match answer is not of the form of this plan")
            squared = distances[own.block].pop(message.blocks[own.block].expert_ids[own.lane], None)
            # With an older sketch of this client in the pool the distance to it is none that is known.
            asked_with_it = own.sketch_sha256 == hashlib.sha256(self._published).digest()
            if asked_with_it and squared != 0:
                self.spoilt = True
                distances[own.block].clear()
        return [item for block in distances for item in block.items()]

    def _once(self, what: str, key: str, polynomial: NDArray[np.int64], numbers: NDArray[np.int64]) -> bytes:
        """The ciphertext that was made of `numbers` for `key` before a crash, or a new one, which is kept."""
        secret, full_key = self._secret_key(), self._full_key(key, numbers)
        found = self._kept.find(what, full_key)
        if found is None:
            found = encrypt(polynomial, secret)
            self._kept.keep(what, full_key, found)
        return found

    def _full_key(self, key: str, numbers: NDArray[np.int64]) -> str:
        return f"{key} {self._secret_key().epoch} {hashlib.sha256(numbers.astype('<i8').tobytes()).hexdigest()}"

    def _secret_key(self) -> SecretKey:
        secrets = self._secrets()
        if self._key is None or self._key.epoch != secrets.epoch:
            self._key = SecretKey(secrets, secrets.epoch)
        return self._key

    def _distances(self, message: EncryptedAnswer, own_norm: int) -> list[dict[str, int]]:
        """Squared distance by expert, for each block."""
        stride = self._layout.stride
        for block in message.blocks:
            sizes = len(block.expert_ids), len(block.bodies), len(block.shared)
            if sizes != (stride, ANSWER_BYTES * stride, ANSWER_BYTES * RING):
                raise MessageRejected("the server's match answer is not of the form of this plan")
        if not message.blocks:
            return []
        bodies = np.stack([unpacked(block.bodies) for block in message.blocks])
        shared = np.stack([unpacked(block.shared) for block in message.blocks])
        scaled = self._secret_key().decrypt(bodies, shared, self._layout)
        squared = (scaled * pow(stride, -1, PLAIN_MODULUS) + own_norm) % PLAIN_MODULUS
        return [
            {expert_id: int(squared[row, lane]) for lane, expert_id in enumerate(block.expert_ids) if expert_id}
            for row, block in enumerate(message.blocks)
        ]


def _read(answer: bytes) -> EncryptedAnswer:
    try:
        return EncryptedAnswer.FromString(answer)
    except DecodeError:
        raise MessageRejected("the server's match answer is not an EncryptedAnswer") from None
