"""A real S3 server (moto's) in a process of its own, and a proxy before it that can be slow, cut, hang or be gone.

All on 127.0.0.1. moto keeps objects in memory: who kills it puts them again, and they have the same ETag.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest

BUCKET = "images"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "made-up",
    "AWS_SECRET_ACCESS_KEY": "made-up",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
"""For processes that read from the server."""

UNSET = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION")

# moto wants a signature where an object is there already, and looks at none of it.
_SIGNED = "AWS4-HMAC-SHA256 Credential=made-up/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """moto's S3 server."""

    def __init__(self) -> None:
        self.port = 0
        self.objects: dict[str, bytes] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, on a port of its own, with all objects that were put ever."""
        self.port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                self._request("PUT", f"/{BUCKET}")
                break
            except OSError:
                assert time.monotonic() < deadline, "moto does not start"
                assert self._process.poll() is None, "moto ended"
                time.sleep(0.05)
        for key, data in self.objects.items():
            self._request("PUT", f"/{BUCKET}/{key}", data)

    def put(self, key: str, data: bytes) -> None:
        """Make an object."""
        self.objects[key] = data
        self._request("PUT", f"/{BUCKET}/{key}", data)

    def delete(self, key: str) -> None:
        """Remove an object."""
        del self.objects[key]
        self._request("DELETE", f"/{BUCKET}/{key}")

    def authenticate(self, on: bool) -> None:
        """Check the signatures of requests from now on, or no more."""
        self._request("POST", "/moto-api/reset-auth", b"0" if on else b"1000000000")

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _request(self, method: str, path: str, body: bytes | None = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Authorization": _SIGNED})
            answer = connection.getresponse()
            answer.read()
            assert answer.status < 300, f"{method} {path}: {answer.status}"
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Request:
    """A request that came through: method, path, and bytes asked for, (first, last) or None."""

    method: str
    path: str
    span: tuple[int, int] | None


_HEAD = re.compile(rb"(GET|HEAD|PUT|POST) (\S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", re.S)
_RANGE = re.compile(rb"^range: *bytes=(\d+)-(\d+)", re.I | re.M)


class Proxy:
    """A TCP proxy to the server, on a port that stays. requests: what came; sent: bytes given to clients."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.port = free_port()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._serving: threading.Thread | None = None
        self.clear()
        self.up()

    def clear(self) -> None:
        """As new: nothing counted, nothing broken."""
        self.requests: list[Request] = []
        self.sent = 0
        self.hanging = False
        self.pause_s = 0.0
        self._cuts: list[int] = []

    def uri(self, key: str) -> str:
        """The URI of an object, or a pattern, through this proxy."""
        return f"s3://{BUCKET}/{key}?region=us-east-1&endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def cut_at(self, *sent: int) -> None:
        """Cut all connections once, each time so many bytes have been sent in all: in the middle of an answer."""
        self._cuts = sorted(sent)

    def down(self) -> None:
        """Refuse connections, and cut those there are."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            self._listener.close()
            assert self._serving is not None
            self._serving.join(10)
            self._listener = None
        self.drop()

    def up(self) -> None:
        """Take connections again."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._serving = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
            self._serving.start()

    def drop(self) -> None:
        """Cut all connections, with a reset."""
        with self._lock:
            some, self._open = self._open, set()
        for end in some:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.server.port))
        except OSError:
            client.close()
            return
        with self._lock:
            self._open |= {client, server}
        asks = threading.Thread(target=self._pump, args=(client, server, False), daemon=True)
        asks.start()
        self._pump(server, client, True)
        asks.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        pending = b""
        with suppress(OSError):
            while data := source.recv(64 << 10):
                if answers:
                    while self.hanging:
                        time.sleep(0.02)
                    time.sleep(self.pause_s)
                    if self._cuts and self.sent + len(data) > self._cuts[0]:
                        del self._cuts[0]
                        target.sendall(data[: len(data) // 2])
                        self.drop()
                        break
                    self.sent += len(data)
                else:
                    pending = self._note(pending + data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _note(self, data: bytes) -> bytes:
        at = 0
        for head in _HEAD.finditer(data):
            span = _RANGE.search(head[3])
            wanted = (int(span[1]), int(span[2])) if span else None
            self.requests.append(Request(head[1].decode(), head[2].decode(), wanted))
            at = head.end()
        return data[at:]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """The server, for all tests of this process."""
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, and the environment to read through it. Objects are put by s3.server.put()."""
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    proxy = Proxy(s3_server)
    yield proxy
    proxy.down()
