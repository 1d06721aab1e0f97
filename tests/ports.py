"""Ports for servers that tests start."""

import socket

import psutil


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def answers(port: int) -> bool:
    """Whether somebody listens on this machine's port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def listening(root: int) -> list[tuple[str, str, int]]:
    """Which of the processes that stem from ``root`` listen, by name, and on what address and port."""
    first = psutil.Process(root)
    found = []
    for process in (first, *first.children(recursive=True)):
        try:
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((process.name(), connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            continue
    return found
