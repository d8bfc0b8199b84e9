"""Measure the cost of reproducible mode: the time of a reproducible step divided by that of a native step.

    python benchmarks/reproducible.py [--ranks 2] [--rounds 7] [--steps 1]

The cases are DDP and FSDP, each with 1 and 8 accumulation steps. In each round the same model trains for some steps in
native mode and in reproducible mode, in alternating order. The result is the median of the ratios of all rounds. Peak
memory comes from a separate start of each case and mode.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CASES = [(mode, accumulation) for mode in ("ddp", "fsdp") for accumulation in (1, 8)]


def settings(folder: str, mode: str, accumulation: int, reproducible: bool, ranks: int) -> dict[str, object]:
    micro = 2
    return {
        "target_dir": f"{folder}/run", "train_data": f"{folder}/train.npy", "vocab_size": 10_000, "device": "cpu",
        "num_layers": 6, "d_model": 256, "num_heads": 8, "d_ff": 704, "context_len": 256, "total_steps": 100_000,
        "batch_size": micro * accumulation * ranks, "micro_batch_size": micro, "parallel": mode,
        "reproducible": reproducible, "ckpt_every": 10**9, "eval_every": 10**9, "log_every": 10**9, "cpu_threads": 1,
    }  # fmt: skip


def worker(folder: str, rounds: int, steps: int) -> None:
    import resource

    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.data.batches import Prefetcher
    from tinytrain_dist.distributed.context import init_distributed, shutdown
    from tinytrain_dist.training.trainer import Trainer

    context = init_distributed("cpu")
    only = os.environ.get("ONLY")
    results = {}
    for mode, accumulation in CASES:
        count = steps * (4 if accumulation == 1 else 1)
        trainers = {}
        for reproducible in (False, True):
            if only is None or only == f"{mode}/{accumulation}/{reproducible}":
                config = TrainingConfig(**settings(folder, mode, accumulation, reproducible, context.world_size))  # type: ignore[arg-type]
                trainers[reproducible] = trainer = Trainer.build(config, context)
                trainer.batches = Prefetcher(trainer._read_rows, 0)
                trainer.run_step()
        times: dict[bool, list[float]] = {kind: [] for kind in trainers}
        for number in range(rounds):
            for kind in sorted(trainers, reverse=bool(number % 2)):
                context.barrier()
                start = time.perf_counter()
                for _ in range(count):
                    trainers[kind].run_step()
                context.barrier()
                times[kind].append((time.perf_counter() - start) / count)
        for trainer in trainers.values():
            trainer.batches.close()
        if trainers:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            results[f"{mode}, accumulation {accumulation}"] = {
                "times": {str(k): v for k, v in times.items()},
                "peak_mib": peak,
            }
    if context.is_main:
        print("RESULT " + json.dumps(results), flush=True)
    shutdown()


def run(ranks: int, *arguments: str, only: str | None = None) -> dict[str, dict[str, object]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"ONLY": only} if only else {})}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__, *arguments]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, check=False, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout + done.stderr)
    found: dict[str, dict[str, object]] = json.loads(lines[0].removeprefix("RESULT "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of processes (2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each case (7)")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps in a round; four times as many without accumulation (1)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.rounds, options.steps)
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.ranks} ranks, 1 thread each")
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/train.npy", np.random.default_rng(0).integers(0, 10_000, 10**6, dtype=np.uint16))
        common = ("--worker", folder, "--steps", str(options.steps), "--rounds")
        results = run(options.ranks, *common, str(options.rounds))
        print(f"{'case':<22}{'native':>10}{'reproducible':>14}{'ratio':>8}   spread of ratios   peak memory")
        for mode, accumulation in CASES:
            times = results[f"{mode}, accumulation {accumulation}"]["times"]
            assert isinstance(times, dict)
            native, exact = times["False"], times["True"]
            ratios = [b / a for a, b in zip(native, exact, strict=True)]
            peaks = []
            for kind in (False, True):
                alone = run(options.ranks, *common, "1", only=f"{mode}/{accumulation}/{kind}")
                peaks.append(alone[f"{mode}, accumulation {accumulation}"]["peak_mib"])
            print(
                f"{mode + ', accum ' + str(accumulation):<22}{statistics.median(native):>8.3f} s"
                f"{statistics.median(exact):>12.3f} s{statistics.median(ratios):>8.3f}   "
                f"{min(ratios):.3f} .. {max(ratios):.3f}     {peaks[0]:.0f} / {peaks[1]:.0f} MiB"
            )


if __name__ == "__main__":
    main()
