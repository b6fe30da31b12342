"""Logs as JSON, one object a line, for whatever collects them.

    configure("json")
    _logger.info("round %d opened", 3, extra={"round": 3, "peer": "hospital-a"})

gives {"time": ..., "level": "info", "logger": ..., "message": "round 3 opened", "federation": ..., "round": 3, ...}.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

FIELDS = ("round", "peer")
"""What a line of a log may be about, besides the federation; given as `extra`."""


PRIVATE = "something about this client's own images or prompt; it is told on a terminal, with --log-format text"
"""In place of a message whose `extra` says `private`: JSON is made to be sent elsewhere."""


class JsonFormatter(logging.Formatter):
    """Every record on one line of JSON, whatever is in it; a traceback is in the field `traceback`."""

    def __init__(self) -> None:
        super().__init__()
        self.federation = ""
        """Whose log it is; empty until that is known."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON for `record`. Of one that is marked `private` it says only that there was something."""
        values: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": PRIVATE if getattr(record, "private", False) else record.getMessage(),
        }
        if self.federation:
            values["federation"] = self.federation
        values |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def configure(form: LogFormat) -> None:
    """Have this process log to standard error from INFO on: `text` with the time of day before each message."""
    if form == "text":
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def json_formatter() -> JsonFormatter | None:
    """That of this process, if it logs JSON."""
    formatters = (handler.formatter for handler in logging.getLogger().handlers)
    return next((formatter for formatter in formatters if isinstance(formatter, JsonFormatter)), None)
