"""Compare all ranks for `tinytrain doctor`, and check the data and the folder of a run on all of them.

Must not know how a run is trained. Every `check_` function is a collective.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from tinytrain_dist.cli.doctor_checks.report import Finding, Report
from tinytrain_dist.config.loading import resolve_vocab_size
from tinytrain_dist.config.run_folder import RunFolder
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import ConfigError, TinytrainError
from tinytrain_dist.reliability import rank_consistency
from tinytrain_dist.reliability.storage_checks import check_disk_space, check_run_files, check_shared_storage
from tinytrain_dist.training.run_length import resolve_epochs
from tinytrain_dist.utils.shard_paths import shard_paths

CHECKPOINT_BYTES_PER_WEIGHT = 12  # the weight and two moments, in float32


@dataclass(frozen=True)
class RankFacts:
    """What one rank reports to the others."""

    host: str
    consistency: rank_consistency.RankFacts  # must be equal on all ranks
    threads: int
    cores: set[int]
    num_gpus: int  # visible to the process; 0 on CPUs
    machine: list[Finding]  # of check_machine


def check_ranks(report: Report, config: TrainingConfig | None, context: DistributedContext) -> list[str]:
    """Compare placement, code, settings, threads, GPUs and clocks of all ranks; return the host of each rank."""
    ranks: list[RankFacts] = context.all_gather_object(
        RankFacts(
            host=context.host,
            consistency=rank_consistency.rank_facts(config, context),
            threads=rank_consistency.threads_of(config),
            cores=rank_consistency.usable_cores(),
            num_gpus=torch.cuda.device_count() if context.device.type == "cuda" else 0,
            machine=report.machine,
        )
    )
    hosts = [facts.host for facts in ranks]
    first_of_host: dict[str, RankFacts] = {}
    for facts in ranks:
        first_of_host.setdefault(facts.host, facts)
    report.machine = [finding for facts in first_of_host.values() for finding in facts.machine]

    placement = f"{context.world_size} rank(s), {context.local_world_size} on each node"
    report.add("world", rank_placement_problems(hosts, context), placement)

    first = ranks[0]
    differences = rank_consistency.find_differences([facts.consistency for facts in ranks], hosts)
    versions = ", ".join(f"{name} {first.consistency[name]}" for name in ("code", "torch", "python"))
    num_settings = f", {len(config.resolved())} settings" if config else ""
    report.add("same on all ranks", differences, versions + num_settings)

    threads = [facts.threads for facts in ranks]
    oversubscribed = rank_consistency.oversubscribed_hosts(threads, [facts.cores for facts in ranks], hosts, config)
    report.add("threads", oversubscribed, f"each process uses {first.threads} of {len(first.cores)} core(s)")

    num_processes = context.local_world_size
    idle_gpus = [
        f"GPUs: {host} has {facts.num_gpus} GPUs, but runs {num_processes} process(es); start one process for each GPU"
        for host, facts in first_of_host.items()
        if facts.num_gpus > num_processes
    ]
    report.add("GPUs", idle_gpus, "one process for each GPU" if first.num_gpus else "none used")

    if context.world_size > 1:
        _check_clocks(report, hosts, context)
    return hosts


def _check_clocks(report: Report, hosts: list[str], context: DistributedContext) -> None:
    offsets = rank_consistency.clock_offsets(context)
    skewed = context.broadcast_object(rank_consistency.skewed_clocks(offsets, hosts))
    largest_seconds = max(abs(offset) + error_bound for offset, error_bound in offsets)
    report.add("clock", skewed, f"no clock differs from {hosts[0]} by more than {1000 * largest_seconds:.0f} ms")


def rank_placement_problems(hosts: list[str], context: DistributedContext) -> list[str]:
    """Return the problems of the placement of ranks; if there are none, the ranks of a node are consecutive."""
    counts = {host: hosts.count(host) for host in hosts}
    if any(count % context.local_world_size for count in counts.values()):
        listing = ", ".join(f"{count} on {host}" for host, count in counts.items())
        return [f"world: nodes have different numbers of processes ({listing}); start the same number on each"]
    num_blocks = 1 + sum(host != next_host for host, next_host in itertools.pairwise(hosts))
    if num_blocks > len(counts):
        return ["world: the ranks of a node are not consecutive; use srun --distribution=block"]
    return []


def check_run(report: Report, config: TrainingConfig, context: DistributedContext) -> None:
    """Check the data, the folder and the disk space of a run; remove the folders that the check creates."""
    folder = config.checkpoints_dir
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        config = collectives.run_on_all_ranks(lambda: _check_data(config, context.host))
    except TinytrainError as error:
        report.add_problems(_problems_of(error))
        return
    report.add("train_data", [], str(config.train_data))
    try:
        check_run_files(config, context)
        check_shared_storage(folder, context, "ckpt_dir" if config.ckpt_dir else "target_dir")
    except TinytrainError as error:
        report.add_problems(_problems_of(error))
        return
    report.add("folder", [], f"{folder} can be written, and all ranks see its files")

    run = RunFolder.at(Path(config.target_dir)) if context.is_main else None
    num_existing = len(run.committed()) if run else 0
    num_wanted = config.keep_last + 1
    checkpoint_bytes = CHECKPOINT_BYTES_PER_WEIGHT * config.model.approximate_parameter_count
    try:
        check_disk_space(folder, checkpoint_bytes, num_wanted, num_existing, context)
        report.add("disk", [], f"room for {num_wanted} checkpoints of {checkpoint_bytes / 1e9:.2f} GB")
    except TinytrainError as error:
        report.add_problems([str(error)])
    if context.is_main:
        with contextlib.suppress(OSError):
            for path in new_folders:
                path.rmdir()


def _check_data(config: TrainingConfig, host: str) -> TrainingConfig:
    """Return the configuration with its vocab_size. Errors: ConfigError if there is no such file on this host."""
    resolved = resolve_epochs(resolve_vocab_size(config))
    for name, files in (("train_data", resolved.train_files), ("val_data", resolved.val_files)):
        for path in (path for entry in files for path in shard_paths(entry)):
            if not Path(path).is_file():
                raise ConfigError(f"{name}: there is no {path} on {host}; give a token file")
    return resolved


def _problems_of(error: TinytrainError) -> list[str]:
    return error.problems if isinstance(error, ConfigError) else [str(error)]
