"""The log as lines of JSON."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from gemmart.terminal import Messages

log = logging.getLogger("gemmart.server")


class JsonFormatter(logging.Formatter):
    """One object a record: time, level, logger, message; what its `fields` has; the traceback of an error."""

    is_json = True

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class LoggedMessages(Messages):
    """Messages that become part of the log."""

    def note(self, text: str) -> None:
        if not self.quiet:
            log.info(text)

    def say(self, text: str) -> None:
        log.warning(text)

    def warn(self, text: str) -> None:
        self.say(text)
