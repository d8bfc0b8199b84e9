"""Kills a run at random times until it has died often enough, and holds its end against an undisturbed run.

    python benchmarks/chaos.py [--kills 200] [--seed 0]

Each life of the run has other ranks and another mode. One rank or all are killed with SIGKILL at a random time, a fifth
of them while they start. At the end the weights and the optimizer state must have the digests of one process that was
never disturbed, and no death may have cost more than one interval and the duration of a save. Exit code 1 if not.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.helpers import ranks  # noqa: E402
from tests.helpers.training import Run, fit, settings_for  # noqa: E402

LIVES = [(1, "none"), (2, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "ddp")]
COMMON: dict[str, Any] = {
    "reproducible": True, "ckpt_every": 4, "eval_every": 50, "log_every": 1, "keep_last": 2,
    "total_steps": 100_000, "warmup_iters": 100, "max_shard_bytes": 4000,
}  # fmt: skip


def live(folder: Path, rng: random.Random, world_size: int, mode: str) -> str:
    """One life: train until killed; what was killed."""
    seconds, everyone, starting = rng.uniform(0.05, 2.0), rng.random() < 0.5, rng.random() < 0.2
    record, end = folder / "run" / "logs" / "metrics.jsonl", threading.Event()
    written = record.stat().st_mtime_ns if record.exists() else 0

    def kill() -> None:
        """Most die while they train, however slow the machine is: the time counts from their first record."""
        while not starting and not end.wait(0.02) and not (record.exists() and record.stat().st_mtime_ns > written):
            pass
        pids: list[int] = []
        while not pids and not end.wait(seconds):
            pids = sorted(ranks._alive)
        for pid in pids if everyone or not pids else [rng.choice(pids)]:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        ranks.run_ranks(world_size, fit, settings_for(folder, "run", parallel=mode, **COMMON), timeout_seconds=600)
    except AssertionError as error:
        if "SIGKILL" not in str(error):
            sys.exit(f"a life ended otherwise than by our kill:\n{error}")
    finally:
        end.set()
        killer.join()
    return f"{'all' if everyone else 'one'} of {world_size} {mode}"


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
            world_size, mode = rng.choice(LIVES)
            what = live(folder, rng, world_size, mode)
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
        # an interval, and the save's own duration: at most an interval more, since the next save waits for it
        stop, most = at + 10, 2 * COMMON["ckpt_every"]
        ranks.run_ranks(2, fit, settings_for(folder, "run", parallel="ddp", stop_at_step=stop, **COMMON))
        settings = settings_for(folder, "undisturbed", parallel="none", stop_at_step=stop, **COMMON)
        ranks.run_ranks(1, fit, settings, timeout_seconds=3600)
        run, expected = Run(folder / "run"), Run(folder / "undisturbed")
        same = run.digests() == expected.digests()
        damaged = len(list((folder / "run" / "checkpoints").glob("*.damaged*")))
        resumed = len(run.values("resumed", "text"))
        print(
            f"{options.kills} kills (seed {options.seed}), {resumed} resumes on record, {stop} steps, most steps on "
            f"record beyond the newest checkpoint {max(lost)} of {most} that may be, damaged checkpoints {damaged}; "
            f"digests {'the same' if same else 'DIFFER'}; {time.monotonic() - started:.0f} s"
        )
        sys.exit(0 if same and not damaged and max(lost) <= most else 1)


if __name__ == "__main__":
    main()
