"""What a storage raises that may pass: a full disk, a locked database or one that is away, a server that was faster."""

from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pfed_server.store import StateOvertaken

STORAGE_FAULTS = (OperationalError, InterfaceError, InternalError, PoolTimeout, StateOvertaken, OSError)
