"""What the FastAPI server does to every request: an id, a line of log, a limit to the body."""

import logging
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

import orjson
from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from src.serving.fastapi_metrics import Metrics

MAX_BODY = 33_554_432  # bytes, as max_request_size of torchserve/config.properties
MAX_DISCARDED = 4 * MAX_BODY  # bytes read of a body that is too large
MAX_ID = 128  # characters of an X-Request-ID that is passed on
MAX_PATH = 200  # characters of a path that are logged

log = logging.getLogger("fastapi_app")


class Refusal(Exception):
    """A request that is answered with ``status`` and the three keys of an error. ``kind``: a short stable name."""

    def __init__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


class RequestLog:
    """Around the whole app: an X-Request-ID on every answer, one line of log and one count a request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, is_closing: Callable[[], bool]):
        """``is_closing``: whether answers should end their connections."""
        self.app, self.metrics, self.is_closing = app, metrics, is_closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 0
        state = scope.setdefault("state", {})
        state["images"], state["request_id"] = 0, request_id(Headers(scope=scope).get("x-request-id", ""))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = state["request_id"]
                if self.is_closing():
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.metrics.count_status(status)
            fields = {"request_id": state["request_id"], "method": scope["method"], "path": scope["path"][:MAX_PATH]}
            taken = round(1000 * (time.perf_counter() - started), 3)
            log.info("request", extra={"fields": fields | {"status": status, "ms": taken, "images": state["images"]}})


def request_id(sent: str) -> str:
    """``sent`` if it is short and printable, else a new one."""
    return sent if 0 < len(sent) <= MAX_ID and sent.isascii() and sent.isprintable() else uuid.uuid4().hex


async def read_body(request: Request) -> bytes:
    """The whole body. Raises Refusal 413 when it is longer than MAX_BODY."""
    too_large = Refusal(413, "too_large", f"the body has more than {MAX_BODY} bytes; send fewer or smaller images")
    declared = request.headers.get("content-length", "")
    # A smaller one is read to its end: a client that still sends would see a broken connection and no answer.
    most = MAX_BODY if "expect" in request.headers else MAX_DISCARDED
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body, length = bytearray(), 0
    async for part in request.stream():
        length += len(part)
        if length <= MAX_BODY:
            body += part
        else:
            body.clear()
            if length > MAX_DISCARDED:
                break
    if length > MAX_BODY:
        raise too_large
    return bytes(body)


class JsonLines(logging.Formatter):
    """Each record as one line of JSON: time, level, message and, where there are some, its fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()
