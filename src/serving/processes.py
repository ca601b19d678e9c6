"""What a server's processes use: memory as PSS, processor time. Works for processes of this machine and this user."""

from urllib.parse import urlsplit

import psutil

from src.serving.client import LOOPBACK


def server_process(url: str, workers: set[int]) -> psutil.Process | None:
    """The process that listens at ``url`` and from which ``workers`` (PIDs, as management tells them) descend.

    None when it is not to be seen: on another host, another user's, in a container, behind a proxy.
    """
    address = urlsplit(url)
    if address.hostname not in LOOPBACK:
        return None
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == address.port and connection.pid:
            process = psutil.Process(connection.pid)
            if workers <= {one.pid for one in family(process)}:
                return process
    return None


def family(process: psutil.Process) -> list[psutil.Process]:
    """``process`` and all that descends from it; empty when it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(processes: list[psutil.Process]) -> int:
    """Bytes of memory: the sum of the PSS, which counts a page that several processes share once."""
    total = 0
    for process in processes:
        try:
            used = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        total += getattr(used, "pss", used.uss)  # only Linux knows the PSS
    return total


def processor_seconds(processes: list[psutil.Process]) -> dict[int, float]:
    """Seconds of processor time that each used since it started, by PID."""
    seconds = {}
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds[process.pid] = times.user + times.system
    return seconds
