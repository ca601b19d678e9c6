"""What TorchServe's Java side sends a worker, read faster than TorchServe 0.12 does. docs/performance.md has figures.

A request comes in some thirty fields; TorchServe reads each with two system calls and a call of Python for every part.
"""

import io
import socket
import sys


class FrameReader:
    """Reads from one connection at a time, through a buffer."""

    def __init__(self):
        self.connection: socket.socket | None = None
        self.buffer: io.BufferedReader | None = None

    def install(self, protocol) -> None:
        """Take the place of the readers in ``ts.protocol.otf_message_handler``, the module ``protocol``."""
        protocol._retrieve_buffer = self.read
        protocol._retrieve_inference_msg = self.read_batch

    def read(self, connection: socket.socket, length: int) -> bytes:
        """Exactly ``length`` bytes. Ends the process when there are no more: the Java side has gone."""
        if connection is not self.connection:
            self.connection, self.buffer = connection, connection.makefile("rb", buffering=1 << 16)
        data = self.buffer.read(length)
        if len(data) < length:
            sys.exit(0)  # as TorchServe's own reader does
        return data

    def read_batch(self, connection: socket.socket) -> list[dict]:
        """The requests of one batch, in the form that ``ts.service.Service`` takes.

        A text is its length (4 bytes, big-endian) and its bytes; the length -1 ends a list. A batch is a list of
        requests: an id, a list of headers (name, value), a list of fields (name, content type, value).
        """

        self.read(connection, 0)  # makes the buffer
        take = self.buffer.read

        def text() -> bytes | None:
            head = take(4)
            if len(head) < 4:
                sys.exit(0)
            length = int.from_bytes(head, "big", signed=True)
            return take(length) if length >= 0 else None

        batch = []
        while (identifier := text()) is not None:
            headers, fields = [], []
            while (name := text()) is not None:
                headers.append({"name": name, "value": text()})
            while (name := text()) is not None:
                fields.append({"name": name.decode(), "contentType": text().decode(), "value": text()})
            batch.append({"requestId": identifier, "headers": headers, "parameters": fields})
        return batch
