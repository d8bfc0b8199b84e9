"""Measure what shows early that training becomes unstable: activations, attention scores, and the embedding's norms.

Every `stability_every` steps, the micro-batches of the step go through the model once more, without gradients and with
hooks on the blocks. The blocks are not compiled there, because a hook would split their graphs. Other steps cost
nothing. Must not know what becomes of the numbers (metrics/stability_metrics.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.data.training_windows import Windows
from tinytrain_dist.distributed.batch_plan import BatchShare
from tinytrain_dist.distributed.dtensor import local_tensor
from tinytrain_dist.distributed.torch_internals import without_compiled_calls
from tinytrain_dist.metrics.step_metrics import due
from tinytrain_dist.metrics.step_timer import HostCopy
from tinytrain_dist.model.attention import CausalAttention, largest_score
from tinytrain_dist.parallel.wrappers import unwrap
from tinytrain_dist.training.micro_steps import micro_steps

ROW_ELEMENTS = 1 << 24  # of the embedding, whose squares exist at once


class StabilityProbe:
    """Measures the model of a run before the steps at which this is due."""

    def __init__(self, config: TrainingConfig, model: nn.Module, device: torch.device) -> None:
        """Prepare to measure. model: a TransformerLM in its wrappers."""
        self.every = config.stability_every
        self.model = model
        self.device = device
        transformer: Any = unwrap(model)
        self.blocks: list[Any] = list(transformer.model.layers)
        # each sees whole sequences, of some heads if ranks share sequences
        modules = [module for block in self.blocks for module in block.modules()]
        self.attentions = [module for module in modules if isinstance(module, CausalAttention)]
        self.embedding: Tensor = transformer.model.embed_tokens.weight  # sharded, if FSDP shards it

    @torch.no_grad()
    def measure(self, step: int, windows: Windows, share: BatchShare) -> HostCopy | None:
        """Return the numbers of this rank for step `step`, as `stability_groups` takes them; None if they are not due.

        windows: those of this rank's share. A collective, as the forward passes are. Does not wait for the device.
        """
        if self.every is None or not due(step, self.every):
            return None
        numbers = [largest_row_norm(local_tensor(self.embedding))]
        with without_compiled_calls(self.blocks):
            for _, counts, micro_batch in micro_steps(share, windows, self.device):
                measured, elements = self._forward(micro_batch)
                numbers += measured if counts else []
        head = torch.full((1,), float(elements), dtype=torch.float64, device=self.device)
        return HostCopy(torch.cat([numbers[0].view(1), head, torch.stack(numbers[1:])]))

    def _forward(self, micro_batch: tuple[Tensor, ...]) -> tuple[list[Tensor], int]:
        """Return sum of squares and largest score of each block, float64 scalars, and the elements of an activation."""
        documents = micro_batch[2] if len(micro_batch) > 2 else None
        numbers: list[Tensor] = []
        elements = 0

        def before_attention(_: nn.Module, args: tuple[Any, ...]) -> None:
            q_bhte, k_bkte = args[:2]
            numbers.append(largest_score(q_bhte, k_bkte, documents).double())

        def after_block(_: nn.Module, __: Any, output_btd: Tensor) -> None:
            nonlocal elements
            elements = output_btd.numel()
            # before the score, which the attention of this block has appended
            numbers.insert(len(numbers) - 1, output_btd.float().square().sum(dtype=torch.float64))

        handles = [attention.register_forward_pre_hook(before_attention) for attention in self.attentions]
        handles += [block.register_forward_hook(after_block) for block in self.blocks]
        try:
            self.model(*micro_batch)
        finally:
            for handle in handles:
                handle.remove()
        return numbers, elements


def largest_row_norm(matrix: Tensor) -> Tensor:
    """Return the largest norm of a row, a float64 scalar; 0 for a matrix without rows."""
    largest = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(max(1, ROW_ELEMENTS // matrix.shape[1])):
        if len(rows):
            largest = torch.maximum(largest, rows.double().square().sum(dim=1).amax())
    return largest.sqrt()
