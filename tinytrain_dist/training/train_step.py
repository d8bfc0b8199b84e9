"""Build and run one optimizer step: forward, backward, gradient reduction, clipping, update.

Must not know data files, folders, logs or when to stop. The trainer runs steps in a loop; memory_estimate.py simulates
a step on tensors without memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.distributed.batch_plan import BatchPlans, BatchShare
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.metrics.phase_timer import PhaseTimer
from tinytrain_dist.metrics.step_metrics import LAYER_NORMS_EVERY, StepResult, due
from tinytrain_dist.metrics.step_timer import ForwardTimer, HostCopy
from tinytrain_dist.optim.build import build_optimizer
from tinytrain_dist.optim.run_optimizer import RunOptimizer
from tinytrain_dist.optim.step_settings import apply_step_settings
from tinytrain_dist.parallel.grad_reduction import GradReduction, build_grad_reduction
from tinytrain_dist.parallel.parallelize import build_model
from tinytrain_dist.parallel.wrappers import modules_without_collectives, unwrap
from tinytrain_dist.training.micro_steps import micro_steps
from tinytrain_dist.training.source_sums import SourceSums
from tinytrain_dist.training.stability_probe import StabilityProbe
from tinytrain_dist.training.step_filter import StepFilter, build_step_filter
from tinytrain_dist.training.token_count import TokenCount


class Batches(Protocol):
    """The source of token windows for steps."""

    def get(self, step: int) -> Windows:
        """Return the windows of this rank's sample slots after `step` steps."""


