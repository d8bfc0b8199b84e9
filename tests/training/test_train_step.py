"""One optimizer step, compared with the same step written out with torch's own AdamW and clipping."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.training import TINY, VOCABULARY
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.distributed.context import DistributedContext, init_distributed, shutdown
from tinytrain_dist.distributed.parallel_dims import ParallelDims
from tinytrain_dist.optim.clipping import CLIP_EPS
from tinytrain_dist.optim.lr_schedule import learning_rate
from tinytrain_dist.training.train_step import TrainStep, build_train_step


@pytest.fixture
def context() -> Iterator[DistributedContext]:
    yield init_distributed("cpu").with_mesh(ParallelDims("none", 1, 1, ""))
    shutdown()


class FixedBatches:
    def __init__(self, rows: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        self.rows, self.counted = rows, counted

    def get(self, step: int) -> Windows:
        return Windows(self.rows, self.counted)


def built(context: DistributedContext, **settings: Any) -> tuple[TrainStep, FixedBatches]:
    config = TrainingConfig(**{**TINY, "vocab_size": VOCABULARY, "micro_batch_size": 2, "compile": False, **settings})
    step = build_train_step(config, context)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (len(step.share(0).slots), config.context_len + 1), generator=generator)
    return step, FixedBatches(rows.int())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reproducible", [False, True])
def test_a_step_is_the_textbook_step_over_the_whole_batch(
    context: DistributedContext, reproducible: bool, masked: bool
) -> None:
    # Adam divides by the size of the gradient, so with the usual eps the rounding of a tiny gradient would show
    step, batches = built(context, reproducible=reproducible, loss_mask=masked, eps=1e-4)
    counted = torch.ones(8, step.config.context_len, dtype=torch.bool)
    if masked:
        counted = torch.rand(counted.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        counted[2:4] = False  # a whole micro-batch
        batches.counted = counted
    config, oracle = step.config, copy.deepcopy(step.model)
    result = step.run(3, batches)

    rows = batches.rows.long()
    loss = F.cross_entropy(oracle(rows[:, :-1])[counted], rows[:, 1:][counted])
    loss.backward()
    params = list(oracle.parameters())
    norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
    factor = min(1.0, (config.grad_clip_norm or 1.0) / (norm.item() + CLIP_EPS))
    for param in params:
        assert param.grad is not None
        param.grad.mul_(factor)
    matrices = {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}
    torch.optim.AdamW([matrices, vectors], learning_rate(config, 3), config.betas, config.eps).step()

    assert (result.step, result.lr) == (4, learning_rate(config, 3))
    assert result.numbers.read() == pytest.approx([loss.item(), norm.item(), 0.0], rel=1e-5)
    assert len(result.micro_batch_losses) == 4
    for name, param in step.model.named_parameters():
        assert torch.allclose(param, dict(oracle.named_parameters())[name], atol=1e-6), name
        assert param.grad is None


def test_a_step_that_is_not_finite_changes_nothing(context: DistributedContext) -> None:
    step, batches = built(context)
    before = {name: param.clone() for name, param in step.model.named_parameters()}
    step.model.register_forward_hook(lambda *results: results[-1] * torch.nan)
    _, _, skipped = step.run(0, batches).numbers.read()
    assert skipped == 1.0
    assert all(torch.equal(param, before[name]) for name, param in step.model.named_parameters())


def test_a_vote_to_stop_is_in_the_result(context: DistributedContext) -> None:
    step, batches = built(context)
    assert not step.run(0, batches).vote.result()
    assert step.run(1, batches, wants_stop=True).vote.result()


def test_this_rank_computes_its_own_micro_batches(context: DistributedContext) -> None:
    step, _ = built(context)
    assert step.share(0).micro_batches == (0, 1, 2, 3)
    assert step.share(0).slots == tuple(range(8))


@pytest.mark.parametrize("grad_clip_norm", [1e-3, 1e3, None])
def test_the_optimizers_kernel_clips_as_a_pass_over_the_gradients_does(
    context: DistributedContext, grad_clip_norm: float | None
) -> None:
    """Clipping in the kernel is for GPUs. The CPU kernel takes the same argument."""
    weights = []
    for clips_in_kernel in (False, True):
        step, batches = built(context, grad_clip_norm=grad_clip_norm)
        assert not step.optimizer.clips_in_kernel, "runs on a CPU keep their bits"
        step.optimizer.clips_in_kernel = clips_in_kernel
        step.run(3, batches)
        moments = [state["exp_avg"] for state in step.optimizer.state.values()]
        weights.append([*step.model.parameters(), *moments])
    is_clipped = grad_clip_norm == 1e-3
    for by_pass, by_kernel in zip(*weights, strict=True):
        torch.testing.assert_close(by_pass, by_kernel, rtol=1e-5 if is_clipped else 0, atol=1e-9 if is_clipped else 0)


def test_a_step_that_is_not_finite_changes_nothing_if_the_kernel_clips(context: DistributedContext) -> None:
    step, batches = built(context)
    step.optimizer.clips_in_kernel = True
    before = {name: param.clone() for name, param in step.model.named_parameters()}
    step.model.register_forward_hook(lambda *results: results[-1] * torch.nan)
    step.run(0, batches)
    assert all(torch.equal(param, before[name]) for name, param in step.model.named_parameters())


def test_a_mask_in_which_all_targets_count_changes_no_bit(context: DistributedContext) -> None:
    results = []
    for loss_mask in (False, True):
        step, batches = built(context, reproducible=True, loss_mask=loss_mask)
        if loss_mask:
            batches.counted = torch.ones(8, step.config.context_len, dtype=torch.bool)
        numbers = step.run(0, batches).numbers.read()
        results.append((numbers, [param.tolist() for param in step.model.parameters()]))
    assert results[0] == results[1]
