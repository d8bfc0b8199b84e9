"""Start the process that copies checkpoints, give it requests, and receive its replies.

Must not know what the requests mean. The replies are read by one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.copies.remote_folder import CopyError
from tinytrain_dist.utils.json_files import parse_json, to_json

MODULE = "tinytrain_dist.checkpoint.copies.worker"
# A request without any reply for so long has hung: libraries give a connection up after one or two minutes.
SILENT_SECONDS = 900.0
POLL_SECONDS = 0.5

OnReply = Callable[[dict[str, Any]], None]


class WorkerProcess:
    """A process that carries out one request after another."""

    def __init__(self, opening: dict[str, Any]) -> None:
        """Start the process, and let it open a URL: see CopyWorker.open. Its errors come with the next request."""
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries print there what is secret
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # a terminal's Ctrl-C is for rank 0
        )
        self._buffer = b""
        self._unread = 0  # replies that end a request and were not read
        self._send({"do": "open", **opening})

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    @property
    def closed(self) -> bool:
        """Whether the process has ended, or was ended."""
        return self._process.poll() is not None

    def request(
        self,
        request: dict[str, Any],
        on_reply: OnReply = lambda reply: None,
        given_up: Callable[[], bool] = lambda: False,
        limit_seconds: float | None = None,
    ) -> dict[str, Any]:
        """Carry out a request and return its result.

        on_reply: called with each reply before the last. given_up: asked about twice a second; if it is true, the
        process is killed. limit_seconds: for the whole request. Errors: CopyError.
        """
        self._send(request)
        deadline = None if limit_seconds is None else time.monotonic() + limit_seconds
        last_reply = time.monotonic()
        while True:
            reply = self._next(POLL_SECONDS)
            now = time.monotonic()
            if reply is not None:
                last_reply = now
                if reply["kind"] == "failed":
                    self.close()  # a new process reads new credentials, and has no half-broken connections
                    raise CopyError(str(reply["text"]), bool(reply["may_pass"]), str(reply["concerns"]))
                if reply["kind"] == "done":
                    self._unread -= 1
                    if not self._unread:
                        return reply
                else:
                    on_reply(reply)
            if given_up():
                self.close()
                raise CopyError("given up", may_pass=True)
            if now - last_reply > SILENT_SECONDS or (deadline is not None and now > deadline):
                self.close()
                raise CopyError(f"the store did not answer for {now - last_reply:.0f} s", may_pass=True)

    def close(self) -> None:
        """Kill the process. What it has sent stays; a copy is complete or not."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _send(self, request: dict[str, Any]) -> None:
        self._unread += 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((to_json(request) + "\n").encode())
            self._process.stdin.flush()
        except (OSError, ValueError):
            self._fail()

    def _fail(self) -> None:
        code = self._process.poll()
        self.close()
        ended = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
        raise CopyError(f"the process that copies {ended}", may_pass=True)

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """Return the next reply, or None if there is none in time. Errors: CopyError if the process has ended."""
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                self._process.wait()
                self._fail()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = parse_json(line)
        return reply