class TrainStep:
    """One optimizer step of one configuration on one mesh; made by `build_train_step`."""

    def __init__(
        self,
        config: TrainingConfig,
        context: DistributedContext,
        plans: BatchPlans,
        model: nn.Module,
        reduction: GradReduction,
        optimizer: RunOptimizer,
        forward_timer: ForwardTimer,
        phase_timer: PhaseTimer,
        step_filter: StepFilter,
    ) -> None:
        """Combine the parts.

        plans: how the global batch of each step is divided. reduction: sums gradients and losses of all ranks.
        """
        self.config = config
        self.context = context
        self.plans = plans
        self.plan = plans.whole
        self.model = model
        self.reduction = reduction
        self.optimizer = optimizer
        self.forward_timer = forward_timer
        self.phase_timer = phase_timer
        self.step_filter = step_filter
        transformer: Any = unwrap(model)
        self._row_losses: list[Tensor] = transformer.lm_head.row_losses
        self._z_losses: list[Tensor] = transformer.lm_head.z_losses
        self.stability = StabilityProbe(config, model, context.device)
        num_sources = len(config.train_files)
        self._source_sums = SourceSums(num_sources, context.device) if num_sources > 1 else None

    def share(self, step: int) -> BatchShare:
        """Return what this rank computes of the global batch after `step` steps."""
        return self.plans.at(step).share(*self.context.data_coordinates)

    def run(self, step: int, batches: Batches, wants_stop: bool = False, *votes: bool) -> StepResult:
        """Run step `step` + 1 over the global batch, and return its result. A collective.

        Does not wait for the device. wants_stop: this rank's vote on whether the run stops after this step.
        votes: on other questions, see `DistributedContext.start_vote`. A step that `step_filter` skips changes nothing.
        """
        self.phase_timer.enter("data", step)
        waiting_since = time.perf_counter()
        windows = batches.get(step)
        data_wait = time.perf_counter() - waiting_since

        self.phase_timer.enter("forward_backward")
        stability = self.stability.measure(step + 1, windows, self.share(step))
        loss_sums, tokens = self.forward_backward(windows, self.share(step))

        self.phase_timer.enter("reduction")
        self.reduction.finish()
        log_norms = stability is not None or due(step + 1, LAYER_NORMS_EVERY * self.config.log_every)
        layer_norms = HostCopy(self.reduction.view.layer_norms()) if log_norms else None
        losses, loss, norm = self._losses_and_norm(step, loss_sums, tokens)
        decision = self.step_filter.decide(loss, norm)

        self.phase_timer.enter("optimizer")
        lr = self._update(step, norm, skip=decision[0].float())

        self.phase_timer.enter("reading", step + 1)
        return StepResult(
            step=step + 1,
            lr=lr,
            numbers=HostCopy(torch.cat([torch.stack([loss, norm]), decision])),
            micro_batch_losses=losses,
            vote=self.context.start_vote(wants_stop, *votes),
            data_wait=data_wait,
            forward=self.forward_timer.take(),
            phases=self.phase_timer.take(),
            layer_norms=layer_norms,
            source_sums=self._sum_by_source(windows, due(step + 1, self.config.log_every)),
            z_losses=self._z_losses_per_token(tokens, due(step + 1, self.config.log_every)),
            stability=stability,
        )

    def forward_backward(self, windows: Windows, share: BatchShare) -> tuple[list[Tensor], TokenCount]:
        """Run forward and backward for micro-batches; return their summed losses, and the tokens of the global batch.

        windows: micro_batch_size for each micro-batch of the share. A collective.
        """
        loss_sums = []
        for kept in (self._row_losses, self._z_losses):
            kept.clear()  # those of an evaluation before this step
        self.forward_timer.take()  # so are these marks
        tokens = TokenCount(windows, self.config, share.plan, self.context)
        for micro_step, counts, micro_batch in micro_steps(share, windows, self.context.device):
            self.reduction.before_micro_step(share, micro_step)
            if counts:
                loss_sum = self.model(*micro_batch)
                # the gradients of all micro-batches are summed, so each is divided by the tokens of the global batch
                (loss_sum / tokens.value).backward()
                loss_sums.append(loss_sum.detach())
            else:
                self._run_without_effect(micro_batch)
            self.reduction.after_micro_step(share, micro_step)
        return loss_sums, tokens

    def _run_without_effect(self, micro_batch: tuple[Tensor, ...]) -> None:
        """Run forward and backward with gradients of zero, for FSDP's collectives."""
        row_losses, z_losses = list(self._row_losses), list(self._z_losses)
        (self.model(*micro_batch) * 0).backward()
        self._row_losses[:], self._z_losses[:] = row_losses, z_losses

    def probe(self, step: int, windows: Windows) -> tuple[float, float]:
        """Return loss and gradient norm of the present weights over `windows`, and change nothing. A collective.

        windows: of the batch after `step` steps. Waits for the device.
        """
        self.phase_timer.enter("forward_backward")
        loss_sums, tokens = self.forward_backward(windows, self.share(step))
        self.reduction.finish()
        _, loss, norm = self._losses_and_norm(step, loss_sums, tokens)
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss), float(norm)

    def _losses_and_norm(
        self, step: int, loss_sums: Sequence[Tensor], tokens: TokenCount
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed losses of all micro-batches, the loss per token and the gradient norm. A collective."""
        share = self.share(step)
        losses = self.reduction.view.losses(share.micro_batches, loss_sums, share.plan.num_micro_batches)
        return losses, losses.sum() / tokens.value, self.reduction.squared_norm().sqrt()

    def _sum_by_source(self, windows: Windows, logged: bool) -> HostCopy | None:
        """Add the losses of a step to those of their sources; return the sums since the last logged step if it is one.

        Returns None if there is only one source.
        """
        if self._source_sums is None or windows.sources is None:
            return None
        self._source_sums.add(windows, self._row_losses)
        return self._source_sums.take() if logged else None

    def _z_losses_per_token(self, tokens: TokenCount, logged: bool) -> HostCopy | None:
        """Return the share of each of this rank's micro-batches in the z-loss of a logged step; None without z_loss."""
        if not (logged and self._z_losses):
            return None
        return HostCopy(torch.stack(self._z_losses).double() / tokens.value)

    def _update(self, step: int, norm: Tensor, skip: Tensor) -> float:
        """Clip the gradients and update the weights, unless `skip` is 1; return the learning rate of the schedule."""
        lr = apply_step_settings(self.optimizer, self.config, step)
        self.optimizer.clip_and_step(norm, self.config.grad_clip_norm, skip)
        return lr


def build_train_step(
    config: TrainingConfig,
    context: DistributedContext,
    phase_timer: PhaseTimer | None = None,
    *,
    draw: bool = True,
) -> TrainStep:
    """Build model, gradient reduction and optimizer for the context's mesh.

    draw=False leaves the initial weights undefined, for a simulation (see `build_model`). A collective.
    """
    assert context.parallel_dims is not None, "with_mesh comes first"
    plans = BatchPlans.make(config, context.parallel_dims)
    model = build_model(config, context, draw=draw)
    reduction = build_grad_reduction(model, plans.whole, context, deterministic=config.reproducible)
    on_gpu = context.device.type == "cuda"
    return TrainStep(
        config,
        context,
        plans,
        model,
        reduction,
        build_optimizer(model, config, context),
        ForwardTimer(modules_without_collectives(model), on_gpu, bool(config.compile)),
        phase_timer or PhaseTimer(),
        build_step_filter(config, context.device),
    )
