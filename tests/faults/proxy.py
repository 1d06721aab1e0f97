"""A way to a server on which things go wrong: a proxy that a test tells what to do with the requests to come."""

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["hang", "late", "slow", "reset", "lost", 403, 429, 500]
SLOW_SECONDS = 0.3
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class Proxy:
    """Passes requests on to a server of this machine, or does what ``fault`` says.

    ``hang``: takes the request and never answers. ``late``: passes it on when the test says so, when
    nobody waits for the answer any more. ``slow``: passes it on after a while. ``reset``: cuts the connection.
    ``lost``: passes it on, and cuts the connection instead of answering. A number: answers with that status.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.fault: Fault | None = None
        self.path = ""
        self.hit = threading.Event()
        """Set when a fault was met by a request."""
        self.hits = 0
        """How many requests met a fault."""
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def breaks(self, fault: Fault | None, path: str = "") -> None:
        """From now on, for requests whose path has ``path`` in it."""
        self.hit.clear()
        self.path = path
        self.fault = fault

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.fault if proxy.path in self.path else None
            if fault is not None:
                proxy.hits += 1
                proxy.hit.set()
            if fault in ("hang", "late"):
                proxy.released.wait()
            if fault in ("hang", "reset"):
                return self.cut()
            if isinstance(fault, int):
                self.send_response(fault)
                self.send_header("Retry-After", "3600")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            if fault == "slow":
                proxy.released.wait(SLOW_SECONDS)
            there = http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=120)
            there.request(self.command, self.path, body, dict(self.headers))
            answer = there.getresponse()
            content = answer.read()
            if fault in ("late", "lost"):
                return self.cut()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return None

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        def cut(self) -> None:
            self.close_connection = True
            # With a reset, as when the process at the other end was killed.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """A proxy for as long as the context."""
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
