"""Start an S3 server on this machine, and a connection to it that breaks."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

_SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.disable()
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test closes it
server.stop()
"""


_ACCESS = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request"}


class S3Server:
    """A server with one bucket, named `bucket`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"
        self._put("/bucket", b"")

    def _put(self, path: str, data: bytes) -> None:
        request = urllib.request.Request(self.endpoint + path, data, _ACCESS, method="PUT")
        request.add_header("Content-Type", "application/octet-stream")
        with urllib.request.urlopen(request, timeout=60):
            pass

    def store(self, key: str, data: bytes) -> str:
        """Store a file, and return its URL."""
        self._put(f"/bucket/{key}", data)
        return f"s3://bucket/{key}"

    def get(self, key: str) -> bytes:
        request = urllib.request.Request(f"{self.endpoint}/bucket/{key}", headers=_ACCESS)
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content

    def keys(self, prefix: str = "") -> list[str]:
        query = urllib.parse.urlencode({"list-type": 2, "prefix": prefix})
        with urllib.request.urlopen(f"{self.endpoint}/bucket?{query}", timeout=60) as answer:
            return re.findall(r"<Key>(.*?)</Key>", answer.read().decode())

    def store_folder(self, folder: Path, key: str) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                self.store(f"{key}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://bucket/{key}"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run moto's S3 server in a process of its own."""
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            yield S3Server(int(server.stdout.readline()))
        finally:
            server.communicate()


class BreakingProxy:
    """Pass connections on to a port, and break each after `most_bytes` of the answers.

    breaks: how many connections to break; all others live. on_break: called after each. most_in_all: bytes of answers
    after which no connection works. on_request: called with each piece of a request; it may block, and what it returns
    is sent instead of the server's answer.
    """

    def __init__(self, port: int, most_bytes: int, breaks: int | None = None) -> None:
        self.target = port
        self.most_bytes = most_bytes
        self.left = breaks
        self.broken = 0
        self.most_in_all = 1 << 60
        self.passed_bytes = 0
        self.on_break: Callable[[], None] = lambda: None
        self.on_request: Callable[[bytes], bytes | None] = lambda data: None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                self._open += [client, server]
                self._start(self._pass_on, client, server, False)
                self._start(self._pass_on, server, client, True)

    def _pass_on(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if is_answer and self.left != 0:
                    data = data[: self.most_bytes - passed]
                if self.passed_bytes > self.most_in_all:
                    break
                if not is_answer and (answer := self.on_request(data)) is not None:
                    source.sendall(answer)
                    break
                passed += len(data)
                target.sendall(data)
                if is_answer:
                    self.passed_bytes += len(data)
                if is_answer and self.left != 0 and passed >= self.most_bytes:
                    self.broken += 1
                    self.left = None if self.left is None else self.left - 1
                    self.on_break()
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End all connections and threads."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
        for end in self._open:
            end.close()


@contextlib.contextmanager
def breaking_proxy(port: int, most_bytes: int, breaks: int | None = None) -> Iterator[BreakingProxy]:
    """Yield a proxy, and close it afterwards."""
    proxy = BreakingProxy(port, most_bytes, breaks)
    try:
        yield proxy
    finally:
        proxy.close()
