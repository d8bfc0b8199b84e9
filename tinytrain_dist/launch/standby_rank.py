"""Be ready to become a rank: import what training needs, and wait until the agent says which rank to be.

    python -m tinytrain_dist.launch.standby_rank MODULE...      (only an agent starts this, see launch/standby_pool.py)

When nodes come and go, all ranks are started again, and every new process would first import torch. That takes about
3 s of processor time. Must not read settings, or anything else that may differ when this process becomes a rank.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import socket
import sys
from pathlib import Path

from tinytrain_dist.reliability.start_times import begin_as_rank
from tinytrain_dist.reliability.stop_requests import install_signal_handlers
from tinytrain_dist.utils.json_files import parse_json

PROGRAM = "tinytrain_dist.train"
OWN_NAME = Path("/proc/self/comm")  # how `ps` and `top` name this process
STANDBY_NAME = "standby"


def main(modules: list[str]) -> None:
    """Import modules, wait for a rank, and train as it. Ends well if the agent ends before."""
    install_signal_handlers()  # as every rank does first; a signal that comes now is still known when this is a rank
    agent = socket.socket(fileno=int(os.environ["TINYTRAIN_STANDBY"]))
    name = _name_process(STANDBY_NAME)
    for module in modules:
        importlib.import_module(module)
    order = b""
    with agent, contextlib.suppress(OSError):  # the agent has ended
        agent.shutdown(socket.SHUT_WR)  # tells the agent that everything is imported; a byte could remain unread there
        order = b"".join(iter(lambda: agent.recv(2**16), b""))
    if not order:
        os._exit(0)
    given = parse_json(order)
    os.environ.clear()
    os.environ.update(given["environment"])
    _name_process(name)
    begin_as_rank()
    sys.argv[1:] = given["arguments"]
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)


def _name_process(name: str) -> str:
    """Name this process; return its former name. Where the system has no such names, nothing happens."""
    former = name
    with contextlib.suppress(OSError):
        former = OWN_NAME.read_text().strip()
        OWN_NAME.write_text(name)
    return former


if __name__ == "__main__":
    main(sys.argv[1:])
