"""Measure what a checkpoint costs: the stall of a step, the speed of saving and loading, and the memory of rank 0.

    python benchmarks/checkpoint.py [--parallel fsdp] [--ranks 2] [--rounds 5] [--layers 8 16]

Each round measures, one after the other:

* the stall of a step for a background save, and the copy to host memory alone. In both, all ranks begin together and
  the slowest counts;
* the duration of the whole background save;
* a save in the foreground, and torch.distributed.checkpoint's async_save of the same tensors;
* a load with every byte verified, from a cold page cache (where it can be dropped) and from a warm one;
* the disk itself with the same bytes in blocks of 16 MiB, as `dd bs=16M conv=fsync` writes and `dd bs=16M` reads.

The tensors are float32, 1 to 16 MB each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BLOCK = 1 << 24


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def drop_caches(folder: Path) -> str:
    """Drop the page cache, so that the next read of `folder` comes from the disk; return how it was dropped."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "cold"
    except OSError:
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "cold by fadvise"


def disk_write(folder: Path, files: list[int]) -> None:
    """Write files of these sizes, each with fsync."""
    block = memoryview(np.random.default_rng(0).bytes(BLOCK))
    for number, size in enumerate(files):
        with open(folder / f"raw{number}", "wb", buffering=0) as file:
            for start in range(0, size, BLOCK):
                file.write(block[: size - start])
            os.fsync(file.fileno())


def disk_read(folder: Path, into: bytearray) -> None:
    for path in sorted(folder.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(into):
                pass


def memory(name: str) -> int:
    """Return a line of /proc/self/status in bytes; VmHWM is the peak since `reset_peak`."""
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Measurement:
    """Hold the trainer of one rank, with one method for each operation that is timed."""

    def __init__(self, folder: Path, layers: int, parallel: Literal["ddp", "fsdp"]) -> None:
        from dataclasses import replace

        from tinytrain_dist.checkpoint.manager import CheckpointManager
        from tinytrain_dist.config.schema import TrainingConfig
        from tinytrain_dist.distributed.context import init_distributed
        from tinytrain_dist.training.trainer import Trainer

        self.folder, self.context = folder, init_distributed("cpu")
        config = TrainingConfig(
            target_dir=str(folder / f"run{layers}"), train_data=str(folder / "train.npy"), vocab_size=8192,
            device="cpu", num_layers=layers, d_model=512, num_heads=8, batch_size=2, context_len=32, parallel=parallel,
            keep_last=1, ckpt_every=10**9,
        )  # fmt: skip
        self.trainer = trainer = Trainer.build(config, self.context)
        elsewhere = replace(config, ckpt_async=False, ckpt_dir=str(folder / "sync"))
        about = trainer.checkpoints.data, trainer.checkpoints.numerics
        step = trainer.train_step
        self.foreground = CheckpointManager(elsewhere, trainer.context, step.model, step.optimizer, *about)
        self.own = sum(shard.rows_to_save.nbytes for shard in trainer.checkpoints.all_shards)
        self.extra, self.cold, self.block = 0, "", bytearray(BLOCK)

    def alone(self, action: Callable[[], object]) -> float:
        """Return the seconds that an action takes on rank 0; the other ranks wait."""
        self.context.barrier()
        seconds = timed(action) if self.context.is_main else 0.0
        self.context.barrier()
        return seconds

    def longest(self, action: Callable[[], object]) -> float:
        """Return the seconds of the slowest rank; all ranks begin together."""
        self.context.barrier()
        return max(map(float, self.context.all_gather_object(timed(action))))

    def all_ranks(self, action: Callable[[], object]) -> float:
        def action_and_barrier() -> None:
            action()
            self.context.barrier()

        self.context.barrier()
        return timed(action_and_barrier)

    def round(self, number: int) -> dict[str, float]:
        """Measure everything once; `number` is the step that is saved."""
        trainer, found = self.trainer, dict[str, float]()
        trainer.step = number
        path = trainer.checkpoints.folder(number)
        self.context.barrier()
        before = memory("VmRSS")
        reset_peak()
        found["stall"] = self.longest(trainer.save)
        save = trainer.checkpoints.collect(wait=True)
        assert save is not None
        assert save.error is None, save.error
        found["save"] = save.seconds
        self.extra = max(self.extra, memory("VmHWM") - before) if number else 0
        found["copy"] = self.longest(trainer.checkpoints.buffers.copy)
        found["foreground"] = self.all_ranks(lambda: self.foreground.save(number, {}))
        self.foreground.collect(wait=True)
        found |= self.theirs(number)
        sizes = [file.stat().st_size for file in sorted(path.iterdir())]
        (self.folder / "raw").mkdir(exist_ok=True)
        found["disk write"] = self.alone(lambda: disk_write(self.folder / "raw", sizes))
        self.alone(lambda: setattr(self, "cold", drop_caches(path)))
        found["load"] = self.all_ranks(lambda: self.load(path))
        self.alone(lambda: drop_caches(path))
        found["disk read"] = self.alone(lambda: disk_read(path, self.block))
        found["load warm"] = self.all_ranks(lambda: self.load(path))
        self.alone(lambda: shutil.rmtree(self.folder / "raw"))
        return {**found, "bytes": sum(sizes)}

    def load(self, path: Path) -> None:
        found = self.trainer.checkpoints.resume()
        assert found is not None
        assert found[0] == path

    def theirs(self, number: int) -> dict[str, float]:
        """Time async_save of torch.distributed.checkpoint; it computes no digests and gathers nothing."""
        from torch.distributed.checkpoint.state_dict_saver import async_save

        from tinytrain_dist.checkpoint.state_collection import model_tensors, optimizer_tensors

        model, optimizer = self.trainer.train_step.model, self.trainer.train_step.optimizer
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)[0]}
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        under_way: list[Any] = []
        self.context.barrier()
        place = self.folder / f"dcp{number}"
        stall = timed(lambda: under_way.append(async_save(state, checkpoint_id=place)))
        whole = stall + timed(under_way[0].result)
        self.alone(lambda: shutil.rmtree(place))
        return {"their stall": stall, "their save": whole}


