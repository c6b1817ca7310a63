"""Log lines: JSON where asked for, the request's id on those of a request, and no API key on any."""

import json
import logging
import logging.config
import os
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
VLLM_LEVEL = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()

_CONFIG = Path(__file__).with_name("logging.json")
_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
"""vLLM hands this configuration to uvicorn, and reads it in the processes that it starts."""
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Keeps libraries from writing lines of their own: progress bars, and warnings from C++."""

_hidden: list[str] = []


class JsonFormatter(logging.Formatter):
    """One object a line: `time` (UTC), `level`, `logger`, `message`, and where there are such `process`,
    `request_id` and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": getattr(record, "vllm_process_name", record.processName),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            entry["request_id"] = _mask(request_id)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def choose_json() -> None:
    """JSON lines from this process and those that it starts; to be called before vLLM is imported."""
    os.environ.update({**_QUIET, _VARIABLE: str(_CONFIG)})
    configure_as_chosen()


def configure_as_chosen() -> None:
    """Does nothing where JSON was not chosen. Processes that vLLM starts call this before they import it."""
    if os.environ.get(_VARIABLE) == str(_CONFIG):
        logging.config.dictConfig(json.loads(_CONFIG.read_text()))
        logging.captureWarnings(True)


def tell(line: str, *, failed: bool = False) -> None:
    """A line to the person who started the server: as it is, or as JSON where that was chosen."""
    logger = logging.getLogger("steersman")
    if logger.handlers:
        logger.log(logging.ERROR if failed else logging.INFO, line)
    else:
        print(line, file=sys.stderr if failed else sys.stdout)


def leave_out(paths: Sequence[str]) -> None:
    """Keeps requests for these paths out of the access log."""
    unwanted = set(paths)

    def wanted(record: logging.LogRecord) -> bool:
        path = record.args[2] if isinstance(record.args, tuple) and len(record.args) > 2 else ""
        return str(path).partition("?")[0] not in unwanted

    logging.getLogger("uvicorn.access").addFilter(wanted)


def hide(secrets: Sequence[str]) -> None:
    """Puts *** for these strings in every log record of this process, wherever it comes from."""
    _hidden.extend(secret for secret in secrets if secret)
    if not _hidden:
        return
    make = logging.getLogRecordFactory()

    def make_without_secrets(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if not record.args:
            record.msg = _mask(record.msg)
        elif isinstance(record.args, tuple):
            record.args = tuple(map(_mask, record.args))
        else:
            record.args = {name: _mask(value) for name, value in record.args.items()}
        return record

    logging.setLogRecordFactory(make_without_secrets)


def _mask(value: Any) -> Any:
    """The value itself where it says nothing that is hidden."""
    text = value if isinstance(value, str) else "" if isinstance(value, int | float | None) else str(value)
    if not any(secret in text for secret in _hidden):
        return value
    for secret in _hidden:
        text = text.replace(secret, "***")
    return text
