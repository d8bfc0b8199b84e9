"""Owns one optimizer step: what it consists of on this layout, and in which order it happens.

Must not know data files, folders, logs or when to stop. A Trainer is one of these with a run around it; estimate.py
rehearses a bare one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.batches import Prefetcher, split_micro_batches
from tinytrain_dist.distributed.batch_plan import BatchPlan, possible_micro_batch_sizes
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor
from tinytrain_dist.distributed.fake_backend import NoCommunication
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import TrainingError
from tinytrain_dist.metrics.device_stats import free_memory_bytes
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.metrics.step_metrics import LAYER_NORMS_EVERY, StepResult, due
from tinytrain_dist.metrics.timers import ForwardTimer, HostCopy
from tinytrain_dist.optim.adamw import AdamW, weight_decay_groups
from tinytrain_dist.optim.lr_schedule import learning_rate
from tinytrain_dist.parallel.grad_reduction import DeterministicGradReduction, NativeGradReduction
from tinytrain_dist.parallel.parallelize import build_model
from tinytrain_dist.parallel.wrappers import modules_without_collectives
from tinytrain_dist.training.fitting import fitting_micro_batch_sizes, memory_report
from tinytrain_dist.training.memory_estimate import USABLE_MEMORY, estimate_memory

CLIP_EPS = 1e-6


class TrainStep:
    """Plan, model, reduction and optimizer of one configuration on one layout; `step` counts optimizer steps."""

    batches: Prefetcher

    def __init__(
        self, config: TrainingConfig, context: DistributedContext, phase_timer: PhaseTimer | None = None
    ) -> None:
        """Nothing is built yet: see `spread` and `assemble_fitting`, or `assemble` alone for a layout that is known."""
        self.config, self.context, self.phase_timer = config, context, phase_timer or PhaseTimer()
        self.step = 0
        self.remarks: list[str] = []

    def assemble(self, *, draw: bool = True) -> None:
        """What a step consists of: plan, model, reduction, optimizer. draw: see build_model."""
        config, context = self.config, self.context
        assert context.parallel_dims is not None
        self.plan = BatchPlan.make(config, context.parallel_dims)
        self.leaves = [
            self.plan.micro_batch_index(context.replica, context.shard, k) for k in range(self.plan.accumulation_steps)
        ]
        self.slots = [slot for leaf in self.leaves for slot in self.plan.slots(leaf)]
        self.model = build_model(config, context, draw=draw)
        self.reduction = (DeterministicGradReduction if config.reproducible else NativeGradReduction)(
            self.model, self.plan, context
        )
        self.optimizer = AdamW(
            weight_decay_groups(self.model, config.weight_decay),
            config.lr_max,
            config.betas,
            config.eps,
            config.weight_decay,
        )
        self.optimizer.materialize()
        self.clock = ForwardTimer(
            modules_without_collectives(self.model), context.device.type == "cuda", bool(config.compile)
        )

    def spread(self, context: DistributedContext) -> DistributedContext:
        """This context on its layout; where `parallel = auto` may choose, replicas only if the estimate fits."""
        config, world = self.config, (context.world_size, context.local_world_size)
        spread = context.with_mesh(choose_parallel_dims(config, *world))
        assert spread.parallel_dims is not None
        if config.parallel == "auto" and spread.parallel_dims.mode == "ddp" and context.device.type == "cuda":
            least = replace(config, micro_batch_size=config.fixed_micro_batch_size or 1)
            need = estimate_memory(least, spread, TrainStep(config, context)).nbytes
            if context.any_rank(need > USABLE_MEMORY * free_memory_bytes(context.device, context.local_world_size)):
                spread = context.with_mesh(choose_parallel_dims(config, *world, fits=False))
        return spread

    def assemble_fitting(self) -> None:
        """`assemble`, where micro_batch_size = auto with the largest that the estimate and a trial let pass."""
        config, context = self.config, self.context
        if config.micro_batch_size != "auto":
            return self.assemble()
        assert context.parallel_dims is not None
        sizes = possible_micro_batch_sizes(config, context.parallel_dims)
        room = min(
            context.all_gather_object(USABLE_MEMORY * free_memory_bytes(context.device, context.local_world_size))
        )
        fitting = fitting_micro_batch_sizes(sizes, room, config, context, TrainStep(config, context))
        for size in reversed(context.broadcast_object(fitting)):
            self.config = replace(config, micro_batch_size=size)
            self.assemble()
            if not context.any_rank(not self._survives_a_trial()):
                self.remarks.append(f"micro_batch_size = auto: {size}")
                return None
            self.remarks.append(f"micro_batch_size {size} ran out of memory in a trial; trying the next smaller one")
            del self.model, self.reduction, self.optimizer, self.clock
            gc.collect()  # FSDP's modules refer to each other, and hold the memory until then
            if context.device.type == "cuda":
                torch.cuda.empty_cache()
        raise TrainingError(f"micro_batch_size: not even {sizes[0]} fits in memory\n{self.memory_report()}")

    def _survives_a_trial(self) -> bool:
        """Whether a step's passes fit in memory. Nothing is sent meanwhile, so that nobody waits for who runs out."""
        last = self.plan.accumulation_steps - 1
        passes = (0, last) if last else (0,)
        shape = len(passes) * self.plan.micro_batch_size, self.config.context_len + 1
        try:
            with NoCommunication(), torch.compiler.set_stance("force_eager"):
                self._pass(torch.zeros(shape, dtype=torch.int32), passes)
                self.reduction.finish()
        except torch.OutOfMemoryError:
            return False
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def memory_report(self) -> str:
        """What used the memory, and which settings would help."""
        return memory_report(self.config, self.context, TrainStep(self.config, self.context))

    def train_step(self, stop_reason: str = "") -> StepResult:
        """One optimizer step over the global batch: forward, backward, reduce, clip, update. Waits for nothing."""
        self.phase_timer.enter("data", self.step)
        waiting = time.perf_counter()
        rows = self.batches.get(self.step)
        waited = time.perf_counter() - waiting
        self.clock.take()  # the evaluation's
        self.phase_timer.enter("forward_backward")
        sums = self._pass(rows, range(self.plan.accumulation_steps))
        self.phase_timer.enter("reduction")
        self.reduction.finish()
        look = due(self.step + 1, LAYER_NORMS_EVERY * self.config.log_every)
        layer_norms = HostCopy(self.reduction.layer_norms()) if look else None
        micro_batch_losses = self.reduction.losses(self.leaves, sums, self.plan.num_micro_batches)
        loss = micro_batch_losses.sum() / self.plan.tokens_per_step
        norm = self.reduction.squared_norm().sqrt()
        skip = (~(loss.isfinite() & norm.isfinite())).float()
        self.phase_timer.enter("optimizer")
        self._clip(norm)
        lr = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(skip=skip)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.phase_timer.enter("reading", self.step)
        numbers = HostCopy(torch.stack([loss, norm, skip.double()]))
        vote, forward, phases = self.context.start_vote(bool(stop_reason)), self.clock.take(), self.phase_timer.take()
        return StepResult(self.step, lr, numbers, micro_batch_losses, vote, waited, forward, phases, layer_norms)

    def _pass(self, rows: Tensor, micro_steps: Sequence[int]) -> list[Tensor]:
        """Forward and backward of the micro-batches in `rows`; their summed losses."""
        sums = []
        micros = split_micro_batches(rows, self.plan.micro_batch_size, self.context.device)
        for k, (ids, targets) in zip(micro_steps, micros, strict=True):
            self.reduction.before_micro_step(k)
            loss_sum = self.model(ids, targets)
            (loss_sum / self.plan.tokens_per_step).backward()  # divided once, by the global count
            self.reduction.after_micro_step(k)
            sums.append(loss_sum.detach())
        return sums

    def _clip(self, norm: Tensor) -> None:
        if self.config.grad_clip_norm is not None:
            factor = (self.config.grad_clip_norm / (norm + CLIP_EPS)).clamp(max=1.0).float()
            grads = [local_tensor(param.grad) for param in self.model.parameters() if param.grad is not None]
            torch._foreach_mul_(grads, factor)
