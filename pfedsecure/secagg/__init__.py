"""Secure aggregation: the server learns the weighted mean of a cohort's vectors, and nothing else about them.

The protocol is that of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS
2017), in its form against active adversaries, with signed keys, double masking and a signed set of survivors; above
`Parameters.complete_up_to` clients on a sparse random graph as in Bell et al. (CCS 2020), whose parameters `bounds`
derives. A round has five steps (`Step`): clients send what `client.ClientRound` gives out, the server stores it and
answers with what `server.ServerRound` makes of its store, and `result` is the outcome. No transport, no clock, no disk
in here: callers bring them, and time comes in as an argument.

    step        a client sends                             so that
    ADVERTISE   two X25519 keys, a commitment to a seed,   everybody has the same authentic keys for this federation,
                signed with its TLS identity               round, plan and model
    SHARE       Shamir shares of seed and mask key,        a client that drops out takes nothing with it
                sealed to each holder
    MASK        its vector + its own mask                  the pairwise masks cancel in the sum over all clients
                +- a mask for each partner
    CONFIRM     a signature of who survived                all clients unmask the same sum
    UNMASK      for each client one share: of a            the server can remove own masks, and pairwise masks that
                survivor's seed or another's mask key      lost their other half

Guaranteed, for a client that follows the rules and takes part in one cohort of n clients:

- Against the server and fewer than n / 3 of the cohort's clients working together, whatever they send, drop, replay,
  invent or pretend: they learn of the other survivors' vectors, at most, the sum over *all* of these others, who are
  more than a third of the cohort. Computationally (X25519, AES-256, SHA-256, ECDSA P-256), and given the certificate
  authority. On the sparse graph, with less than `Assumptions.corrupt` n clients colluding, but for a probability of
  2**-`Assumptions.security_bits` a round; `bounds` says why it holds although the server picks who drops out.
- Weights, and who sent metrics, are hidden in the same way: the server sees their sums alone.
- Clients that were given different models, plans, rounds, rosters or participants have no mask in common, so that no
  sum of theirs can be unmasked; of models and rosters they notice it before they send anything about their data.
- The sum is exact but for the rounding that `encoding` documents, or there is none. A client that gives out or deals
  wrong shares is named (`Outcome.culprits`, `RoundLost.culprits`, or the dealer in the error of its holders).
- Ephemeral secrets are of use in their round alone. An identity key that is stolen later opens no recorded round.

Not guaranteed, by this or any protocol of its kind:

- Availability. The server can end any round, and so can any one client: with a masked input that is none, and by
  dealing wrong shares for the holders who find out. A lost round reveals nothing.
- Sound inputs. A client may put in anything within the clip and the largest weight, and, if it makes up its masked
  input, anything with which the sum passes `Encoding.decode`: also a larger or a negative weight, and with it any mean
  within the clip.
- That the sum itself tells little. Clients who know all inputs but one know that one; the server picks the cohort from
  the certified clients, over and over: `minimum_cohort` must exceed what may collude by what has to hide together, and
  what repeated sums tell is for differential privacy to bound. A metric that only one client sends is that client's.
- Anything once a client's saved state is set back to an older copy within a round (see `client`), or where the
  authority certifies clients that do not exist.
"""

from pfedsecure.secagg.client import ClientRound
from pfedsecure.secagg.credentials import Certificates, Credentials, certificates_under
from pfedsecure.secagg.encoding import Encoding, Update, WeightedMean
from pfedsecure.secagg.server import ServerRound
from pfedsecure.secagg.setting import Assumptions, Parameters, RoundSetting
from pfedsecure.secagg.sharing import Sharing
from pfedsecure.secagg.steps import Step
from pfedsecure.secagg.unmasking import Outcome, RoundLost, result

__all__ = [
    "Assumptions",
    "Certificates",
    "ClientRound",
    "Credentials",
    "Encoding",
    "Outcome",
    "Parameters",
    "RoundLost",
    "RoundSetting",
    "ServerRound",
    "Sharing",
    "Step",
    "Update",
    "WeightedMean",
    "certificates_under",
    "result",
]
