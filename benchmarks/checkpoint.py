"""What a checkpoint costs: the stall of a step, the bandwidth of saving and loading, and rank 0's memory.

    python benchmarks/checkpoint.py [--ranks 2] [--rounds 5] [--layers 4 8]

One run measures, alternating: the stall of a background save against the copy it has to make, the whole save and a
load (every byte verified), and what the disk itself takes for the same bytes (write + fsync, and reading back). FSDP,
float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def disk(folder: Path, size: int) -> tuple[float, float]:
    """Seconds to write `size` bytes with fsync, and to read them back."""
    block = np.random.default_rng(0).bytes(1 << 24)
    path = folder / "raw"

    def write() -> None:
        with open(path, "wb") as file:
            for _ in range(-(-size // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass

    seconds = timed(write), timed(read)
    path.unlink()
    return seconds


def worker(folder: Path, rounds: int, layers: int) -> None:
    import torch.distributed.checkpoint as dcp

    from tinytrain_dist import distributed
    from tinytrain_dist.checkpoint import model_tensors, optimizer_tensors, pieces_of
    from tinytrain_dist.config import TrainingConfig
    from tinytrain_dist.trainer import Trainer

    context = distributed.start("cpu")
    config = TrainingConfig(
        target_dir=str(folder / f"run{layers}"), train_data=str(folder / "train.npy"), vocab_size=8192, device="cpu",
        num_layers=layers, d_model=512, num_heads=8, batch_size=2, context_len=32, parallel="fsdp", keep_last=1,
        ckpt_every=10**9,
    )  # fmt: skip
    trainer = Trainer(config, context)
    own = sum(
        piece.local.nbytes for parts in pieces_of(trainer.model, trainer.optimizer)[0].values() for piece in parts
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: dict[str, list[float]] = {
        name: [] for name in ("copy", "stall", "save", "dcp stall", "dcp save", "load", "disk write", "disk read")
    }
    size = 0
    for number in range(rounds + 1):
        context.barrier()
        stall = timed(lambda n=number: trainer.checkpoints.save(trainer.model, trainer.optimizer, n, {}))  # type: ignore[misc]
        save = trainer.checkpoints.collect(wait=True)
        assert save is not None
        assert save.error is None, save.error
        copy = timed(lambda: trainer.checkpoints.buffers.copy(pieces_of(trainer.model, trainer.optimizer)[0]))
        context.barrier()
        tensors = {**model_tensors(trainer.model), **optimizer_tensors(trainer.model, trainer.optimizer)[0]}
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        under_way: list[Any] = []
        theirs = timed(
            lambda s=state, n=number, u=under_way: u.append(dcp.async_save(s, checkpoint_id=folder / f"dcp{n}"))
        )  # type: ignore[misc]
        started = time.perf_counter()
        under_way[0].result()
        theirs_whole = theirs + time.perf_counter() - started
        context.barrier()
        if context.is_main:
            shutil.rmtree(folder / f"dcp{number}")
        path = trainer.checkpoints.folder(number)
        size = sum(file.stat().st_size for file in path.iterdir())
        context.barrier()
        verify = timed(lambda p=path: trainer.checkpoints._problems_in(p))  # type: ignore[misc]
        load = verify + timed(lambda p=path: trainer.checkpoints.load(p, trainer.model, trainer.optimizer))  # type: ignore[misc]
        context.barrier()
        wrote, read = disk(folder, size) if context.is_main else (0.0, 0.0)
        if number:  # the first round makes the buffers
            for name, seconds in zip(
                times, (copy, stall, save.seconds, theirs, theirs_whole, load, wrote, read), strict=True
            ):
                times[name].append(seconds)
    if context.is_main:
        extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print("RESULT " + json.dumps({"times": times, "bytes": size, "extra": extra * 1024, "own": own}), flush=True)
    distributed.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs=2, default=[8, 16])
    parser.add_argument("--worker")
    parser.add_argument("--size", type=int)
    options = parser.parse_args()
    if options.worker:
        worker(Path(options.worker), options.rounds, options.size)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.ranks} ranks; medians of {options.rounds}")
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
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(done.stdout + done.stderr)
        found = json.loads(lines[0].removeprefix("RESULT "))
        median = {name: statistics.median(seconds) for name, seconds in found["times"].items()}
        gb = found["bytes"] / 1e9
        stall, copy = median["stall"] * 1e3, median["copy"] * 1e3
        print(f"{layers} layers, {gb:.2f} GB: stall {stall:.0f} ms, of it copy {copy:.0f} ms")
        stall, whole, ours = median["dcp stall"] * 1e3, median["dcp save"], median["save"]
        print(
            f"  torch.distributed.checkpoint.async_save: stall {stall:.0f} ms, whole {whole:.2f} s; ours {ours:.2f} s"
        )
        for name, theirs in (("save", "disk write"), ("load", "disk read")):
            ratio = statistics.median(b / a for a, b in zip(found["times"][name], found["times"][theirs], strict=True))
            rates = f"{gb / median[name]:.2f} GB/s, {theirs} {gb / median[theirs]:.2f} GB/s"
            print(f"  {name} {rates}, ratio {ratio:.2f}")
        print(f"  rank 0 grew by {found['extra'] / 1e6:.0f} MB; its own shards are {found['own'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
