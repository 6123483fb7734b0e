"""Log lines: one a request, and those of the libraries, all in one form and none with what nobody may read.

No secret key, token, phone number or DTMF digit is ever logged: callers pass ids, codes and times only, and of an
unexpected exception its kinds and places are logged, not its text, which may quote a value.
"""

import asyncio
import logging
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO

import orjson
import structlog
from structlog.typing import EventDict, Processor

from voicetx.settings import LogFormat, LogLevel

_request_log = structlog.get_logger("voicetx.request")
_json_lines: "_Lines | None" = None


def configure_logging(log_format: LogFormat, log_level: LogLevel) -> None:
    """Send the log lines of this process, of a level and above, to standard output, as JSON or as text for people."""
    global _json_lines  # noqa: PLW0603 - logging is the process's own, as structlog's configuration is
    out = _Lines(sys.stdout.buffer)
    lowest = logging.getLevelNamesMapping()[log_level.upper()]
    _json_lines = out if log_format is LogFormat.JSON and lowest <= logging.INFO else None
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        describe_exception,
    ]
    if log_format is LogFormat.JSON:
        lines: list[Processor] = [structlog.processors.JSONRenderer(serializer=orjson.dumps, default=repr)]
        foreign: Processor = structlog.processors.JSONRenderer(serializer=_dump_text)
    else:
        foreign = structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
        lines = [foreign, _encode]
    structlog.configure(
        processors=[*shared, *lines],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=structlog.BytesLoggerFactory(out),  # type: ignore[arg-type] # what it uses
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, foreign],
        )
    )
    logging.basicConfig(handlers=[handler], level=lowest, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # a request has its line already
    logging.getLogger("alembic").setLevel(logging.WARNING)


def log_request_lines(lines: Iterable[dict[str, Any]]) -> None:
    """Write the lines of requests that end now, in the form of all the others; each has its `event`.

    As JSON they take a short cut past structlog, whose chain costs three times as much, once for every update.
    """
    if _json_lines is None:
        for line in lines:
            _request_log.info(**line)
        return
    ending = {"level": "info", "timestamp": datetime.now(UTC)}
    options = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE
    _json_lines.write(b"".join([orjson.dumps(line | ending, option=options) for line in lines]))
    _json_lines.flush()


class _Lines:
    """Writes lines out together: those of one turn of the event loop at its end, without a loop each at once.

    Lines that cannot be written, as on a disk that is full, are lost: there is nowhere to say so, and whoever is
    waiting for an answer is to get it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._is_flush_due = False

    def write(self, line: bytes) -> None:
        with suppress(OSError):
            self._file.write(line)

    def flush(self) -> None:
        if self._is_flush_due:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._flush_now()
        else:
            self._is_flush_due = True
            loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._is_flush_due = False
        with suppress(OSError):
            self._file.flush()


def describe_exception(_logger: object, _method: str, line: EventDict) -> EventDict:
    """Replace `exc_info` by the kinds of the exceptions and the places they went through."""
    raised = line.pop("exc_info", None)
    if raised is True:
        raised = sys.exc_info()
    if isinstance(raised, tuple):
        raised = raised[1]
    if isinstance(raised, BaseException):
        line["exception"] = [_describe(exception) for exception in _chain(raised)]
    return line


def _chain(exception: BaseException | None) -> Iterable[BaseException]:
    seen: set[int] = set()
    while exception is not None and id(exception) not in seen:
        seen.add(id(exception))
        yield exception
        exception = exception.__cause__ or (None if exception.__suppress_context__ else exception.__context__)


def _describe(exception: BaseException) -> dict[str, Any]:
    frames = traceback.extract_tb(exception.__traceback__)
    return {
        "type": f"{type(exception).__module__}.{type(exception).__qualname__}",
        "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]],
    }


def _encode(_logger: object, _method: str, line: Any) -> Any:
    return line.encode()


def _dump_text(line: EventDict, **_: object) -> str:
    return orjson.dumps(line, default=repr).decode()
