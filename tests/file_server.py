"""A real HTTP server for downloads that misbehaves on demand, on a free port of loopback."""

import http.server
import threading
from collections import defaultdict
from contextlib import contextmanager


class FileServer(http.server.ThreadingHTTPServer):
    """Serves ``files`` (name -> bytes) and counts requests; ``faults`` (name -> list) are used up one a request.

    Faults: an int breaks off after that many bytes, "no_range" ignores a Range header, "500" and "404" answer that.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], handler: type[http.server.BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.files = files
        self.faults: dict[str, list] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []  # (name, Range header)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers["Range"]
        self.server.requests.append((name, wanted))
        fault = self.server.faults[name].pop(0) if self.server.faults[name] else None
        if name not in self.server.files or fault in ("404", "500"):
            self.send_error(int(fault or 404))
            return
        content = self.server.files[name]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and fault != "no_range" else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[:fault] if isinstance(fault, int) else body)

    def log_message(self, *arguments) -> None:
        """Quiet: the tests read ``requests`` instead."""


@contextmanager
def serve(files: dict[str, bytes], handler: type[http.server.BaseHTTPRequestHandler] = Handler):
    """A running FileServer, stopped at the end."""
    server = FileServer(files, handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
