"""Errors that a user can cause or mend, each with a process exit code of its own.

Every error is one line: what is wrong, then what to do. The command lines print that line and exit with `exit_code`;
a traceback means a defect of the program. `docs/exit-codes.md` lists the codes; a test keeps the two in step.
"""

from __future__ import annotations

from typing import ClassVar


class PfedError(Exception):
    """Base of all errors that are reported to the user as one line.

    `exit_code` is the exit status of the command lines; `wire_code` is the name under which the error travels in a
    gRPC status, so that a client can raise the same class that the server raised.
    """

    exit_code: ClassVar[int] = 1

    @classmethod
    def wire_code(cls) -> str:
        """The name under which the error travels: that of the class."""
        return cls.__name__


class PlanError(PfedError):
    """The federation plan is missing, unreadable or invalid."""

    exit_code = 10


class PlanMismatch(PfedError):
    """The plan of the server is not the one that this client agreed to."""

    exit_code = 11


class DataError(PfedError):
    """The image data cannot be used: missing, unreadable, broken, or too little of it."""

    exit_code = 20


class ClassNamesMismatch(PfedError):
    """The class names of the data are not those of the plan."""

    exit_code = 21


class BackboneError(PfedError):
    """The CLIP model cannot be built or its weights cannot be had."""

    exit_code = 30


class CheckpointMismatch(PfedError):
    """A file of weights belongs to another model, or a saved client state to another backbone or plan."""

    exit_code = 31


class IdentityError(PfedError):
    """A certificate or key is missing, unreadable, expired, of the wrong role or from another authority."""

    exit_code = 40


class InsecureTransport(PfedError):
    """Plain text was asked for where it is not allowed, or one side speaks TLS and the other does not."""

    exit_code = 41


class ServerUnreachable(PfedError):
    """No connection to the server for as long as the client was told to try."""

    exit_code = 50


class AddressInUse(PfedError):
    """The address to listen on is taken or cannot be bound."""

    exit_code = 51


class NameTaken(PfedError):
    """Another client takes part under this name."""

    exit_code = 52


class MessageRejected(PfedError):
    """A message was malformed, too large, of the wrong shape, or not allowed in this phase."""

    exit_code = 53


class NotAMember(PfedError):
    """The caller has not joined this federation, or its membership ended."""

    exit_code = 54


class TooManyCalls(PfedError):
    """The caller asks for more than one identity may at a time; worth another try after a pause."""

    exit_code = 55


class StateError(PfedError):
    """The saved state is corrupted, of a newer version, or of another federation."""

    exit_code = 60


class StateLocked(PfedError):
    """Another process uses this state directory."""

    exit_code = 61


class AuditError(PfedError):
    """An audit log does not hold together: lines were changed, moved, added or left out, or it is none."""

    exit_code = 62


class ProtectionUnavailable(PfedError):
    """A protection was asked for that this version cannot give. Nothing runs with less than was asked for."""

    exit_code = 70


class BudgetExhausted(PfedError):
    """What differential privacy allows this client's data has been spent. Nothing more of it is released."""

    exit_code = 71


class BudgetTooSmall(PfedError):
    """No noise that leaves anything to learn keeps within the epsilon and delta that were asked for."""

    exit_code = 72


class LedgerError(PfedError):
    """The ledger of what was released of the images is damaged, was changed, or is older than the server knows it."""

    exit_code = 73


class BenchError(PfedError):
    """A file of `pfed bench` cannot be read, written or used, or what it measures beside this program fails."""

    exit_code = 80


def by_wire_code(code: str) -> type[PfedError]:
    """The error class that travels as `code`; `PfedError` itself for a code this version does not know."""
    return next((cls for cls in PfedError.__subclasses__() if cls.wire_code() == code), PfedError)