def worker(folder: Path, rounds: int, layers: int, parallel: Literal["ddp", "fsdp"]) -> None:
    from tinytrain_dist.distributed.context import shutdown

    measurement = Measurement(folder, layers, parallel)
    measurement.round(0)  # warm-up: torch allocates its buffers, and all code and data are loaded
    found = [measurement.round(number) for number in range(1, rounds + 1)]
    if measurement.context.is_main:
        result = {"rounds": found, "extra": measurement.extra, "own": measurement.own, "cold": measurement.cold}
        print("RESULT " + json.dumps(result), flush=True)
    shutdown()


def show(layers: int, found: dict[str, Any]) -> None:
    rounds = found["rounds"]
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    gb = median["bytes"] / 1e9

    def ms(name: str) -> str:
        return f"{median[name] * 1e3:.0f} ms"

    def ratio(ours: str, disk: str) -> str:
        ratios = sorted(r[disk] / r[ours] for r in rounds)
        return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})"

    rest = statistics.median(r["stall"] - r["copy"] for r in rounds) * 1e3
    print(f"{layers} layers, {gb:.2f} GB")
    print(f"  stall of a step: {ms('stall')}; the copy alone {ms('copy')}; median of the differences {rest:.1f} ms")
    print(f"  stall with ckpt_async = false: {ms('foreground')}; with torch's async_save: {ms('their stall')}")
    print(f"  duration of a save: {median['save']:.2f} s; of torch's async_save: {median['their save']:.2f} s")
    for ours, disk in (("save", "disk write"), ("load", "disk read")):
        rates = f"{gb / median[ours]:.2f} GB/s, {disk} {gb / median[disk]:.2f} GB/s"
        print(f"  {ours} {rates}, ratio {ratio(ours, disk)}" + (f", {found['cold']}" if ours == "load" else ""))
    print(f"  load from the page cache: {gb / median['load warm']:.2f} GB/s")
    print(
        f"  rank 0: {found['own'] / 1e6:.0f} MB of shards in host buffers, and {found['extra'] / 1e6:.0f} MB more at "
        "the peak of a save"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", default="fsdp", choices=["ddp", "fsdp"])
    parser.add_argument("--ranks", type=int, default=2, help="number of processes (2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (5)")
    parser.add_argument("--layers", type=int, nargs=2, default=[8, 16], help="layers of the two models (8 16)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(Path(options.worker), options.rounds, options.size, options.parallel)
        return
    ranks = f"{options.ranks} ranks, {options.parallel}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {ranks}; medians of {options.rounds}")
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            np.save(f"{folder}/train.npy", np.random.default_rng(0).integers(0, 8192, 10**5, dtype=np.uint16))
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={options.ranks}",
            ]
            command += [__file__, "--worker", folder, "--size", str(layers), "--rounds", str(options.rounds)]
            command += ["--parallel", options.parallel]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(done.stdout + done.stderr)
        found = json.loads(lines[0].removeprefix("RESULT "))
        show(layers, found)


if __name__ == "__main__":
    main()
