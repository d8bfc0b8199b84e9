"""`tinytrain store`: serve the list of nodes of an elastic run, on a machine that outlives its nodes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.errors import ConfigError


def store(port: int = 29400, parent: bool = False) -> int:
    """Serve the list of nodes for `tinytrain train --store HOST:PORT`, until Ctrl-C or SIGTERM.

    Run it on a machine that outlives the nodes: if it is lost, the run saves and ends. It needs about 250 MB of memory
    and hardly any time. One store can serve several runs, with a different --rdzv-id each.

    Args:
        port: TCP port, on all addresses of this machine (0: a free one).
        parent: End when the process that started this one ends, as in a batch script.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())
    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port: {port} is not a TCP port; give a number from 1 to 65535, or 0 for a free one")
    from tinytrain_dist.distributed.torchrun_internals import serve_store  # imports torch, which takes seconds

    try:
        served = serve_store(port)
    except RuntimeError as error:
        raise ConfigError(f"--port: {port} cannot be used ({str(error).splitlines()[0]}); give another one") from None
    print(f"tinytrain store: nodes join with --store {socket.gethostname()}:{served.port}", flush=True)
    started_by = os.getppid()
    while not stop.wait(1.0):
        if parent and os.getppid() != started_by:
            break
    sys.stdout.flush()
    os._exit(0)  # at once: the threads of the server would be waited for


def main(args: list[str]) -> int:
    """Run `tinytrain store`."""
    return call_verb(store, "store", args)
