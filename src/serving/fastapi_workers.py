"""The processes of the FastAPI server: uvicorn in each, with an end that loses no request."""

import asyncio
import logging
import logging.config
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from src.serving.fastapi_metrics import SHARED_FOLDER
from src.serving.fastapi_requests import JsonLines
from src.serving.fastapi_service import Service

ENDINGS = (signal.SIGTERM, signal.SIGINT)
QUIET = 3.0  # seconds in which an open connection may still send a request, once the server is told to end
PATIENCE = 30  # seconds for the requests that are being answered then
KEEP_ALIVE = 75  # seconds; longer than the 60 for which nginx keeps a connection, so that it is nginx that closes it
UNUSABLE = 2  # exit status of a worker that would fail again
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"lines": {"()": JsonLines}},
    "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "lines"}},
    "root": {"handlers": ["stdout"], "level": "INFO"},
    # When uvicorn starts and ends is said here.
    "loggers": {"uvicorn": {"level": "WARNING"}},
}
log = logging.getLogger("fastapi_app")


class DrainingServer(uvicorn.Server):
    """Stops to listen first, and closes the open connections only when they have been quiet for a while: uvicorn alone
    closes one whose next request is on its way."""

    def __init__(self, app: ASGIApp, service: Service):
        config = uvicorn.Config(
            app,
            http="httptools",
            loop="asyncio",
            ws="none",
            log_config=LOGGING,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=PATIENCE,
        )
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own, and a line of log that says where."""
        await super().startup(sockets)
        addresses = [listener.getsockname()[:2] for listener in sockets or ()]
        log.info("ready", extra={"fields": {"pid": os.getpid(), "listening": addresses}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take what waits to connect, refuse the rest, then end each connection with its next answer."""
        self.service.stopping = True
        connections = self.server_state.connections
        log.info("stopping", extra={"fields": {"pid": os.getpid(), "connections": len(connections)}})
        await self.accept_waiting(sockets or [])
        for server in self.servers:
            server.close()
        told = time.monotonic()
        while connections and time.monotonic() < told + QUIET:
            # Not at once: while another worker listens, a client whose connection ends would go there.
            self.service.closing = time.monotonic() > told + QUIET / 3
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)

    async def accept_waiting(self, sockets: list[socket.socket]) -> None:
        """Take the connections that the system has already made for us; closing the listener would break them."""
        config, loop = self.config, asyncio.get_running_loop()
        for listener in sockets:
            with suppress(BlockingIOError):
                while True:
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    protocol = config.http_protocol_class(config, self.server_state, self.lifespan.state)
                    await loop.connect_accepted_socket(lambda protocol=protocol: protocol, connection)


def listen_on(host: str, port: int) -> socket.socket:
    """A socket with that address, which refuses connections until a server takes it. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) only where the protocol is named; each took 40 ms otherwise.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError:
        found.close()
        raise
    return found


def end_on_signals() -> None:
    """SIGTERM and SIGINT end this process with status 0; while uvicorn runs they are uvicorn's. A worker whose
    supervisor was killed gets SIGTERM too."""
    for number in ENDINGS:
        signal.signal(number, lambda *_: sys.exit(0))
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:

        def follow() -> None:
            supervisor.join()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=follow, daemon=True).start()


def supervise(work: Callable[..., None], arguments: Any, listener: socket.socket, count: int) -> int:
    """Run ``work(arguments, listener)`` in ``count`` processes until SIGTERM or SIGINT; one that dies is replaced.

    Returns the exit status: UNUSABLE when a worker ends with it, else 0. The workers count metrics together.
    """
    logging.config.dictConfig(LOGGING)
    ended: list[int] = []
    for number in ENDINGS:
        signal.signal(number, lambda number, _: ended.append(number))
    context, status = multiprocessing.get_context("spawn"), 0

    def start() -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(arguments, listener))
        process.start()
        return process

    with TemporaryDirectory() as folder:
        os.environ[SHARED_FOLDER] = folder
        workers = [start() for _ in range(count)]
        while status == 0 and not ended:
            time.sleep(0.5)
            for index, worker in enumerate(workers):
                if worker.exitcode == UNUSABLE:
                    status = UNUSABLE
                elif worker.exitcode is not None:
                    log.error(f"worker {worker.pid} ended with status {worker.exitcode}; another one starts")
                    workers[index] = start()
        listener.close()  # else connections would still be taken here, and answered by nobody
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(QUIET + 2 * PATIENCE)
            if worker.exitcode is None:
                log.error(f"worker {worker.pid} did not end; it is killed")
                worker.kill()
                worker.join()
    return status
