"""An HTTP proxy before an S3 server that counts requests and does harm: errors, stalls and lost connections."""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

STALL_SECONDS = 3.0


class Request(NamedTuple):
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    sent_bytes: int


Matches = Callable[[Request], bool]


class Fault:
    """What to do to the next requests that match, until `times` are used up."""

    def __init__(self, matches: Matches, harm: str, times: int):
        self.matches, self.harm, self.times, self.done = matches, harm, times, 0


class Proxy:
    """Where it listens, what it has seen, and the faults to come."""

    def __init__(self, backend: str):
        self.backend, self.endpoint = backend, ""
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.received_bytes = 0  # of answers' bodies
        self.lock = threading.Lock()

    def inject(self, harm: str, times: int = 1, matches: Matches = lambda _: True) -> Fault:
        """Do harm to the next requests.

        Args:
            harm: `reset` after half of the body, `cut` in the middle of the answer, `stall`, `503`, or
                `400 ExpiredToken` and the like: a status with an S3 error code.
        """
        fault = Fault(matches, harm, times)
        self.faults.append(fault)
        return fault

    def count(self, method: str, part: str = "") -> int:
        """How many requests there were with this method and this text in the path."""
        return sum(request.method == method and part in request.path for request in self.requests)

    def harm_to(self, request: Request) -> str | None:
        """Note a request; the harm to do to it."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.done < fault.times and fault.matches(request):
                    fault.done += 1
                    return fault.harm
        return None


@contextlib.contextmanager
def faulty_proxy(backend: str) -> Iterator[Proxy]:
    """A proxy before the server at `backend`."""
    proxy = Proxy(backend)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = _Server(("127.0.0.1", 0), handler)
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Lost connections are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def _relay(self) -> None:
        length, headers = int(self.headers.get("Content-Length") or 0), dict(self.headers.items())
        harm = self.proxy.harm_to(Request(self.command, self.path, headers, length))
        if harm == "reset":
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if harm == "stall":
            time.sleep(STALL_SECONDS)
            self._reset()
        elif harm and harm != "cut":
            self._refuse(harm)
        else:
            self._forward(body, headers, cut=harm == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay  # noqa: N815

    def _forward(self, body: bytes, headers: dict[str, str], cut: bool) -> None:
        place = urlsplit(self.proxy.backend)
        assert place.hostname
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        hop = {"expect", "connection", "transfer-encoding"}
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if name.lower() not in hop:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        with self.proxy.lock:
            self.proxy.received_bytes += len(data)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in {"connection", "transfer-encoding", "content-length"}:
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self._reset()

    def _refuse(self, harm: str) -> None:
        status, _, code = harm.partition(" ")
        body = (
            f"<?xml version='1.0'?><Error><Code>{code or 'InternalError'}</Code><Message>no</Message></Error>".encode()
        )
        self.send_response_only(int(status))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """End the connection with a reset, as a router does that forgot it."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing: the requests are kept."""
