"""Keep an exponential moving average of the weights, in the state of the optimizer.

There it is sharded, saved, loaded and counted as every state tensor is. Must not know ranks or the training loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.dtensor import copy_of, local_tensor

AVERAGE_KEY = "ema"  # of the optimizer's state of a parameter, and in names of saved tensors


def ema_decay_of_step(config: TrainingConfig, step: int) -> float:
    """Return the decay of the average in the update after `step` completed steps; 1 if it stays as it is.

    The average changes in every `ema_every`-th step, by the decay of so many steps. Early in a run it is smaller,
    so that the initial weights are soon forgotten: (1 + n) / (10 + n) in the n-th change, as in TensorFlow's
    ExponentialMovingAverage.
    """
    changes, rest = divmod(step + 1, config.ema_every)
    if config.ema_decay is None or rest:
        return 1.0
    return min(config.ema_decay**config.ema_every, (1 + changes) / (10 + changes))


class WeightAverage:
    """The average of all weights of an optimizer, updated after each of its steps:

        average <- decay * average + (1 - decay) * weight

    A step that the optimizer skips counts as one that did not change the weights. Works on the local part of each
    parameter, without communication. Source: Polyak & Juditsky 1992; Izmailov et al. 2018 (arXiv 1803.05407).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainingConfig | None = None) -> None:
        """Begin with the present weights, if `ema_decay` is set; otherwise, do nothing here and in all methods."""
        self.optimizer = optimizer
        self.decay = 1.0  # of the next update; set in every step, see ema_decay_of_step
        self.params: list[Tensor] = []
        if config is None or config.ema_decay is None:
            return
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        for param in self.params:
            device = torch.device("cpu") if config.ema_on_host else local_tensor(param).device
            optimizer.state[param][AVERAGE_KEY] = copy_of(param, device)
        optimizer.register_step_post_hook(lambda *_: self._update())

    def __bool__(self) -> bool:
        """Return whether there is an average."""
        return bool(self.params)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the present weights."""
        for weight, average in self._pairs():
            average.copy_(weight)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Exchange weights and averages while the block runs. Needs memory for one more tensor.

        No save may be reading them from a CPU. Modules that FSDP shards must be resharded before and after: a gathered
        weight would be used again.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.params[0].is_cuda:
            torch.cuda.synchronize()  # a save may be copying them on a stream of its own
        for weight, average in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def _update(self) -> None:
        if self.decay == 1.0:
            return
        for weight, average in self._pairs():
            # Two products and a sum, each rounded on its own. A fused kernel rounds the last elements of a tensor
            # otherwise on a CPU, so bits would depend on the sharding.
            average.mul_(self.decay).add_(weight.to(average.device) * (1 - self.decay))

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the local part of each weight and of its average."""
        for param in self.params:
            yield local_tensor(param).detach(), local_tensor(self.optimizer.state[param][AVERAGE_KEY])
