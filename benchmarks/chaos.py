"""Kill a run at random times, resume it each time, and compare its result with a run that was never killed.

    python benchmarks/chaos.py [--kills 200] [--seed 0]
    python benchmarks/chaos.py --nodes 4 [--events 100] [--seed 0]     nodes fail and come back while the run goes on

Each start of the run draws a number of ranks and a mode. Then one rank, or all of them, get SIGKILL at a random
time. In a fifth of the starts this may happen before the first step.

Two things must hold at the end, otherwise the exit code is 1:

* weights and optimizer state have the same digests as those of one process that was never killed;
* no kill cost more steps than one save interval and the steps during one save.

With --nodes (as root), nodes in networks of their own are killed, stopped, cut off, slowed down and brought back:

* no event may cost more steps than one interval of snapshots and the steps during one snapshot;
* the run trains on after each event, and has the same digests at the end.

How long the run did not train is printed, by part.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from chaos_nodes.events import FAULTS  # noqa: E402
from chaos_nodes.program import run_chaos  # noqa: E402

from tests.helpers import ranks as processes  # noqa: E402
from tests.helpers.training import Run, fit, settings_for  # noqa: E402

LAYOUTS = [(1, "none"), (2, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "ddp")]
COMMON: dict[str, Any] = {
    "reproducible": True, "ckpt_every": 4, "eval_every": 50, "log_every": 1, "keep_last": 2,
    "total_steps": 100_000, "warmup_iters": 100, "max_shard_bytes": 4000,
}  # fmt: skip


def train_until_killed(folder: Path, rng: random.Random, ranks: int, mode: str) -> str:
    """Start the run and kill it at a random time; return in words what was killed."""
    seconds, everyone, starting = rng.uniform(0.05, 2.0), rng.random() < 0.5, rng.random() < 0.2
    record, end = folder / "run" / "logs" / "metrics.jsonl", threading.Event()
    written = record.stat().st_mtime_ns if record.exists() else 0

    def kill() -> None:
        """Wait for the first record (in a fifth of the starts only for processes) and a random time, then kill.

        Counting from the first record makes most kills hit a step, however slow the machine is.
        """
        while not starting and not end.wait(0.02) and not (record.exists() and record.stat().st_mtime_ns > written):
            pass
        pids: list[int] = []
        while not pids and not end.wait(seconds):
            pids = sorted(processes._alive)
        for pid in pids if everyone or not pids else [rng.choice(pids)]:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        processes.run_ranks(ranks, fit, settings_for(folder, "run", parallel=mode, **COMMON), timeout_seconds=600)
    except AssertionError as error:
        if "SIGKILL" not in str(error):
            sys.exit(f"the run ended without being killed:\n{error}")
    finally:
        end.set()
        killer.join()
    return f"{'all' if everyone else 'one'} of {ranks} {mode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of kills (200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times and layouts (0)")
    parser.add_argument(
        "--nodes", type=int, default=0, help="run this many nodes, from 2 to 5, and let them fail (0: --kills)"
    )
    parser.add_argument("--events", type=int, default=100, help="with --nodes: number of events (100)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="fsdp", help="with --nodes: the mode (fsdp)")
    parser.add_argument("--faults", default=",".join(FAULTS), help="with --nodes: which faults may happen (all)")
    parser.add_argument("--plan", default="", help="with --nodes: these events, such as kill,return,cut,return")
    options = parser.parse_args()
    if options.nodes:
        sys.exit(run_chaos(options))
    rng, started = random.Random(options.seed), time.monotonic()
    lost = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        at = 0
        for number in range(options.kills):
            ranks, mode = rng.choice(LAYOUTS)
            what = train_until_killed(folder, rng, ranks, mode)
            record = folder / "run" / "logs" / "metrics.jsonl"
            if record.exists() and list((folder / "run" / "checkpoints").glob("checkpoint-????????")):
                run = Run(folder / "run")
                at = int(run.checkpoint.name[-8:])
                lost.append(max([r["step"] for r in run.records], default=at) - at)
            if number % 20 == 19:
                seconds = time.monotonic() - started
                print(f"{number + 1} kills (the last: {what}), newest checkpoint {at}, {seconds:.0f} s", flush=True)
        # Lost at most: one interval and the steps during a save. A save lasts at most one more interval, because the
        # next save waits for it.
        stop, most = at + 10, 2 * COMMON["ckpt_every"]
        processes.run_ranks(2, fit, settings_for(folder, "run", parallel="ddp", stop_at_step=stop, **COMMON))
        settings = settings_for(folder, "undisturbed", parallel="none", stop_at_step=stop, **COMMON)
        processes.run_ranks(1, fit, settings, timeout_seconds=3600)
        run, expected = Run(folder / "run"), Run(folder / "undisturbed")
        same = run.digests() == expected.digests()
        damaged = len(list((folder / "run" / "checkpoints").glob("*.damaged*")))
        resumed = len(run.values("resumed", "text"))
        print(
            f"{options.kills} kills (seed {options.seed}), {resumed} recorded resumes, {stop} steps; "
            f"at most {max(lost, default=0)} steps lost by a kill ({most} allowed); {damaged} damaged checkpoints; "
            f"digests {'equal' if same else 'DIFFER'}; {time.monotonic() - started:.0f} s"
        )
        sys.exit(0 if same and not damaged and max(lost, default=0) <= most else 1)


if __name__ == "__main__":
    main()
