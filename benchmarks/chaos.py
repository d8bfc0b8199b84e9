"""Kills a run at random times until it has died often enough, and holds its end against an undisturbed run.

    python benchmarks/chaos.py [--kills 200] [--seed 0]

Each life of the run has other ranks and another mode; one rank or all are killed with SIGKILL after a random time. At
the end the weights and the optimizer state must have the digests of one process that was never disturbed.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import distributed_helper  # noqa: E402
from training import Run, fit, settings_for  # noqa: E402

LIVES = [(1, "none"), (2, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "ddp")]
COMMON = {
    "reproducible": True, "ckpt_every": 4, "eval_every": 50, "log_every": 10, "keep_last": 2,
    "total_steps": 100_000, "warmup_iters": 100, "max_shard_bytes": 4000,
}  # fmt: skip


def live(folder: Path, rng: random.Random, ranks: int, mode: str) -> str:
    """One life: train until killed; what was killed."""
    seconds, everyone = rng.uniform(0.3, 2.5), rng.random() < 0.5
    end = threading.Event()

    def kill() -> None:
        pids: list[int] = []
        while not pids and not end.wait(seconds):
            pids = sorted(distributed_helper._alive)
        for pid in pids if everyone or not pids else [rng.choice(pids)]:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        distributed_helper.run_ranks(
            ranks, fit, settings_for(folder, "run", parallel=mode, **COMMON), timeout_seconds=600
        )
    except AssertionError as error:
        if "SIGKILL" not in str(error):
            sys.exit(f"a life ended otherwise than by our kill:\n{error}")
    finally:
        end.set()
        killer.join()
    return f"{'all' if everyone else 'one'} of {ranks} {mode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, started = random.Random(options.seed), time.monotonic()
    lost = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        at = 0
        for number in range(options.kills):
            ranks, mode = rng.choice(LIVES)
            what = live(folder, rng, ranks, mode)
            record = folder / "run" / "logs" / "metrics.jsonl"
            if record.exists() and list((folder / "run" / "checkpoints").glob("checkpoint-????????")):
                run = Run(folder / "run")
                at = int(run.checkpoint.name[-8:])
                lost.append(max([r["step"] for r in run.records], default=at) - at)
            if number % 20 == 19:
                print(
                    f"{number + 1} kills, last {what}, newest checkpoint {at}, {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        stop = at + 10
        distributed_helper.run_ranks(2, fit, settings_for(folder, "run", parallel="ddp", stop_at_step=stop, **COMMON))
        settings = settings_for(folder, "undisturbed", parallel="none", stop_at_step=stop, **COMMON)
        distributed_helper.run_ranks(1, fit, settings, timeout_seconds=3600)
        run, expected = Run(folder / "run"), Run(folder / "undisturbed")
        same = run.digests() == expected.digests()
        damaged = len(list((folder / "run" / "checkpoints").glob("*.damaged*")))
        resumed = len(run.values("resumed", "text"))
        print(
            f"{options.kills} kills, {resumed} resumes on record, {stop} steps, most steps on record beyond the newest "
            f"checkpoint {max(lost)}, damaged checkpoints {damaged}; digests {'the same' if same else 'DIFFER'}; "
            f"{time.monotonic() - started:.0f} s"
        )
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
