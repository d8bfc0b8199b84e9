"""Build a run, in this order: checks, data, mesh, model, optimizer, the checkpoint to resume from, logs.

Begin with `build_trainer`. Every problem that can be found before step 1 is raised here, if possible before anything on
disk is changed.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.copies.start import begin_copies, finish_copies_start
from tinytrain_dist.checkpoint.huggingface_import import init_from_hf_folder, weights_folder
from tinytrain_dist.checkpoint.manager import CheckpointManager
from tinytrain_dist.checkpoint.retention import changed_evaluation_settings
from tinytrain_dist.checkpoint.snapshots.keeper import SnapshotKeeper, build_keeper
from tinytrain_dist.checkpoint.state_collection import model_tensors
from tinytrain_dist.config.loading import resolve_vocab_size
from tinytrain_dist.config.parameter_groups import describe_groups, has_special_groups
from tinytrain_dist.config.run_folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LOGS_FOLDER,
    PROFILE_FOLDER,
    SNAPSHOTS_FILE,
    checkpoint_step,
    heartbeat_folder,
)
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.collectives import run_on_all_ranks
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import ConfigError, TrainingError
from tinytrain_dist.metrics.device_stats import unknown_peak_warnings
from tinytrain_dist.metrics.environment import environment_record
from tinytrain_dist.metrics.loss_level import forget_level
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.metrics.profiler import StepProfiler
from tinytrain_dist.metrics.run_log import RunLog
from tinytrain_dist.metrics.step_metrics import StepMetrics
from tinytrain_dist.metrics.trackers import check_trackers
from tinytrain_dist.parallel.compile import resolve_compile
from tinytrain_dist.parallel.device_defaults import resolve_device_defaults
from tinytrain_dist.parallel.replica_check import check_replicas
from tinytrain_dist.parallel.wrappers import unwrap
from tinytrain_dist.reliability.error_report import read_and_clear_error
from tinytrain_dist.reliability.heartbeats import remove_heartbeats
from tinytrain_dist.reliability.rank_consistency import check_rank_consistency
from tinytrain_dist.reliability.run_lock import RunLock
from tinytrain_dist.reliability.run_state import claim_run, write_state
from tinytrain_dist.reliability.start_times import rank_start
from tinytrain_dist.reliability.stop_requests import StopRequests
from tinytrain_dist.reliability.storage_checks import (
    check_disk_space,
    check_host_memory,
    check_run_files,
    check_shared_storage,
)
from tinytrain_dist.training.determinism import configure_determinism
from tinytrain_dist.training.evaluation import forget_evaluations
from tinytrain_dist.training.memory_estimate import estimate_memory
from tinytrain_dist.training.memory_fitting import (
    build_fitting_train_step,
    with_fitting_mesh,
    with_resharding,
)
from tinytrain_dist.training.recovery import Recovery
from tinytrain_dist.training.run_data import RunData, open_run_data, tokenizer_warnings
from tinytrain_dist.training.run_length import with_length
from tinytrain_dist.training.run_saver import RunSaver
from tinytrain_dist.training.run_snapshots import RunSnapshots
from tinytrain_dist.training.text_samples import TextSampler
from tinytrain_dist.training.train_step import TrainStep
from tinytrain_dist.training.trainer import Trainer
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.json_files import to_json
from tinytrain_dist.utils.stale_files import describe_leftovers, remove_leftovers
from tinytrain_dist.utils.text import is_url


@dataclass
class Start:
    """The step at which a run starts, and what it continues from."""

    step: int = 0
    record: dict[str, Any] = field(default_factory=dict)  # of the run so far, see EarlyStopping and LossLevel
    saved_step: int = -1  # the step of the loaded checkpoint if it is one of this run, else -1
    source: Path | None = None  # the loaded checkpoint
    weights: Path | None = None  # the folder of the initial weights, if they were read
    from_snapshot: bool = False  # the state comes from shared memory; then there is no source
    downloaded: str = ""  # the URL of the copy that it was downloaded from, if it was
    changed_settings: list[str] = field(default_factory=list)
    forgotten: str = ""  # a sentence about evaluations that no longer count, if there are any
    previous_failure: str = ""  # why the previous run in this folder failed; "" if it did not
    lock: RunLock | None = None
    recovery: Recovery | None = None  # of an elastic run, on the main rank
    snapshots: SnapshotKeeper | None = None
    snapshot_note: str = ""  # why none are taken although a setting asks for them


def build_trainer(
    config: TrainingConfig, context: DistributedContext, phase_timer: PhaseTimer | None = None
) -> Trainer:
    """Build the run of a configuration on all ranks. A collective.

    Errors: ConfigError, DataError, CheckpointError and TrainingError, the same on all ranks.
    """
    phase_timer = phase_timer or PhaseTimer()
    warnings = check_rank_consistency(config, context)
    run_on_all_ranks(lambda: check_trackers(config) if context.is_main else None)  # a missing library is an error here
    config, precision_note = resolve_device_defaults(resolve_vocab_size(config), context)
    warnings += unknown_peak_warnings(context.device)

    phase_timer.enter("open_data")
    data, tokenizer_notes = _open_data(config, context)
    warnings += tokenizer_notes
    config, length_note = with_length(config, data.train.windows_per_epoch, context)

    phase_timer.enter("compiler")
    config, compile_note = resolve_compile(config, context)
    numerics = configure_determinism(config, context.device)

    phase_timer.enter("build")
    context = with_fitting_mesh(config, context)
    config = with_resharding(config, context, context.device.type)
    train_step, fitting_notes = build_fitting_train_step(config, context, phase_timer)
    config = train_step.config
    checkpoints = CheckpointManager(
        config, context, train_step.model, train_step.optimizer, data.fingerprint(), numerics
    )

    phase_timer.enter("load")
    start = _load(config, context, checkpoints, train_step, phase_timer)
    _begin_snapshots(start, config, context)
    environment = _write_run_folder(config, context, start.step)
    log = run_on_all_ranks(lambda: _open_log(config, context.is_main, start.step))
    notes = [precision_note, length_note, compile_note, start.snapshot_note, *warnings]
    log.say("\n".join(filter(None, [*_plan_lines(train_step, fitting_notes), *notes])))
    _log_start(log, start, environment, train_step)
    _check_ranks(train_step, data, start.step)

    sampler = TextSampler(config, context, data.evaluation_prompts)
    metrics = _step_metrics(train_step, data, log, start)
    log.wait_for_trackers()
    assert start.lock is not None, "_load has taken it"
    return Trainer(
        train_step=train_step,
        data=data,
        sampler=sampler,
        metrics=metrics,
        saver=RunSaver(checkpoints, log, phase_timer, start.saved_step),
        snapshots=RunSnapshots(start.snapshots, config.snapshot_every, metrics, log, phase_timer),
        log=log,
        stop_requests=_stop_requests(config, context, start.lock),
        lock=start.lock,
        profiler=_profiler(config, context, phase_timer, log),
        step=start.step,
        record=start.record,
        source=start.source,
    )


def _open_data(config: TrainingConfig, context: DistributedContext) -> tuple[RunData, list[str]]:
    """Open the token files on all ranks, and return warnings about their tokenizers. A collective.

    The main rank is first. What it finds out in a scan of the files is kept beside them, so that others need not scan.
    """
    opened = run_on_all_ranks(lambda: open_run_data(config) if context.is_main else None)
    data = run_on_all_ranks(lambda: opened or open_run_data(config))
    warnings = run_on_all_ranks(lambda: tokenizer_warnings(config) if context.is_main else [])
    if context.any_rank(data.bytes_per_token is None):  # if only some ranks see the file, sums over ranks are wrong
        data = replace(data, bytes_per_token=None)
    return data, warnings


def _load(
    config: TrainingConfig,
    context: DistributedContext,
    checkpoints: CheckpointManager,
    train_step: TrainStep,
    phase_timer: PhaseTimer,
) -> Start:
    """Claim the run folder, and load the checkpoint that `resume` names, or the weights of `init_from`."""

    def resume() -> Any:
        # entering the phase again restarts start_limit for each checkpoint that is read
        return checkpoints.resume(lambda: phase_timer.enter("load"))

    automatic = config.resume_from == "auto" or is_url(config.resume_from)
    loaded = None if automatic else resume()  # before the folder is made, in case the path is wrong
    start = _claim_run_folder(config, context, checkpoints)
    start.snapshots, start.snapshot_note = build_keeper(config, context, checkpoints)
    saved_step = _newest_step(checkpoints, loaded)
    restored = start.snapshots.restore(saved_step) if start.snapshots else None
    folder = checkpoints.checkpoint_folder
    copies = begin_copies(config, context, folder, lambda: phase_timer.enter("load"))
    start.downloaded = copies.downloaded
    if automatic and not restored:
        loaded = resume()
        if start.snapshots and loaded and loaded[1]["step"] < saved_step:  # the newest checkpoint is damaged
            restored = start.snapshots.restore(loaded[1]["step"])
    checkpoints.copier = finish_copies_start(config, context, folder, copies)
    if restored:
        loaded = None, *restored
    if loaded:
        start.source, state, start.changed_settings = loaded
        start.from_snapshot = restored is not None
        start.step, start.record = state["step"], state.get("report", {})
        if state.get("data") != checkpoints.data:
            forget_level(start.record)
        train_step.step_filter.load(start.record)
        start.forgotten = forget_evaluations(start.record, changed_evaluation_settings(state, config))
        if start.source == checkpoints.folder(start.step) or restored:
            start.saved_step = min(start.step, saved_step)
    elif config.init_from:
        source = context.broadcast_object(weights_folder(Path(config.init_from)) if context.is_main else None)
        part, parts = context.rank, context.world_size
        run_on_all_ranks(lambda: init_from_hf_folder(source, train_step.model, config, part=part, parts=parts))
        train_step.optimizer.average.restart()
        start.weights = source
    return start


def _newest_step(checkpoints: CheckpointManager, loaded: Any) -> int:
    """Return the step of the newest checkpoint of this run or of the one that was loaded; -1 without any."""
    steps = [checkpoint_step(path) for path in checkpoints.committed()] + ([loaded[1]["step"]] if loaded else [])
    newest: int = checkpoints.context.broadcast_object(max(steps, default=-1))
    return newest


def _begin_snapshots(start: Start, config: TrainingConfig, context: DistributedContext) -> None:
    """Reserve the memory of snapshots. A collective. Errors: CheckpointError if it is too small, see `begin`."""
    problem = start.snapshots.begin() if start.snapshots is not None else ""
    if problem:
        start.snapshots, start.snapshot_note = None, f"no snapshots are taken: {problem}"
    if start.snapshots is None and context.is_main:
        (Path(config.target_dir) / SNAPSHOTS_FILE).unlink(missing_ok=True)  # of an earlier launch


def _claim_run_folder(config: TrainingConfig, context: DistributedContext, checkpoints: CheckpointManager) -> Start:
    """Take the locks of run folder and checkpoints, and check that saving will work: shared, writable, enough room."""
    folder = Path(config.target_dir)
    if (config.ckpt_writers or 1) > context.world_size:
        raise ConfigError(
            f"ckpt_writers: {config.ckpt_writers} is more than the {context.world_size} ranks of this run; lower it"
        )
    check_run_files(config, context)
    check_shared_storage(config.checkpoints_dir, context, "ckpt_dir" if config.ckpt_dir else "target_dir")
    if context.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock.acquire(folder, context, (config.checkpoints_dir, config.ckpt_save_prefix))
    claim_run(folder, lock.taken_over)
    previous_failure = read_and_clear_error(folder) if context.is_main else ""
    recovery = run_on_all_ranks(lambda: Recovery.begin(folder) if context.is_main else None)
    previous_failure = recovery.reason if recovery is not None else previous_failure

    shards = checkpoints.all_shards
    checkpoint_bytes = sum(math.prod(shard.shape) * shard.dtype.itemsize for shard in shards)
    if context.is_main:
        checkpoints.remove_leftovers()
        _remove_leftovers(config, context.world_size)
    existing = len(checkpoints.committed()) if context.is_main else 0
    check_disk_space(config.checkpoints_dir, checkpoint_bytes, config.keep_last + 1, existing, context)

    saves_during_training = config.ckpt_every < config.last_step or config.early_stop_patience is not None
    if config.ckpt_async and (saves_during_training or context.device.type == "cuda"):
        check_host_memory(sum(shard.rows_to_save.nbytes for shard in shards), context)
        checkpoints.buffers.copy()  # allocates the buffers now, so that the first save is as fast as the others
    if config.activation_offload and context.device.type == "cuda":
        check_host_memory(estimate_memory(config, context).host_bytes, context, "activation_offload")
    return Start(previous_failure=previous_failure, lock=lock, recovery=recovery)


def _remove_leftovers(config: TrainingConfig, world_size: int) -> None:
    """Remove and name what killed processes have left in the folders of this run, which this process holds."""
    run = Path(config.target_dir)
    folders = {run, run / LOGS_FOLDER, heartbeat_folder(run), config.logs_dir, config.checkpoints_dir}
    removed = [path for folder in sorted(folders) for path in remove_leftovers(folder)]
    if removed:
        print(describe_leftovers(removed), flush=True)
    remove_heartbeats(run, world_size)  # of an earlier start on more ranks


def _write_run_folder(config: TrainingConfig, context: DistributedContext, step: int) -> dict[str, Any]:
    """Write the resolved configuration and the environment; return the environment on rank 0, {} on others."""
    ranks = context.all_gather_object((context.host, str(context.device), os.getpid()))
    if not context.is_main:
        return {}
    environment = environment_record(ranks)
    folder = Path(config.target_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, config.to_toml())
    write_state(folder, "running", step)
    write_atomically(folder / ENVIRONMENT_FILE, environment)
    return environment


def _open_log(config: TrainingConfig, main: bool, step: int) -> RunLog:
    """Open the logs of a run. Errors: TrainingError if they cannot be written."""
    try:
        return RunLog(config, main, step)
    except OSError as error:
        raise TrainingError(
            f"{config.logs_dir}: cannot be written ({error}); make room, or set another log_dir"
        ) from None


def _plan_lines(train_step: TrainStep, notes: Sequence[str] = ()) -> list[str]:
    """Describe the mesh and how the global batch is divided, with `notes` in between."""
    return [str(train_step.context.parallel_dims), *notes, str(train_step.plans)]


def _log_start(log: RunLog, start: Start, environment: dict[str, Any], train_step: TrainStep) -> None:
    """Log the mesh and the batch, the environment, and what the run resumed from."""
    step = start.step
    log.about(step, "batch", "\n".join(_plan_lines(train_step)))
    hosts = Counter(rank["host"] for rank in environment.get("ranks", []))
    log.about(step, "environment", to_json(environment | {"ranks": hosts}, indent=1))
    if has_special_groups(train_step.config):
        groups = train_step.optimizer.groups
        table = describe_groups(groups, train_step.config.lr_max)
        records = [group.record() for group in groups]
        log.event(step, "parameter_groups", f"{len(groups)} parameter groups:\n{table}", groups=records)
    if start.source is not None:
        changes = f"; changed settings: {', '.join(start.changed_settings)}" if start.changed_settings else ""
        forgotten = f"; {start.forgotten}" if start.forgotten else ""
        origin = f", which was downloaded from {start.downloaded}" if start.downloaded else ""
        log.event(step, "resumed", f"resumed from {start.source}{origin}{changes}{forgotten}")
    if start.weights is not None:
        log.event(step, "initialized", f"started from the weights in {start.weights}")
    if start.from_snapshot:
        log.event(step, "resumed", f"resumed from the snapshot of step {step} in memory")
    if start.previous_failure:
        log.event(step, "restarted", f"restarted, because {start.previous_failure}")


def _check_ranks(train_step: TrainStep, data: RunData, step: int) -> None:
    """Check what DDP and FSDP do not: replicas start equal, and no two ranks read the same windows. A collective."""
    config, context = train_step.config, train_step.context
    own_slots, batch_size = train_step.share(step).slots, config.batch_sizes.at(step)
    check_replicas(model_tensors(train_step.model).items(), context)
    places = data.train.places(config.seed, step, own_slots)
    by_rank = context.all_gather_object((own_slots, places))[:: config.cp]  # ranks of a cp group have the same slots
    slots = sorted(slot for rank_slots, _ in by_rank for slot in rank_slots)
    if slots != list(range(batch_size)):
        raise TrainingError(f"ranks draw slots {slots[:8]}... instead of each of 0 .. {batch_size - 1} once")
    drawn = [tuple(rank_places) for _, rank_places in by_rank]
    # in tiny files, two ranks may draw the same windows by chance
    probability = len(drawn) ** 2 * data.train.collision_probability ** len(own_slots)
    if len(set(drawn)) < len(drawn) and probability < 1e-9:
        raise TrainingError(f"two ranks draw the same windows at step {step}: {drawn[:2]}")


def _stop_requests(config: TrainingConfig, context: DistributedContext, lock: RunLock) -> StopRequests:
    training_since = rank_start() + lock.waited_seconds  # time_limit is for training, not for the lock
    return StopRequests(Path(config.target_dir), config.time_limit, context.is_main, since=training_since)


def _step_metrics(train_step: TrainStep, data: RunData, log: RunLog, start: Start) -> StepMetrics:
    model: Any = unwrap(train_step.model)
    return StepMetrics(
        train_step.config,
        train_step.context,
        train_step.plans,
        log,
        step=start.step,
        record=start.record,
        data=data.train,
        flops_per_token=model.flops_per_token(),
        forward_timer=train_step.forward_timer,
        layer_sizes=train_step.reduction.view.layer_sizes,
        rank_start=rank_start(),
        after_first_step=partial(start.recovery.report, log, start.step) if start.recovery else None,
    )


def _profiler(
    config: TrainingConfig, context: DistributedContext, phase_timer: PhaseTimer, log: RunLog
) -> StepProfiler | None:
    """Return a profiler that follows the phases, on rank 0 of a run with `profile`."""
    if not (config.profile and context.is_main):
        return None
    profiler = StepProfiler(config.profiled_steps, config.logs_dir / PROFILE_FOLDER, context.device, log.say)
    phase_timer.follower = profiler.enter
    return profiler
