"""A road to a server on this machine that can be closed for a while: whoever comes then is answered with an error."""

import socket
import threading
from contextlib import suppress

CLOSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Road:
    """Passes connections on to ``port``; itself it listens on :attr:`port`."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.turned_away = 0
        """How many requests were answered with 503."""
        self._open = True
        self._passing: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """From now on, answer with 503, also on connections that are there already."""
        self._open = False
        for passing in list(self._passing):
            with suppress(OSError):
                passing.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        """Pass connections on again."""
        self._open = True

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if not self._open:
                client.recv(65536)
                self.turned_away += 1
                client.sendall(CLOSED)
                return
            with socket.create_connection(("127.0.0.1", self._behind)) as server:
                both = {client, server}
                self._passing |= both
                back = threading.Thread(target=self._pass, args=(server, client), daemon=True)
                back.start()
                self._pass(client, server)
                back.join()
                self._passing -= both

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
