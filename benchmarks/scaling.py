"""Estimate what a step and a checkpoint cost a rank apart from training, with 8 to 4,096 ranks, without a cluster.

    python benchmarks/scaling.py [--ranks 8,64,512,4096] [--latency-us 10] [--gbit 10]

Measured, by calling the real functions with the layout of one rank among so many:

* drawing the windows of the rank;
* building the vector of micro-batch losses;
* planning the shards of a checkpoint, for a model that is sharded over a fake process group;
* unpickling gathered objects.

Computed from the given latency and bandwidth: the time in the network. A sum of n bytes takes 2 log2(ranks) hops and
sends 2n bytes. A gather sends n x ranks bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def timed(action: Callable[[], Any], repeat: int = 20) -> float:
    """Return the microseconds of the fastest of some calls."""
    best = math.inf
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def measure(ranks: int, latency: float, bytes_per_us: float) -> list[tuple[str, float, float, float]]:
    """Return rows of: name, measured microseconds, bytes in the network, and the microseconds that these would take."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tinytrain_dist.checkpoint.state_collection import collect_shards
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.data.window_sampling import window_starts
    from tinytrain_dist.distributed.batch_plan import BatchPlan
    from tinytrain_dist.distributed.parallel_dims import ParallelDims
    from tinytrain_dist.model.transformer import TransformerLM
    from tinytrain_dist.optim.adamw import AdamW

    shard = min(8, ranks)
    config = TrainingConfig(
        num_layers=8, d_model=256, num_heads=8, vocab_size=1000, batch_size=4 * ranks, micro_batch_size=4,
        parallel="hsdp", dp_shard=shard,
    )  # fmt: skip
    plan = BatchPlan.make(config, ParallelDims("hsdp", ranks // shard, shard, ""))
    slots = plan.share(0, 0).slots
    hops = 2 * math.log2(ranks)
    results = []

    def note(name: str, action: Callable[[], Any], summed: float = 0, gathered: float = 0) -> None:
        network = hops * latency + 2 * summed / bytes_per_us if summed else 0.0
        if gathered:
            network += hops / 2 * latency + gathered * ranks / bytes_per_us
        results.append((name, timed(action), 2 * summed + gathered * ranks, network))

    note("sampling: draw the windows of this rank", lambda: window_starts(0, 7, slots, 10**9))
    vote = torch.zeros(1, dtype=torch.int32)
    note("stopping: the vote of all ranks", lambda: bool(vote.item()), summed=4)

    place, loss = torch.tensor([0]), torch.zeros(1, dtype=torch.float64)

    def micro_batch_losses() -> None:
        torch.zeros(plan.num_micro_batches, dtype=torch.float64).index_copy_(0, place, loss).sum()

    note("loss: one number for each micro-batch", micro_batch_losses, summed=8 * plan.num_micro_batches)
    note("gradient norm: one number", lambda: torch.zeros(()).sqrt(), summed=8)
    row = torch.zeros(3, dtype=torch.float64)
    note("logging (every log_every steps): 3 numbers per rank", lambda: row.tolist(), gathered=24)
    import pickle

    objects = [pickle.dumps((1.0, 2.0, 3.0))] * ranks
    note("  the same as pickled objects", lambda: [pickle.loads(o) for o in objects], gathered=len(objects[0]) + 16)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks // shard, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    with torch.device("meta"):
        model = TransformerLM(config)
    for unit in [*model.model.layers, model]:
        fully_shard(unit, mesh=mesh)
    model.to_empty(device="cpu")
    optimizer = AdamW(model.parameters())
    optimizer.materialize()
    note("checkpoint: plan the shards", lambda: collect_shards(model, optimizer, config.max_shard_bytes, 1))
    dist.destroy_process_group()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8,64,512,4096", help="numbers of ranks, with commas")
    parser.add_argument("--latency-us", type=float, default=10.0, help="latency of one message in microseconds (10)")
    parser.add_argument(
        "--gbit", type=float, default=10.0, help="bandwidth for these messages of one rank, in Gbit/s (10)"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        for name, own, size, network in measure(options.one, options.latency_us, options.gbit * 125):
            print(f"{name}\t{own}\t{size}\t{network}")
        sys.stdout.flush()
        os._exit(0)
    table: dict[str, list[str]] = {}
    counts = [int(count) for count in options.ranks.split(",")]
    for count in counts:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", str(count)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        for line in done.stdout.splitlines():
            name, *values = line.split("\t")
            own, size, network = (float(value) for value in values)
            table.setdefault(name, []).append(f"{own:,.0f} + {network:,.0f} ({size:,.0f} B)")
    print(f"microseconds per rank: measured + network (bytes); {options.latency_us} us per hop, {options.gbit} Gbit/s")
    print(f"{'':<52}" + "".join(f"{count:>26,}" for count in counts))
    for name, cells in table.items():
        print(f"{name:<52}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
