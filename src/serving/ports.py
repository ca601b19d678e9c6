"""Which ports of this machine are free: ``python -m src.serving.ports 8080 8081 8082``. Standard library only."""

import contextlib
import socket
import sys


def why_not_free(port: int) -> str:
    """Why nothing could listen on a port of the loopback now; "" when something could."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


def main(argv: list[str]) -> int:
    for port in argv:
        if reason := why_not_free(int(port)):
            print(f"error: port {port} is taken or not allowed ({reason})", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
