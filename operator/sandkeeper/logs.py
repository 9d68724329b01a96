"""Logging with stable keys, for people (console) or machines (JSON, one object a line).

Keys: ts, level, logger, msg, and where they are known namespace, name, uid, node, instance, action, error.
They come from `extra=`, from `bound` (whoever works on an object binds its name once), and from kopf's own
records. Nothing of a spec or a credential is ever logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

_FIRST = ("namespace", "name", "uid", "node", "instance", "action", "error")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# What kopf hangs on its records besides k8s_ref.
_KOPF = frozenset({"k8s_ref", "k8s_skip", "settings", "color_message"})

_bound: ContextVar[Mapping[str, Any]] = ContextVar("sandkeeper_log_fields", default={})  # noqa: B039 - never changed


@contextlib.contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Put these fields on every record logged inside, tasks started inside included."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a record, the well-known first."""
    found: dict[str, Any] = dict(getattr(record, "bound_fields", None) or _bound.get())
    reference = getattr(record, "k8s_ref", None)
    if isinstance(reference, Mapping):
        found |= {key: reference[key] for key in ("namespace", "name", "uid") if reference.get(key)}
    for key, value in vars(record).items():
        if key not in _STANDARD and key not in _KOPF and key != "bound_fields" and not key.startswith("_"):
            found[key.removeprefix("object_")] = value
    first = {key: found.pop(key) for key in _FIRST if key in found}
    return {**first, **found}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; what JSON has no type for goes in as text."""
        entry = {
            "ts": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
            **fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """`time level logger: message key=value …`"""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and its traceback below."""
        moment = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        extra = "".join(f" {key}={_plain(value)}" for key, value in fields(record).items())
        line = f"{moment} {record.levelname:<7} {record.name}: {record.getMessage()}{extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _plain(value: Any) -> str:
    text = str(value)
    return (
        json.dumps(text, ensure_ascii=False)
        if not text or any(c.isspace() or c == '"' for c in text)
        else text
    )


def configure(style: Literal["console", "json"], level: str) -> None:
    """Send all logging of this process, kopf's included, to standard error in the given style."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Every handled event at INFO and every request at DEBUG are too much to be of use.
    logging.getLogger("kopf.objects").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.captureWarnings(True)
