"""Tell the user when this node's agent waits for other nodes. torchrun itself waits for minutes and prints nothing."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

from tinytrain_dist.launch.torchrun_options import is_single_node, node_range
from tinytrain_dist.utils.waiting import WaitNotice

LOOK_SECONDS = 1.0


def announce_node_waits(options: argparse.Namespace, ranks_run: Callable[[], bool]) -> None:
    """Print a message from a thread whenever the agent has waited for other nodes for some seconds.

    options: torchrun's. ranks_run: whether ranks run on this node; while they do, the agent waits for nobody.
    """
    if is_single_node(options):
        return
    fewest, _ = node_range(options)
    settings = dict(pair.partition("=")[::2] for pair in options.rdzv_conf.split(",") if pair)
    limit_seconds = float(settings.get("join_timeout", 600.0))
    where = f" at {options.rdzv_endpoint}" if options.rdzv_endpoint else ""

    def watch() -> None:
        awaited = f"the other nodes to join{where}; this one is there, and {fewest} are needed"
        while True:
            _announce_until(ranks_run, awaited, limit_seconds)
            while ranks_run():
                time.sleep(LOOK_SECONDS)
            awaited = f"the other nodes{where} to end, or to join again"

    threading.Thread(target=watch, name="node wait", daemon=True).start()


def _announce_until(ranks_run: Callable[[], bool], awaited: str, limit_seconds: float) -> None:
    notice = WaitNotice(lambda: awaited, limit_seconds)
    while not ranks_run():
        notice.check()
        time.sleep(LOOK_SECONDS)
