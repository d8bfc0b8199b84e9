"""Evaluate a model on the fixed evaluation windows of a run, and decide when the run stops early.

Must not know when an evaluation is due, or where its numbers are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor

from tinytrain_dist.data.batches import split_micro_batches
from tinytrain_dist.data.token_dataset import TokenDataset
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.data.window_sampling import EVAL_STREAM
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.parallel.context_parallel import whole_sequences
from tinytrain_dist.training.run_data import RunData
from tinytrain_dist.training.text_samples import TextSampler
from tinytrain_dist.training.train_step import TrainStep

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one evaluation, over all ranks."""

    loss: float  # nats per counted token, the mean over the evaluation files
    others: dict[str, float]  # the loss on each file if there are several, bits per byte if known; of the average, too
    samples: list[tuple[str, str]]  # (prompt, continuation)


@dataclass(frozen=True)
class LossSum:
    """The summed loss of one file's windows over all ranks; bytes and number of this rank's targets that count."""

    loss: float
    num_bytes: int
    num_tokens: int


# of the record of EarlyStopping: what was measured, on the data of that time
MEASURED_KEYS = ("eval_loss", "best_eval_loss", "best_eval_step", "evals_since_best")


class Evaluator:
    """Compute the loss over the evaluation windows: the same windows throughout a run, on any number of ranks."""

    def __init__(
        self,
        train_step: TrainStep,
        data: RunData,
        sampler: TextSampler,
        wants_stop: Callable[[], bool],
    ) -> None:
        """Evaluate the model of `train_step`. wants_stop: returns whether this rank wants the run to stop."""
        self.train_step = train_step
        self.data = data
        self.sampler = sampler
        self.wants_stop = wants_stop

    @torch.no_grad()
    def run(self, step: int) -> Evaluation | None:
        """Evaluate the model after `step` steps. Returns None if the ranks agree to stop. A collective.

        With `ema_decay`, the moving average of the weights is evaluated as well.
        """
        measured = self._losses()
        if measured is None:
            return None
        loss, others = measured
        with whole_sequences(self.train_step.model):
            samples = self.sampler.write(self.train_step.model, step)
        if self.train_step.optimizer.average:
            with self._averaged_weights():
                measured = self._losses()
            if measured is None:
                return None
            others |= {"ema_loss": measured[0]} | {f"ema_{name}": number for name, number in measured[1].items()}
        return Evaluation(loss, others, samples)

    def _losses(self) -> tuple[float, dict[str, float]] | None:
        """Return the loss, and the other numbers of an Evaluation, with the present weights. A collective.

        Returns None if the ranks agree to stop. Every file has the same weight in the mean loss. Every rank computes
        its share of the windows. The means are computed from the sums over all ranks.
        """
        sums = []
        for dataset in self.data.evaluation.values():
            summed = self.summed_loss(dataset)
            if summed is None:
                return None
            sums.append(summed)
        loss_sums = [summed.loss for summed in sums]
        by_rank = self.train_step.context.all_gather_object([(summed.num_bytes, summed.num_tokens) for summed in sums])
        num_bytes = sum(bytes_of_file for own in by_rank for bytes_of_file, _ in own)
        tokens = [sum(counts) for counts in zip(*([count for _, count in own] for own in by_rank), strict=True)]

        others: dict[str, float] = {}
        if len(loss_sums) > 1:
            losses = map(_ratio, loss_sums, tokens)
            others = {f"loss/{name}": loss for name, loss in zip(self.data.evaluation, losses, strict=True)}
        if num_bytes > 0:
            others["bits_per_byte"] = sum(loss_sums) / math.log(2) / num_bytes
        return _mean_loss(loss_sums, tokens), others

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Give the model the moving average of its weights while the block runs."""
        units = self.train_step.reduction.view.units
        _reshard(units)
        with self.train_step.optimizer.average.in_place_of_weights():
            yield
            _reshard(units)

    def summed_loss(self, dataset: TokenDataset) -> LossSum | None:
        """Return the summed loss of one file's windows over all ranks, and the size of this rank's targets.

        Returns None if the ranks agree to stop. They vote at the start of each batch, and read the result at the start
        of the next one.
        """
        step = self.train_step
        plan, context, table = step.plan, step.context, self.data.bytes_per_token
        share = plan.share(*context.data_coordinates)
        indices = [
            batch * plan.num_micro_batches + index
            for batch in range(step.config.eval_steps)
            for index in share.micro_batches
        ]
        loss_sums: list[Tensor] = []
        micro_batch: tuple[Tensor, ...] = ()
        num_bytes = 0
        num_tokens = 0
        vote = None
        for _ in range(step.config.eval_steps):
            if vote is not None and vote.result():
                return None
            vote = context.start_vote(self.wants_stop())
            for micro_step in share.micro_steps:
                step.phase_timer.enter("evaluation")
                if share.is_repeated(micro_step):
                    step.model(*micro_batch)  # the one before it, for FSDP's collectives
                    continue
                whole = dataset.read(*dataset.draw(0, 0, plan.slots(indices[len(loss_sums)]), EVAL_STREAM))
                windows = whole.take_columns(share.columns)
                num_tokens += windows.num_counted
                if table is not None:
                    num_bytes += bytes_of_targets(table, windows)
                (micro_batch,) = split_micro_batches(windows, plan.micro_batch_size, context.device)
                loss_sums.append(step.model(*micro_batch))
        losses = step.reduction.view.losses(indices, loss_sums, step.config.eval_steps * plan.num_micro_batches)
        return LossSum(float(losses.sum()), num_bytes, num_tokens)


def _reshard(units: list[FSDPModule]) -> None:
    """Drop the gathered weights that FSDP keeps after a forward pass without a backward."""
    for unit in units:
        unit.reshard()


def bytes_of_targets(table: npt.NDArray[Any], windows: Windows) -> int:
    """Return the bytes of text for which the targets stand that count. table: bytes of each token ID."""
    num_bytes = table[windows.tokens[:, 1:].numpy()]
    return int(num_bytes.sum() if windows.counted is None else num_bytes[windows.counted.numpy()].sum())


def _mean_loss(loss_sums: list[float], tokens: list[int]) -> float:
    """Return the mean of the losses per token of several files; of those in which some tokens count."""
    if len(set(tokens)) == 1:
        return _ratio(sum(loss_sums), tokens[0] * len(tokens))
    losses = [loss_sum / count for loss_sum, count in zip(loss_sums, tokens, strict=True) if count]
    return sum(losses) / len(losses)


def _ratio(loss_sum: float, tokens: int) -> float:
    return loss_sum / tokens if tokens else math.nan


def forget_evaluations(record: dict[str, Any], changed: list[str]) -> str:
    """Remove earlier evaluations from `record` if settings of evaluations have changed; return a sentence about it.

    `record`: see EarlyStopping. `changed`: the names of these settings. Losses of other data cannot be compared. The
    sentence is "" if there is nothing to forget.
    """
    best, step = record.get("best_eval_loss"), record.get("best_eval_step")
    if not changed:
        return ""
    for name in MEASURED_KEYS:
        record.pop(name, None)
    if best is None:
        return ""
    return (
        f"the lowest eval loss so far ({best:.4f} at step {step}) no longer counts, because it was measured with "
        f"another {' and another '.join(changed)}"
    )


class EarlyStopping:
    """Track the best evaluation of a run in `record`, which every checkpoint contains.

    Keys of the record: eval_loss and eval_step (of the newest evaluation), best_eval_loss, best_eval_step, and
    evals_since_best.
    """

    def __init__(self, patience: int | None, record: dict[str, Any]) -> None:
        """Continue `record`. patience: stop after this many evaluations without a better loss (None: never)."""
        self.patience = patience
        self.record = record

    def update(self, step: int, loss: float, context: DistributedContext) -> None:
        """Compare an evaluation with the best one. A collective: all ranks decide the same."""
        if context.any_rank(loss < self.record.get("best_eval_loss", math.inf)):
            self.record |= {"best_eval_loss": loss, "best_eval_step": step, "evals_since_best": 0}
        else:
            self.record["evals_since_best"] = self.record.get("evals_since_best", 0) + 1

    def is_best(self, step: int) -> bool:
        """Return whether `step` must be saved: early stopping is on, and its loss is the best so far."""
        return self.patience is not None and self.record.get("best_eval_step") == step

    @property
    def out_of_patience(self) -> bool:
        """Whether early stopping ends the run. The same on all ranks."""
        return self.patience is not None and self.record.get("evals_since_best", 0) >= self.patience

    def summary(self) -> str:
        """Describe why the run stops early."""
        best = self.record.get("best_eval_loss", math.nan)
        return f"no better eval loss than {best:.4f} in {self.record['evals_since_best']} evaluations"
